"""What a test needs to know of a tiny pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pipeline class with one kind of transformer, a few thousand parameters in all.

    Attributes:
        name: unique, for example `"wan t2v"`.
        family: name of the `Family` that covers the transformer.
        task: what `Family.task` says of it.
        build: makes the pipeline in memory, the same one each time.
        arguments: of one call of the pipeline; with guidance where the model has it, and with
            latents as output.
        grid: latent frames, rows and columns of tokens of that call.
        layers: video self-attentions by component name.
        source: what tells the step, see `svg_models.sparse.context.Moment`.
        branches: forward passes of one step, by the name of their guidance branch.
        steps: denoising steps of that call.
        text_tokens: tokens of text, padding included, and of conditions in the self-attention's
            sequence.
        dense_is_exact: whether a dense call gives the bits of the stock processor; False where the
            stock processor's kernel is replaced on purpose.
    """

    name: str
    family: str
    task: str
    build: Callable[[], Any]
    arguments: Mapping[str, Any]
    grid: tuple[int, int, int]
    layers: Mapping[str, int] = field(default_factory=lambda: {"transformer": 2})
    source: str = "cache_context"
    branches: tuple[str, ...] = ("cond", "uncond")
    steps: int = 2
    text_tokens: int = 0
    dense_is_exact: bool = True

    def run(self, pipe: Any, *, seed: int = 0, **changes: Any) -> Tensor:
        """Generate and return latents; a change to None leaves the argument out."""
        settings = {"num_inference_steps": self.steps, "output_type": "latent"}
        settings |= {**self.arguments, **changes}
        settings = {name: value for name, value in settings.items() if value is not None}
        latents = pipe(**settings, generator=torch.Generator().manual_seed(seed)).frames
        # FramePack returns a list of its sections.
        return torch.cat(latents, dim=2) if isinstance(latents, list) else latents
