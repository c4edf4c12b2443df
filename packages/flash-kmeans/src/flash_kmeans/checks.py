"""Checks of arguments, shared by every public function."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

Metric = Literal["euclidean", "cosine", "dot"]
Empty = Literal["keep", "farthest"]
Backend = Literal["auto", "reference", "triton"]

POINT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def choice(name: str, value: object, allowed: object) -> None:
    """Raise ValueError unless `value` is one of the strings of the Literal `allowed`."""
    options = get_args(allowed)
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")


def integer(name: str, value: Any, least: int | None = None) -> int:
    """Return an integer of at least `least`, if given; NumPy's are taken, bools are not.

    Raises:
        TypeError: if `value` is no integer.
        ValueError: if it is below `least`.
    """
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"{name} must be an integer, got {value!r} ({kind})") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def real(name: str, value: Any, least: float) -> float:
    """Return a finite number of at least `least` as a float; bools and strings are not taken.

    Raises:
        TypeError: if `value` is no real number.
        ValueError: if it is below `least`, NaN or infinite.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    number = float(value)
    if not least <= number < math.inf:
        raise ValueError(f"{name} must be finite and at least {least:g}, got {number}")
    return number


def flag(name: str, value: Any) -> bool:
    """Return a bool, or raise TypeError for what is none; NumPy's are taken."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return bool(value)


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


def cluster_count(n_clusters: Any, n_points: int) -> int:
    """Return `n_clusters` once it is known to lie between one and the number of points."""
    count = integer("n_clusters", n_clusters)
    if not 1 <= count <= n_points:
        raise ValueError(
            f"n_clusters must lie between 1 and the number of points ({n_points}), got {count}"
        )
    return count


def numeric(value: Any, name: str, device: torch.device) -> Tensor:
    """Return a tensor as it is, and anything array-like as a tensor of numbers on `device`.

    Raises:
        TypeError: if `value` cannot be read as an array of real numbers.
    """
    if isinstance(value, Tensor):
        tensor = value.detach()
    else:
        try:
            array = np.asarray(value)
            tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")).copy())
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise TypeError(f"{name} must be a tensor or an array of numbers, got {kind}") from None
        tensor = tensor.to(device)
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}")
    return tensor


def centroids_like(centroids: Any, x: Tensor, n_clusters: int | None, name: str) -> Tensor:
    """Return centroids as `[B, K, D]` on the device and in the dtype of `x` `[B, N, D]`.

    Anything array-like is taken; a tensor has to be on the device of `x` already.
    """
    given = numeric(centroids, name, x.device)
    batched = given.unsqueeze(0) if given.dim() == 2 else given
    k = batched.shape[1] if batched.dim() == 3 and n_clusters is None else n_clusters
    expected = (x.shape[0], k, x.shape[2])
    if tuple(batched.shape) != expected or k == 0:
        raise ValueError(f"{name} must be {list(expected)}, got shape {tuple(given.shape)}")
    if batched.device != x.device:
        raise ValueError(f"{name} is on {batched.device}, the points are on {x.device}; move one")
    return batched.to(x.dtype)


def labels_like(labels: Tensor, x: Tensor) -> Tensor:
    """Return labels as int32 `[B, N]`; their values are not read."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    batched = labels.unsqueeze(0) if labels.dim() == 1 else labels
    if tuple(batched.shape) != tuple(x.shape[:2]):
        raise ValueError(f"labels must be {list(x.shape[:2])}, got shape {tuple(labels.shape)}")
    if batched.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"labels must be int32 or int64, got {batched.dtype}")
    return batched.to(torch.int32)


def valid_labels(labels: Tensor, n_clusters: int) -> None:
    """Raise ValueError if a label lies outside `[0, n_clusters)`; synchronises on a device."""
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < 0 or high >= n_clusters:
        raise ValueError(
            f"labels must lie in [0, {n_clusters}), the number of clusters, got {low} to {high}"
        )


def weights_like(weight: Any, x: Tensor) -> Tensor | None:
    """Return weights as fp32 `[B, N]` (fp64 for fp64 points), or None; a `[N]` one is shared.

    Anything array-like is taken; a tensor has to be on the device of `x` already. Values are not
    read, see `valid_weights`.
    """
    if weight is None:
        return None
    given = numeric(weight, "sample_weight", x.device)
    if tuple(given.shape) not in (tuple(x.shape[1:2]), tuple(x.shape[:2])):
        raise ValueError(
            f"sample_weight must be [{x.shape[1]}] or {list(x.shape[:2])}, "
            f"got shape {tuple(given.shape)}"
        )
    if given.device != x.device:
        raise ValueError(f"sample_weight is on {given.device}, the points are on {x.device}")
    return given.to(weight_dtype(x)).expand(x.shape[:2]).contiguous()


def weight_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the weights of points: fp64 for fp64 points, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def valid_weights(weight: Tensor) -> None:
    """Raise ValueError if a weight is negative, NaN or infinite; synchronises on a device."""
    bad = ~((weight >= 0) & torch.isfinite(weight))
    if bool(bad.any()):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"sample_weight must hold finite weights of at least 0, and in {dtype} it holds "
            f"{float(weight[bad][0])}"
        )


def finite(x: Tensor, name: str = "x") -> None:
    """Raise ValueError if `x` holds NaN or infinity; synchronises on a device."""
    low, high = torch.aminmax(x)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError(f"{name} must be finite, but it holds NaN or infinity; clean it first")
