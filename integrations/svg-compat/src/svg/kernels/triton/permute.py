"""Rows in the order of their clusters, and back."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_inverse_permutation_triton", "permute_tensor_by_labels_triton"]


def permute_tensor_by_labels_triton(
    tensor: Tensor, labels: Tensor | None, dim: int = 2, *, sorted_indices: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the rows of each head cluster by cluster, and which row went where.

    Args:
        tensor: `[B, H, S, D]`.
        labels: integers `[B * H, S]`; None where the order is given.
        dim: 2, the dimension of the rows.
        sorted_indices: int64 `[B * H, S]`, the order, where it is known.

    Raises:
        ValueError: if `dim` is another, or neither labels nor order are given.
    """
    if dim % tensor.ndim != 2 or tensor.ndim != 4:
        raise ValueError(f"expected rows in dimension 2 of [B, H, S, D], got dim={dim}")
    if sorted_indices is None:
        if labels is None:
            raise ValueError("either labels or sorted_indices must be given")
        sorted_indices = labels.reshape(-1, tensor.shape[2]).argsort(dim=1, stable=True)
    return tensor.gather(2, _rows(sorted_indices, tensor)), sorted_indices


def apply_inverse_permutation_triton(
    permuted_tensor: Tensor, sorted_indices: Tensor, dim: int = 2
) -> Tensor:
    """Return rows in the order that they had before `permute_tensor_by_labels_triton`.

    Args:
        permuted_tensor: `[B, H, S, D]`.
        sorted_indices: integers `[B * H, S]`.
        dim: 2, the dimension of the rows.

    Raises:
        ValueError: if `dim` is another.
    """
    if dim % permuted_tensor.ndim != 2 or permuted_tensor.ndim != 4:
        raise ValueError(f"expected rows in dimension 2 of [B, H, S, D], got dim={dim}")
    rows = _rows(sorted_indices, permuted_tensor)
    return torch.empty_like(permuted_tensor).scatter_(2, rows, permuted_tensor)


def _rows(order: Tensor, tensor: Tensor) -> Tensor:
    """Return an order of the rows of each head as `gather` takes it."""
    return order.long().view(*tensor.shape[:3], 1).expand_as(tensor)
