"""Load video pipelines and know what they can make."""

from __future__ import annotations

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
