"""Wan Animate: the transformer of Wan, with pose and face given to it beside its own attention."""

from __future__ import annotations

from dataclasses import replace

from svg_models.families.wan import SHARING, WAN

__all__ = ["WAN_ANIMATE"]

WAN_ANIMATE = replace(
    WAN,
    name="wan_animate",
    title="Wan Animate",
    transformers=("WanAnimateTransformer3DModel",),
    sharing=replace(
        SHARING,
        # A frame of the face is for the tokens of one frame, wherever shares begin and end.
        whole={r"face_adapter\.\d+": ("hidden_states",)},
        outputs={**SHARING.outputs, r"face_adapter\.\d+": {0: {3: 1}}},
    ),
    usual=lambda transformer: {"height": 720, "width": 1280, "frames": 77, "fps": 30},
    checkpoints=("Wan-AI/Wan2.2-Animate-14B-Diffusers",),
    recipes=(),
)
