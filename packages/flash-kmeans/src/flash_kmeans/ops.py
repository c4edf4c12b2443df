"""Operators registered with torch, so that `torch.compile` and CUDA graphs see whole calls.

Each operator dispatches on a backend's name. The fakes describe outputs without touching data.
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


def _module(name: str) -> ModuleType:
    if name == "reference":
        return reference
    from .triton import launch

    return launch


def _assign(x: Tensor, centroids: Tensor, metric: str, backend: str, tf32: bool) -> Tensor:
    if backend == "reference":
        return reference.assign(x, centroids, metric)  # type: ignore[arg-type]
    return _module(backend).assign(x, centroids, metric, tf32=tf32)  # type: ignore[no-any-return]


def accumulate(
    x: Tensor, labels: Tensor, previous: Tensor, metric: str, scaled: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums `[B, K, D]`, total weights `[B, K]` and sizes `[B, K]` per cluster."""
    return _module(backend).accumulate(x, labels, previous, metric, scaled)  # type: ignore[no-any-return]


def _update(
    x: Tensor, labels: Tensor, previous: Tensor, weight: Tensor | None, metric: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    scaled = common.point_weights(x, metric, weight)
    return _module(backend).update(x, labels, previous, metric, scaled)  # type: ignore[no-any-return]


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
    scaled = common.point_weights(x, metric, weight)
    if backend == "reference":
        return reference.lloyd(x, centroids, weight, scaled, metric, empty, rounds)  # type: ignore[arg-type]
    return _module(backend).lloyd(x, centroids, weight, scaled, metric, empty, rounds, tf32)  # type: ignore[no-any-return]


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
