"""How long one whole call of a method takes at Wan 720p: plan and attention, in a CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from _harness import interleave, summary
from _quality_cases import build, calls_alike, probe_density
from _sparse_calls import capture
from _sparse_workloads import WORKLOADS, dense, structured
from torch import Tensor

from svg_attention import SVG2, LayerMemory, Method, TokenLayout, sparse_attention

WAN = WORKLOADS[0]
SAMPLES = 5


class Times:
    """Time calls of methods on one set of tensors, drawn when the first is asked for.

    Args:
        device: "cuda" times Wan 720p; a CPU a few tokens, to try the script.
    """

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")
        self.layout = WAN.layout if self._on_gpu else TokenLayout(grid=(4, 8, 12))
        self._tensors: Sequence[Tensor] = ()

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Return query, key and value."""
        if not self._tensors:
            shape = (1, 2, self.layout.tokens, 64)
            drawn = structured(WAN) if self._on_gpu else tuple(torch.randn(3, *shape))
            self._tensors = drawn
        return self._tensors

    def call(self, name: str, density: float) -> dict[str, Any]:
        """Return what a call of a later step takes, in ms, and the density it came to.

        Where calls read alike, it is the mean of the one that chooses and those that follow.
        """
        method = build(name, density, self.layout.tokens)
        memory, query, key, value = LayerMemory(), *self.tensors
        for _ in range(2):
            memory.choice = None
            plan = method.plan(query, key, value, layout=self.layout, memory=memory)
        result = {
            "method": name,
            "density": density,
            "realised_density": round(float(plan.density().mean()), 4),
            "probe_density": round(probe_density(method, self.layout), 4),
        }
        del plan
        count = calls_alike(method)
        times = self._time(lambda: self._calls(method, memory, count))
        return {**result, **{name: round(value / count, 3) for name, value in times.items()}}

    def dense(self) -> dict[str, Any]:
        """Return what a dense call takes, in ms."""
        return {"method": "dense", "density": 1.0, **self._time(lambda: self._dense())}

    def _dense(self) -> Tensor:
        if self._on_gpu:
            return dense(*self.tensors)
        query, key, value = self.tensors
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    def _calls(self, method: Method, memory: LayerMemory, count: int) -> Tensor:
        """Compute a call that chooses, and those that follow it."""
        query, key, value = self.tensors
        # A copy, so that every first call starts from the same centroids.
        first, leader = replace(memory, choice=None), None
        for _ in range(count):
            mine = LayerMemory() if leader is not None else first
            plan = method.plan(
                query, key, value, layout=self.layout, memory=mine, leader=leader
            )  # fmt: skip
            out = sparse_attention(query, key, value, plan)
            leader = first if isinstance(method, SVG2) and method.share_branches else None
        return out

    def _time(self, function: Callable[[], Tensor]) -> dict[str, float]:
        if self._on_gpu:
            graph, _ = capture(function)
            times = interleave({"call": graph.replay}, samples=SAMPLES, warmup=1)["call"]
            del graph
            torch.cuda.empty_cache()
        else:
            times = [_seconds(function) * 1e3 for _ in range(SAMPLES)]
        return {name: round(value, 3) for name, value in summary(times).items()}


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def milliseconds(times: Sequence[dict[str, Any]], name: str, density: float) -> float | None:
    """Return the time of a call at a density, on the line through the two nearest measured ones.

    None where fewer than two were measured.
    """
    points = {
        row["realised_density"]: row["median"]
        for row in times
        if row["method"] == name and "realised_density" in row
    }
    if len(points) < 2:
        return None
    near = sorted(points.items(), key=lambda point: abs(point[0] - density))[:2]
    slope, intercept = statistics.linear_regression(*zip(*near, strict=True))
    return intercept + slope * density
