"""One line makes a diffusers video pipeline sparse: Wan, HunyuanVideo, Cosmos, CogVideoX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svg_attention import SVG1, SVG2, Dense, RandomBlocks, Schedule, UnsupportedError
    from svg_models.comparison.run import compare
    from svg_models.embedded import embedded_path
    from svg_models.errors import SvgModelsError
    from svg_models.generation.generate import generate
    from svg_models.loading import load_pipeline
    from svg_models.parallel import SharedRun, parallelize
    from svg_models.recipe import Recipe
    from svg_models.recipes import recipe_for
    from svg_models.sparse.run import SparseRun, restore, sparsify
    from svg_models.tuning.run import tune

__version__ = "0.1.0"

__all__ = [
    "SVG1",
    "SVG2",
    "Dense",
    "RandomBlocks",
    "Recipe",
    "Schedule",
    "SharedRun",
    "SparseRun",
    "SvgModelsError",
    "UnsupportedError",
    "compare",
    "embedded_path",
    "generate",
    "load_pipeline",
    "parallelize",
    "recipe_for",
    "restore",
    "sparsify",
    "tune",
]

_HOMES = {
    "SVG1": "svg_attention",
    "SVG2": "svg_attention",
    "Dense": "svg_attention",
    "RandomBlocks": "svg_attention",
    "Recipe": "svg_models.recipe",
    "Schedule": "svg_attention",
    "SharedRun": "svg_models.parallel",
    "SparseRun": "svg_models.sparse.run",
    "SvgModelsError": "svg_models.errors",
    "UnsupportedError": "svg_attention",
    "compare": "svg_models.comparison.run",
    "embedded_path": "svg_models.embedded",
    "generate": "svg_models.generation.generate",
    "load_pipeline": "svg_models.loading",
    "parallelize": "svg_models.parallel",
    "recipe_for": "svg_models.recipes",
    "restore": "svg_models.sparse.run",
    "sparsify": "svg_models.sparse.run",
    "tune": "svg_models.tuning.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
