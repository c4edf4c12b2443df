"""The steps around attention that processors put together: project, rotate, project back."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

__all__ = [
    "project_heads",
    "project_out",
    "project_qkv",
    "rotate_pairs",
    "rotate_video",
    "split_heads",
]


def project_qkv(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project tokens to query, key and value, each `[B, S, H * D]`, by one or three layers.

    Only calls modules and reads no weights, so LoRA, quantised layers and offloading keep working.
    """
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return query, key, value
    return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)


def split_heads(states: Tensor, heads: int) -> Tensor:
    """View `[B, S, H * D]` as `[B, S, H, D]`."""
    return states.unflatten(2, (heads, -1))


def project_heads(attn: Any, *streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project tokens to query, key and value, `[B, S, H, D]`, and normalise the first two by head.

    For attentions whose norms take one head at a time, of whatever kind these are.

    Args:
        attn: the attention module.
        *streams: one or more `[B, S_i, C]`, joined in this order.

    Returns:
        Three tensors `[B, S, H, D]`.
    """
    states = streams[0] if len(streams) == 1 else torch.cat(streams, dim=1)
    query, key, value = (split_heads(x, attn.heads) for x in project_qkv(attn, states))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value


def rotate_video(
    query: Tensor, key: Tensor, rotation: tuple[Tensor, Tensor] | None, video: slice
) -> None:
    """Rotate neighbouring channels of the video tokens in place, by diffusers' own function.

    Args:
        query: `[B, S, H, D]`.
        key: as `query`.
        rotation: cosines and sines, `[S_video, D]`; None for a model without.
        video: where the video tokens are in the sequence.
    """
    if rotation is not None:
        for states in (query, key):
            states[:, video] = apply_rotary_emb(states[:, video], rotation, sequence_dim=1)


def rotate_pairs(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels of `[B, S, H, D]` by their position's angle.

    `y[2i] = x[2i] cos - x[2i+1] sin`, `y[2i+1] = x[2i] sin + x[2i+1] cos`, multiplied in the wider
    of both dtypes and rounded once, in diffusers' order of operations, so that the bits agree.

    Args:
        states: `[B, S, H, D]`.
        cos: `[1, S, 1, D]`, each angle's value twice.
        sin: as `cos`.

    Returns:
        Tensor shaped and typed as `states`.
    """
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(states)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def project_out(attn: Any, states: Tensor) -> Tensor:
    """Join the heads of `[B, S, H, D]` and apply the output projection."""
    states = attn.to_out[0](states.flatten(2, 3))
    out: Tensor = attn.to_out[1](states)
    return out
