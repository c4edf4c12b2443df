"""What the estimator accepts, and the words in which it declines, as scikit-learn expects them."""

from __future__ import annotations

import importlib
import importlib.util
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks
from .checks import POINT_DTYPES, finite


class NotFittedError(ValueError, AttributeError):
    """Report that an estimator was used before `fit`."""


class ConvergenceWarning(UserWarning):
    """Warn that a clustering is not what was asked for."""


def sklearn_class(own: type) -> Any:
    """Return scikit-learn's exception of that name where it is installed, else our own.

    It is looked up when needed: importing scikit-learn takes longer than importing this package.
    """
    if importlib.util.find_spec("sklearn") is None:
        return own
    return getattr(importlib.import_module("sklearn.exceptions"), own.__name__)


def as_points(X: Any, *, name: str, width: int | None, device: str | torch.device | None) -> Tensor:
    """Return `[N, D]` floating-point points on `device` (where they are, if it is None).

    Args:
        X: what a user passed as points.
        name: of the estimator, for messages.
        width: of the points that it was fitted on, or None while it is being fitted.
        device: where the estimator computes.

    Raises:
        TypeError: if the points are sparse or not numbers.
        ValueError: if they are complex, not two-dimensional, empty, not finite, or of a width
            other than that of `fit`.
    """
    points = X if isinstance(X, Tensor) else _from_array(X)
    if points.dim() != 2:
        raise ValueError(
            f"Expected 2D array, got {points.dim()}D array instead. Reshape your data either using "
            "array.reshape(-1, 1) if your data has a single feature or array.reshape(1, -1) if it "
            "contains a single sample."
        )
    rows, features = points.shape
    if rows == 0 or features == 0:
        what = "sample" if rows == 0 else "feature"
        raise ValueError(
            f"Found array with 0 {what}(s) (shape={tuple(points.shape)}) while a minimum of 1 is "
            f"required by {name}."
        )
    if width is not None and features != width:
        raise ValueError(
            f"X has {features} features, but {name} is expecting {width} features as input"
        )
    if points.dtype not in POINT_DTYPES:
        points = points.to(torch.float64)
    points = points.to(device) if device is not None else points
    try:
        finite(points)
    except ValueError:
        raise ValueError(
            f"Input X contains NaN or infinity, which {name} does not accept"
        ) from None
    return points


def _from_array(X: Any) -> Tensor:
    if hasattr(X, "tocsr"):
        raise TypeError("Sparse data was passed, but dense data is required; use X.toarray()")
    array = np.asarray(X)
    if array.dtype.kind == "c":
        raise ValueError("Complex data not supported")
    if array.dtype.kind not in "fiub":
        array = array.astype(np.float64)
    if array.dtype not in (np.float16, np.float32, np.float64):
        array = array.astype(np.float64)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def as_weights(weight: Any, points: Tensor) -> Tensor | None:
    """Return `[N]` weights in the dtype of the sums' weights, on the device of the points, or None.

    Raises:
        TypeError: if the weights are not numbers.
        ValueError: if they are not `[N]`, negative, NaN, infinite or all zero.
    """
    if weight is None:
        return None
    if isinstance(weight, numbers.Real):
        weight = np.full(points.shape[0], float(weight))
    values = checks.numeric(weight, "sample_weight", points.device)
    if values.dim() != 1:
        raise ValueError("Sample weights must be 1D array or scalar")
    if values.shape[0] != points.shape[0]:
        raise ValueError(
            f"sample_weight.shape == {tuple(values.shape)}, expected {(points.shape[0],)}!"
        )
    values = values.to(points.device, checks.weight_dtype(points))
    if bool((values < 0).any()):
        raise ValueError("Negative values in data passed to `sample_weight`")
    checks.valid_weights(values)
    if not bool((values > 0).any()):
        raise ValueError("Every sample weight is zero; at least one must be positive")
    return values


def random_state(state: Any) -> torch.Generator:
    """Return a torch generator made from whatever scikit-learn takes as a random state.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(state, torch.Generator):
        return state
    if state is None:
        seed = int(torch.randint(2**31, (1,)).item())
    elif isinstance(state, np.random.RandomState):
        seed = int(state.randint(2**31 - 1))
    elif isinstance(state, np.random.Generator):
        seed = int(state.integers(2**31))
    else:
        seed = checks.integer("random_state", state, 0)
    return torch.Generator(device="cpu").manual_seed(seed % 2**63)


__all__ = [
    "ConvergenceWarning",
    "NotFittedError",
    "as_points",
    "as_weights",
    "sklearn_class",
    "random_state",
]
