"""ChronoEdit: the transformer of Wan under another name."""

from __future__ import annotations

from dataclasses import replace

from svg_models.families.wan import WAN

__all__ = ["CHRONOEDIT"]

CHRONOEDIT = replace(
    WAN,
    name="chronoedit",
    title="ChronoEdit",
    transformers=("ChronoEditTransformer3DModel",),
    checkpoints=("nvidia/ChronoEdit-14B-Diffusers",),
    recipes=(),
)
