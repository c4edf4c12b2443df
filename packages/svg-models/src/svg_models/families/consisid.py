"""ConsisID: the blocks of CogVideoX 1.0, between which a face is read."""

from __future__ import annotations

from dataclasses import replace

from svg_models.families.cogvideox import COGVIDEOX

__all__ = ["CONSISID"]

CONSISID = replace(
    COGVIDEOX,
    name="consisid",
    title="ConsisID",
    transformers=("ConsisIDTransformer3DModel",),
    checkpoints=("BestWishYsh/ConsisID-preview",),
    recipes=(),
)
