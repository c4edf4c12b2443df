"""Time a denoising loop step by step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from svg_models.loading import LoadedPipeline, Progress

__all__ = ["StepTimer"]


class StepTimer:
    """Time the denoising loop from its first forward pass to the end of its last step."""

    def __init__(
        self, loaded: LoadedPipeline, steps: int, progress: Progress, *, exact: bool
    ) -> None:
        self._loaded, self._steps, self._progress = loaded, steps, progress
        self._exact = exact
        self._times: list[float] = []
        self._hooks: list[Any] = []
        self._scheduler = loaded.pipe.scheduler

    def __enter__(self) -> StepTimer:
        for name in ("transformer", "transformer_2"):
            network = getattr(self._loaded.pipe, name, None)
            if network is not None:
                self._hooks.append(network.register_forward_pre_hook(self._begin))
        # Not every pipeline calls back after a step, but each calls its scheduler.
        self._scheduler.step = self._counting(self._scheduler.step)
        self._progress("reading the prompt", 0, 0)
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        del self._scheduler.step  # the class's own is there again

    @property
    def seconds(self) -> float:
        """Time of the loop."""
        return self._times[-1] - self._times[0] if self._times else 0.0

    @property
    def step_seconds(self) -> tuple[float, ...]:
        """Time of each step."""
        pairs = zip(self._times, self._times[1:], strict=False)
        return tuple(later - earlier for earlier, later in pairs)

    @property
    def last(self) -> float:
        """When the last step ended."""
        return self._times[-1] if self._times else time.perf_counter()

    def now(self) -> float:
        """Return the time once the device has finished what it was given."""
        if self._loaded.device.startswith("cuda"):
            torch.cuda.synchronize(self._loaded.device)
        return time.perf_counter()

    def _begin(self, *_: object) -> None:
        if not self._times:
            self._times.append(self.now())
            self._progress("sampling", 0, self._steps)

    def _counting(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def counted(*arguments: Any, **options: Any) -> Any:
            result = step(*arguments, **options)
            self._step_done()
            return result

        return counted

    def _step_done(self) -> None:
        count = len(self._times)  # the first is when the loop began
        done = count >= self._steps
        self._times.append(self.now() if done or self._exact else time.perf_counter())
        self._progress("sampling", count, self._steps)
        if done:
            self._progress("decoding", 0, 0)
