"""One line makes a diffusers video pipeline sparse: Wan, HunyuanVideo, Cosmos, CogVideoX."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svg_models.compare import compare
    from svg_models.embedded import embedded_path
    from svg_models.generate import generate
    from svg_models.recipes import recipe_for
    from svg_models.sparsify import SparseRun, sparsify

__version__ = "0.1.0"

__all__ = ["SparseRun", "compare", "embedded_path", "generate", "recipe_for", "sparsify"]

_HOMES = {
    "SparseRun": "svg_models.sparsify",
    "compare": "svg_models.compare",
    "embedded_path": "svg_models.embedded",
    "generate": "svg_models.generate",
    "recipe_for": "svg_models.recipes",
    "sparsify": "svg_models.sparsify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keep `svg_models.sparsify` the function when the module of the same name gets imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
