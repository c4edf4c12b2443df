"""Which denoising step, guidance branch and token grid a forward pass of a transformer belongs to.

Everything here runs once per forward pass, never once per layer, and outside of compiled code.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["ForwardContext", "Moment"]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where in a generation a forward pass stands.

    Attributes:
        step: denoising step from 0, over all transformers of the pipeline; None if unknown.
        num_steps: denoising steps of this generation; None if unknown.
        branch: guidance branch, for example `"cond"`, `"uncond"`, `"cond_uncond"`.
        source: what told the step: `"cache_context"`, `"scheduler"`, `"pipeline timestep"`,
            `"timestep"` or `"unknown"`.
        new_video: True on the first forward pass of a generation.
    """

    step: int | None
    num_steps: int | None
    branch: str
    source: str
    new_video: bool


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """One forward pass of one transformer.

    Attributes:
        moment: step and guidance branch.
        grid: latent frames, rows and columns of tokens after patching.
        text_lengths: valid text tokens of each sample, integers `[B]` on the model's device; None
            if all count or there are none.
        text_counts: the same numbers on the host.
        before: tokens of conditions in front of a clip that has text behind it.
    """

    moment: Moment
    grid: tuple[int, int, int]
    text_lengths: Tensor | None = None
    text_counts: tuple[int, ...] | None = None
    before: int = 0
