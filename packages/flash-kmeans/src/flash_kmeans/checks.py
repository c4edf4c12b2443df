"""Checks of arguments, shared by every public function."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Metric = Literal["euclidean", "cosine", "dot"]
Empty = Literal["keep", "farthest"]
Backend = Literal["auto", "reference", "triton"]

POINT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def choice(name: str, value: str, allowed: object) -> None:
    """Raise ValueError unless `value` is one of the strings of the Literal `allowed`."""
    options = get_args(allowed)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")


def points(x: Tensor, name: str = "x") -> Tensor:
    """Return points as `[B, N, D]`; `[N, D]` gains a batch axis of one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in POINT_DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; convert it first"
        )
    if x.dim() not in (2, 3):
        raise ValueError(f"{name} must be [N, D] or [B, N, D], got shape {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    return x.unsqueeze(0) if x.dim() == 2 else x


def cluster_count(n_clusters: int, n_points: int) -> int:
    """Return `n_clusters` once it is known to lie between one and the number of points."""
    if isinstance(n_clusters, bool) or not isinstance(n_clusters, int):
        raise TypeError(f"n_clusters must be an int, got {type(n_clusters).__name__}")
    if not 1 <= n_clusters <= n_points:
        raise ValueError(
            f"n_clusters must lie between 1 and the number of points ({n_points}), got {n_clusters}"
        )
    return n_clusters


def centroids_like(centroids: Tensor, x: Tensor, n_clusters: int | None, name: str) -> Tensor:
    """Return centroids as `[B, K, D]` on the device and in the dtype of `x` `[B, N, D]`."""
    if not isinstance(centroids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(centroids).__name__}")
    batched = centroids.unsqueeze(0) if centroids.dim() == 2 else centroids
    k = batched.shape[1] if batched.dim() == 3 and n_clusters is None else n_clusters
    expected = (x.shape[0], k, x.shape[2])
    if tuple(batched.shape) != expected or k == 0:
        raise ValueError(f"{name} must be {list(expected)}, got shape {tuple(centroids.shape)}")
    if batched.device != x.device:
        raise ValueError(f"{name} is on {batched.device}, the points are on {x.device}; move one")
    return batched.to(x.dtype)


def labels_like(labels: Tensor, x: Tensor) -> Tensor:
    """Return labels as int32 `[B, N]`; their values are not read."""
    batched = labels.unsqueeze(0) if labels.dim() == 1 else labels
    if tuple(batched.shape) != tuple(x.shape[:2]):
        raise ValueError(f"labels must be {list(x.shape[:2])}, got shape {tuple(labels.shape)}")
    if batched.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"labels must be int32 or int64, got {batched.dtype}")
    return batched.to(torch.int32)


def weights_like(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """Return weights as fp32 `[B, N]` (fp64 for fp64 points), or None; a `[N]` one is shared."""
    if weight is None:
        return None
    if tuple(weight.shape) not in (tuple(x.shape[1:2]), tuple(x.shape[:2])):
        raise ValueError(
            f"sample_weight must be [{x.shape[1]}] or {list(x.shape[:2])}, "
            f"got shape {tuple(weight.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"sample_weight is on {weight.device}, the points are on {x.device}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return weight.to(dtype).expand(x.shape[:2]).contiguous()


def valid_weights(weight: Tensor) -> None:
    """Raise ValueError if a weight is negative, NaN or infinite; synchronises on a device."""
    bad = ~((weight >= 0) & torch.isfinite(weight))
    if bool(bad.any()):
        raise ValueError(
            f"sample_weight must hold finite weights of at least 0 (in {weight.dtype}), "
            f"but it holds {float(weight[bad][0])}"
        )


def finite(x: Tensor, name: str = "x") -> None:
    """Raise ValueError if `x` holds NaN or infinity; synchronises on a device."""
    low, high = torch.aminmax(x)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError(f"{name} must be finite, but it holds NaN or infinity; clean it first")
