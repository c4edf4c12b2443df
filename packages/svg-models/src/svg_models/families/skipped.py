"""Video transformers that are left as they are, and why."""

from __future__ import annotations

__all__ = ["SKIPPED"]

_HISTORY = (
    "its sequence begins with a packed history of earlier frames, so its tokens do not form a grid "
    "of frames, rows and columns"
)
_SOUND = "it denoises sound and video together, with attention between the two"

SKIPPED: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": (
        "its attention is causal: a frame reads only earlier ones, through a cache or a block mask"
    ),
    "Cosmos3OmniTransformer": (
        "it packs causal text, images, sound and video into one sequence, so its tokens do not "
        "form a grid of frames, rows and columns"
    ),
    "HeliosTransformer3DModel": _HISTORY,
    "Kandinsky5Transformer3DModel": (
        "it has its own sparse attention, NABLA, with which its checkpoints for long clips were "
        "trained"
    ),
    "Kandinsky6SRTransformer3DModel": (
        "it has its own sparse attention, NABLA, with which it was trained"
    ),
    "Kandinsky6Transformer3DModel": _SOUND,
    "MiniMaxH3Transformer3DModel": _SOUND,
    "SanaVideoTransformer3DModel": (
        "its self-attention is linear in the number of tokens, so there are no blocks to skip"
    ),
    "SanaWMTransformer3DModel": (
        "most of its self-attention is a recurrence over the tokens, so there are no blocks to skip"
    ),
    "WanAnimate2Transformer3DModel": (
        "it has its own sparse attention: a block mask lets each frame read only the reference "
        "tokens of that frame"
    ),
}
"""Class name of a transformer -> the reason, in a sentence that follows on "it stays dense:"."""
