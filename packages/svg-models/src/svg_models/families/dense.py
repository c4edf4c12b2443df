"""Dense attention as original processors compute it, for the calls that stay dense."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

__all__ = ["DenseKernel", "dense_attention", "torch_attention"]


class DenseKernel(Protocol):
    """Dense attention exactly as the model's own processor computes it."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        backend: Any = None,
        key_lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Attend `[B, S, H, D]` to the first `key_lengths` keys of each sample."""
        ...


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    backend: Any = None,
    key_lengths: tuple[int, ...] | None = None,
) -> Tensor:
    """Compute dense attention by diffusers' dispatcher, as the original processor would.

    Padding is cut off instead of masked: the result is the same within rounding, but a mask rules
    out the fastest kernels and some original processors make one of `S` times `S`.

    Args:
        query: `[B, S, H, D]`.
        key: as `query`.
        value: as `query`.
        backend: what the user set with `set_attention_backend`, or None for the active one.
        key_lengths: only that many first keys of each sample are read; None for all.

    Returns:
        `[B, S, H, D]`.
    """
    if key_lengths is not None and len(set(key_lengths)) > 1:
        samples = [
            dense_attention(
                *(x[i : i + 1] for x in (query, key, value)), backend=backend, key_lengths=(length,)
            )
            for i, length in enumerate(key_lengths)
        ]
        return torch.cat(samples)
    if key_lengths is not None:
        key, value = key[:, : key_lengths[0]], value[:, : key_lengths[0]]
    out: Tensor = dispatch_attention_fn(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, backend=backend
    )
    return out


def torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    backend: Any = None,
    key_lengths: tuple[int, ...] | None = None,
) -> Tensor:
    """Compute dense attention by torch, for original processors that ask no dispatcher.

    Takes and returns what `dense_attention` does; `backend` is not read.
    """
    return dense_attention(query, key, value, backend="native", key_lengths=key_lengths)
