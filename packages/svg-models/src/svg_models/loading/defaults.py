"""What a model generates when nothing else is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Defaults", "defaults_for"]


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a model generates when nothing else is said.

    Args:
        prompt: a prompt that shows the model at work.
        negative_prompt: what guidance steers away from; `None` leaves it to the pipeline.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        height: pixels.
        width: pixels.
        frames: video frames.
        fps: frames a second when written to a file.
        max_sequence_length: text tokens the pipeline pads to; `None` leaves it to the pipeline.
    """

    prompt: str = "A red fox runs through fresh snow, camera moving alongside, golden light"
    negative_prompt: str | None = None
    steps: int = 50
    guidance: float = 5.0
    height: int = 480
    width: int = 832
    frames: int = 81
    fps: int = 16
    max_sequence_length: int | None = None


def defaults_for(name: str, pipe: Any) -> Defaults:
    """Return what a model generates when nothing else is said.

    Args:
        name: "embedded" for the embedded model.
        pipe: the pipeline; its class decides for the others.
    """
    known = {
        "WanPipeline": Defaults(),
        "HunyuanVideoPipeline": Defaults(guidance=6.0, height=720, width=1280, frames=129, fps=24),
        "CogVideoXPipeline": Defaults(guidance=6.0, height=480, width=720, frames=49, fps=8),
        "CosmosTextToWorldPipeline": Defaults(
            steps=36, guidance=7.0, height=704, width=1280, frames=121, fps=30
        ),
    }
    defaults = known.get(type(pipe).__name__, Defaults())
    if name != "embedded":
        return defaults
    from svg_models.embedded.evaluate import GUIDANCE, SHEET_PROMPTS, STEPS

    return Defaults(
        prompt=SHEET_PROMPTS[0],
        steps=STEPS,
        guidance=GUIDANCE,
        height=128,
        width=128,
        frames=49,
    )
