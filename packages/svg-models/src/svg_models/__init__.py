"""One line makes a diffusers video pipeline sparse: Wan, HunyuanVideo, Cosmos, CogVideoX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svg_models.comparison.run import compare
    from svg_models.embedded import embedded_path
    from svg_models.generation.sample import generate
    from svg_models.recipes import recipe_for
    from svg_models.sparse.run import SparseRun, sparsify

__version__ = "0.1.0"

__all__ = ["SparseRun", "compare", "embedded_path", "generate", "recipe_for", "sparsify"]

_HOMES = {
    "SparseRun": "svg_models.sparse.run",
    "compare": "svg_models.comparison.run",
    "embedded_path": "svg_models.embedded",
    "generate": "svg_models.generation.sample",
    "recipe_for": "svg_models.recipes",
    "sparsify": "svg_models.sparse.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
