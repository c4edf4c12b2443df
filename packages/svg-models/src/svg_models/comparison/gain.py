"""Find the size of clip at which sparse attention begins to pay on this machine."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from svg_attention import Call, Dense, Method, Schedule, Session, TokenLayout
from svg_models.comparison.candidate import Candidate
from svg_models.families import TRANSFORMERS
from svg_models.loading import LoadedPipeline
from svg_models.recipes import choose_recipe

__all__ = ["WORTH", "Cost", "first_gain", "gains_from"]

WORTH = 1.1
"""A speed-up that is worth a sparse step."""
MOST_SECONDS = 4.0
"""The longest dense call that is tried."""
LARGEST = 64.0
"""Times the clip's tokens up to which a cost is extrapolated."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of one attention call, `square * tokens^2 + linear * tokens`."""

    square: float
    linear: float

    @classmethod
    def through(cls, small: tuple[int, float], large: tuple[int, float]) -> Cost:
        """Return the cost that two calls show, each given as tokens and seconds."""
        (n, short), (m, long) = small, large
        square = max(0.0, (long / m - short / n) / (m - n))
        return cls(square=square, linear=max(0.0, short / n - square * n))

    def __call__(self, tokens: float) -> float:
        """Return the seconds of a call."""
        return self.square * tokens**2 + self.linear * tokens


def first_gain(
    tokens: int, *, outside: float, calls: int, dense: Cost, sparse: Cost
) -> tuple[int, float] | None:
    """Return the fewest tokens at which a sparse step is `WORTH` it, and its speed-up there.

    Args:
        tokens: of the clip that was measured.
        outside: seconds of a step outside attention, in proportion to the tokens.
        calls: attention calls of a step.
        dense: cost of a dense call.
        sparse: cost of a sparse call, planning included.

    Returns:
        Nothing if no clip of up to `LARGEST` times the tokens is.
    """
    factor = 1.0
    while factor <= LARGEST:
        n = tokens * factor
        rest = outside * factor
        speedup = (rest + calls * dense(n)) / (rest + calls * sparse(n))
        if speedup >= WORTH:
            return round(n), speedup
        factor *= 1.05
    return None


def gains_from(loaded: LoadedPipeline, candidate: Candidate) -> str:
    """Say at which size a method would gain, from calls on random tokens of two sizes.

    Args:
        loaded: the model.
        candidate: with a speed; its clip is too short to gain.
    """
    clip, speed = candidate.clip, candidate.speed
    grid = clip.stats.grid
    if speed is None or grid is None:
        return ""
    calls = sum(record.step == clip.paired_steps[0].step for record in clip.stats.records)
    before = speed.dense_attention / max(calls, 1)
    larger = next(
        (g for g, times in (((1, 2, 2), 4), ((1, 1, 2), 2)) if times**2 * before < MOST_SECONDS),
        None,
    )
    if larger is None:
        return ""
    grids = (grid, tuple(side * times for side, times in zip(grid, larger, strict=True)))
    density = clip.stats.mean_density
    counts = [math.prod(g) for g in grids]
    times = [_call_seconds(loaded, g, _method(loaded, candidate, density, g)) for g in grids]
    dense, sparse = (
        Cost.through((counts[0], times[0][i]), (counts[1], times[1][i])) for i in range(2)
    )
    found = first_gain(
        counts[0],
        outside=speed.dense_step - speed.dense_attention,
        calls=calls,
        dense=dense,
        sparse=sparse,
    )
    where = f"by what attention and planning cost here at {counts[0]:,} and {counts[1]:,} tokens"
    if found is None:
        return (
            f"No clip of up to {LARGEST:.0f} times its tokens would gain on this machine, {where}."
        )
    tokens, speedup = found
    return (
        f"{clip.method.title} would make a sparse step {speedup:.1f}x faster from about "
        f"{_rounded(tokens):,} tokens on{_pixels(loaded, candidate, tokens)}, {where}."
    )


def _method(
    loaded: LoadedPipeline, candidate: Candidate, density: float, grid: tuple[int, ...]
) -> Method:
    """Return the method as the recipe would set it for a clip of this size, at one density."""
    method: Any = choose_recipe(candidate.clip.method, loaded.pipe, math.prod(grid)).method
    if hasattr(method, "density") and method.density is None:
        return dataclasses.replace(method, density=density)
    return method  # type: ignore[no-any-return]


def _call_seconds(
    loaded: LoadedPipeline, grid: tuple[int, ...], method: Method
) -> tuple[float, float]:
    """Return the seconds of a dense call and of a sparse one that remembers the step before."""
    network = next(
        n for n in (getattr(loaded.pipe, t, None) for t in TRANSFORMERS) if n is not None
    )
    heads, head_dim = network.config.num_attention_heads, network.config.attention_head_dim
    layout = TokenLayout(grid=grid)  # type: ignore[arg-type]
    source = torch.Generator(device=loaded.device).manual_seed(0)
    shape = (1, heads, layout.tokens, head_dim)
    query, key, value = (
        torch.randn(shape, generator=source, device=loaded.device, dtype=loaded.dtype)
        for _ in range(3)
    )
    nothing_dense = Schedule(dense_steps=0, dense_layers=0)

    def timed(method: Method, repeats: int) -> float:
        session = Session(method, nothing_dense, layout=layout, profile=True)
        for step in range(repeats):
            call = Call(step=step, num_steps=repeats, layer=0, num_layers=1)
            session.attend(query, key, value, call=call)
        return statistics.median(r.seconds or 0.0 for r in session.records()[1:])

    with torch.inference_mode():
        return timed(Dense(), 3), timed(method, 4)


def _pixels(loaded: LoadedPipeline, candidate: Candidate, tokens: int) -> str:
    """Return ", such as 256 x 256 pixels", where the model takes more than one size."""
    geometry, settings = loaded.geometry, candidate.clip.settings
    if geometry.only is not None:
        return ""
    scale = math.sqrt(tokens / candidate.clip.stats.tokens)
    size = {"height": settings.height, "width": settings.width}
    while geometry.tokens(frames=settings.frames, **size) < tokens:
        size = geometry.nearest_size(height=settings.height * scale, width=settings.width * scale)
        scale *= 1.02
    return f" (such as {size['width']} x {size['height']} pixels at {settings.frames} frames)"


def _rounded(tokens: int) -> int:
    """Round to two digits, since more would say more than is known."""
    digits = max(0, len(str(tokens)) - 2)
    return round(tokens, -digits)
