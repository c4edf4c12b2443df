"""Time a denoising loop step by step."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from svg_models.families import TRANSFORMERS
from svg_models.loading import LoadedPipeline, Progress
from svg_models.stand_in import standing_in

__all__ = ["StepTimer"]


class StepTimer:
    """Time the denoising loop from its first forward pass to the end of its last step."""

    def __init__(
        self, loaded: LoadedPipeline, steps: int, progress: Progress, *, exact: bool
    ) -> None:
        self._loaded, self._steps, self._progress = loaded, steps, progress
        self._exact = exact
        self._times: list[float] = []
        self._left_out = 0.0
        self._undo = ExitStack()
        # A scheduler of second order is called twice a step, but once in the last.
        self._order = max(1, int(getattr(loaded.pipe.scheduler, "order", 1)))
        self._calls, self._all_calls = 0, self._order * (steps - 1) + 1

    def __enter__(self) -> StepTimer:
        with ExitStack() as undo:  # whatever interrupts this is not left with half of it
            for name in TRANSFORMERS:
                network = getattr(self._loaded.pipe, name, None)
                if network is not None:
                    undo.callback(network.register_forward_pre_hook(self._begin).remove)
            # Not every pipeline calls back after a step, but each calls its scheduler.
            scheduler = self._loaded.pipe.scheduler
            undo.enter_context(standing_in(scheduler, "step", self._counting(scheduler.step)))
            self._progress("reading the prompt", 0, 0)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    @property
    def seconds(self) -> float:
        """Return the time of the loop."""
        return self._times[-1] - self._times[0] if self._times else 0.0

    @property
    def step_seconds(self) -> tuple[float, ...]:
        """Return the time of each step."""
        pairs = zip(self._times, self._times[1:], strict=False)
        return tuple(later - earlier for earlier, later in pairs)

    @property
    def last(self) -> float:
        """Return when the last step ended."""
        return self._times[-1] if self._times else self._read()

    def now(self) -> float:
        """Return the time once the device has finished what it was given."""
        if self._loaded.device.startswith("cuda"):
            torch.cuda.synchronize(self._loaded.device)
        return self._read()

    def leave_out(self, seconds: float) -> None:
        """Count some seconds, which have just passed, to no step."""
        self._left_out += seconds

    def _read(self) -> float:
        return time.perf_counter() - self._left_out

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
        self._calls += 1
        done = self._calls >= self._all_calls
        if self._calls % self._order and not done:
            return
        self._times.append(self.now() if done or self._exact else self._read())
        self._progress("sampling", len(self._times) - 1, self._steps)  # the first began the loop
        if done:
            self._progress("decoding", 0, 0)
