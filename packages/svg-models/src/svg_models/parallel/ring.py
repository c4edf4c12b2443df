"""Ring attention: ranks keep their queries and pass keys and values on."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from svg_attention import Dense, TokenLayout
from svg_attention.ring import attend_in_ring
from svg_models.parallel.share import Share

__all__ = ["dense_in_ring"]


def dense_in_ring(
    share: Share,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text_position: Literal["first", "last"] | None,
    text_counts: tuple[int, ...] | None,
) -> Tensor:
    """Compute dense attention over what the ranks of a ring hold.

    Args:
        share: what this rank holds of the sequence.
        query: `[B, S, H, D]`, the video tokens that are here, and all of the text if there is any.
        key: as `query`.
        value: as `query`.
        text_position: where the text stands; None if there is none.
        text_counts: valid text tokens of each sample; None for all.

    Returns:
        As `query`, contiguous.
    """
    if share.ring is None:
        raise ValueError("the ranks of this share pass nothing on")
    text = query.shape[1] - share.ring.shares(share.tokens)[share.ring.rank]
    lengths = None
    if text_counts is not None:
        lengths = torch.tensor(text_counts, device=query.device)
    found = attend_in_ring(
        Dense(),
        *(x.transpose(1, 2) for x in (query, key, value)),
        ring=share.ring,
        layout=TokenLayout(
            grid=(1, 1, share.tokens), text_tokens=text, text_position=text_position or "last"
        ),
        text_lengths=lengths,
    )
    return found.out.transpose(1, 2).contiguous()
