"""Load video pipelines and know what they can make.

The names are loaded at first use: what needs no torch, as the check of a folder or of the name of a
device, answers before torch is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svg_models.loading.defaults import Defaults
    from svg_models.loading.device import pick_device, pick_dtype
    from svg_models.loading.geometry import Geometry
    from svg_models.loading.inputs import Inputs
    from svg_models.loading.lora import Lora
    from svg_models.loading.pipeline import LoadedPipeline, load_pipeline
    from svg_models.loading.progress import Progress, quiet

__all__ = [
    "Defaults",
    "Geometry",
    "Inputs",
    "LoadedPipeline",
    "Lora",
    "Progress",
    "load_pipeline",
    "pick_device",
    "pick_dtype",
    "quiet",
]

_HOMES = {
    "Defaults": "defaults",
    "Geometry": "geometry",
    "Inputs": "inputs",
    "LoadedPipeline": "pipeline",
    "Lora": "lora",
    "Progress": "progress",
    "load_pipeline": "pipeline",
    "pick_device": "device",
    "pick_dtype": "device",
    "quiet": "progress",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
