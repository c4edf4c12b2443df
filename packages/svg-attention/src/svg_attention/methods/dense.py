"""Every query reads every key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svg_attention.layout import TokenLayout
from svg_attention.memory import LayerMemory
from svg_attention.methods.base import MethodConfig, check_call, token_order, valid_tokens
from svg_attention.plan import SparsePlan


@dataclass(frozen=True, kw_only=True)
class Dense(MethodConfig):
    """Compute every pair: the baseline, and what warm-up steps run."""

    def plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: TokenLayout,
        memory: LayerMemory,
        text_lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
        scale: float | None = None,
    ) -> SparsePlan:
        """Return the full plan; see `Method.plan`."""
        check_call(query, key, value, layout, text_lengths)
        batch, heads, tokens, _ = query.shape
        lengths = valid_tokens(layout, text_lengths, batch, query)
        padded = lengths is not None
        return SparsePlan.full(
            batch,
            heads,
            tokens,
            tokens,
            query_order=token_order(layout, None, query) if padded else None,
            key_order=token_order(layout, None, key) if padded else None,
            query_lengths=lengths,
            key_lengths=lengths,
            device=query.device,
        )
