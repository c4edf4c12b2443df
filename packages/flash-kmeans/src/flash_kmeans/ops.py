"""Operators registered with torch, so that `torch.compile` and CUDA graphs see whole calls.

Each operator dispatches on a backend's name. The fakes describe outputs without touching data.
Values are checked in here, where a graph does not see it. On a CPU what is wrong raises; on a
device looking would synchronise, so a wrong weight becomes NaN there, and shows as a NaN inertia.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import checks, common, reference

_LIBRARY = torch.library.Library("flash_kmeans", "DEF")
_LIBRARY.define("assign(Tensor x, Tensor centroids, str metric, str backend, bool tf32) -> Tensor")
_LIBRARY.define(
    "update(Tensor x, Tensor labels, Tensor previous, Tensor? weight, str metric, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "lloyd(Tensor x, Tensor centroids, Tensor? weight, str metric, str empty, int rounds,"
    " str backend, bool tf32) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _module(backend: str) -> ModuleType:
    if backend == "reference":
        return reference
    from .triton import launch

    return launch


def _valid(weight: Tensor | None) -> Tensor | None:
    if weight is None:
        return None
    if weight.device.type == "cpu":
        checks.valid_weights(weight)
        return weight
    return torch.where((weight >= 0) & torch.isfinite(weight), weight, torch.nan)


def _assign(x: Tensor, centroids: Tensor, metric: str, backend: str, tf32: bool) -> Tensor:
    return _module(backend).assign(x, centroids, metric, tf32=tf32)  # type: ignore[no-any-return]


def accumulate(
    x: Tensor,
    labels: Tensor,
    n_clusters: int,
    scale: Tensor | None,
    weight: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums `[B, K, D]`, total weights `[B, K]` and sizes `[B, K]` per cluster."""
    return _module(backend).accumulate(x, labels, n_clusters, scale, weight)  # type: ignore[no-any-return]


def _update(
    x: Tensor, labels: Tensor, previous: Tensor, weight: Tensor | None, metric: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if x.device.type == "cpu":
        checks.valid_labels(labels, previous.shape[1])
    return _module(backend).update(x, labels, previous, metric, _valid(weight))  # type: ignore[no-any-return]


def _lloyd(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None,
    metric: str,
    empty: str,
    rounds: int,
    backend: str,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if x.device.type == "cpu":
        checks.finite(x)
        checks.finite(centroids, "init")
    arguments = (x, centroids, _valid(weight), metric, empty, rounds, tf32)
    return _module(backend).lloyd(*arguments)  # type: ignore[no-any-return]


def _assign_fake(x: Tensor, centroids: Tensor, metric: str, backend: str, tf32: bool) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.int32)


def _update_fake(
    x: Tensor, labels: Tensor, previous: Tensor, weight: Tensor | None, metric: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = x.new_empty(previous.shape[:2], dtype=torch.int32)
    return x.new_empty(previous.shape), sizes, x.new_empty(x.shape[:2], dtype=torch.int32)


def _lloyd_fake(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None,
    metric: str,
    empty: str,
    rounds: int,
    backend: str,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    labels = _assign_fake(x, centroids, metric, backend, tf32)
    means, sizes, order = _update_fake(x, labels, centroids, weight, metric, backend)
    return labels, means, sizes, order, x.new_empty(x.shape[0], dtype=common.compute_dtype(x))


for _name, _run, _fake in (
    ("assign", _assign, _assign_fake),
    ("update", _update, _update_fake),
    ("lloyd", _lloyd, _lloyd_fake),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_kmeans::{_name}", _fake, lib=_LIBRARY)

assign = torch.ops.flash_kmeans.assign.default
update = torch.ops.flash_kmeans.update.default
lloyd = torch.ops.flash_kmeans.lloyd.default
