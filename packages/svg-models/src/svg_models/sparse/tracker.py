"""Follow the denoising steps of one generation."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from svg_models.parallel import pass_in_evaluation
from svg_models.sparse.context import Moment

__all__ = ["StepTracker"]


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """Where a source says that a forward pass stands.

    Attributes:
        evaluation: evaluations of the transformer before this one, skipped ones included; a
            scheduler of second order asks for two in a step.
        order: evaluations of a step.
        evaluations: of the whole generation, or None if unknown.
        source: what said so.
    """

    evaluation: int | None
    evaluations: int | None
    order: int = 1
    source: str = "unknown"

    @property
    def step(self) -> int | None:
        return None if self.evaluation is None else self.evaluation // self.order

    @property
    def num_steps(self) -> int | None:
        # The last step of a scheduler of second order needs one evaluation.
        return None if self.evaluations is None else -(-self.evaluations // self.order)


@dataclass
class _Passes:
    """The forward passes of one evaluation."""

    evaluation: int | None = None
    names: list[tuple[str, str]] = field(default_factory=list)


class StepTracker:
    """Return the denoising step of each forward pass of one pipeline on one thread.

    Sources in order: what the pipeline announced (`CacheContext`), its scheduler's step index, the
    place of its timestep in the scheduler's table, and, where that table says something else than
    the model is given, changes of the timestep. Calls are never counted, because caches skip some.
    In a loop without a pipeline, what is announced counts; else the scheduler of `pipe`, if its
    timestep is the one that the transformer is really given.

    Args:
        pipe: the pipeline, held weakly; None for a transformer alone.
        running: whether the pipeline's own call is running, so that its scheduler can be believed.
    """

    def __init__(self, pipe: object | None = None, *, running: bool = True) -> None:
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._running = running and pipe is not None
        self._table: tuple[Any, list[float]] = (None, [])
        self.finished = False
        self._begin()

    def _begin(self) -> None:
        self._last: _Reading | None = None
        self._schedule: object = None
        self._grids: dict[str, tuple[int, int, int]] = {}
        self._latents: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._value: float | None = None
        self._counted = 0
        self._passes = _Passes()

    @property
    def pipe(self) -> Any:
        """Return the pipeline, or None if there is none or it is gone."""
        return None if self._pipe is None else self._pipe()

    def tick(
        self,
        *,
        transformer: str,
        announced: Any = None,
        timestep: Any = None,
        latents: Any = None,
        grid: tuple[int, int, int] | None = None,
    ) -> Moment:
        """Return where the generation stands at the start of a forward pass.

        Args:
            transformer: which transformer runs, for example `"transformer_2"`.
            announced: the pipeline's `CacheContext`, or None.
            timestep: the `timestep` argument of the forward pass: a number, a tensor of any shape
                (the last element counts: with per-token timesteps the first frame's may be 0), or
                None.
            latents: what is denoised.
            grid: its tokens.
        """
        reading = self._read(announced, timestep)
        name = getattr(announced, "name", None)
        # A reset before the reading would forget the value that a count goes on from.
        new_video = self._starts_over(reading, transformer, name, latents, grid)
        if new_video:
            self._begin()
            reading = self._read(announced, timestep)
        self.finished = False
        self._schedule = self._timesteps()
        if self._last is None or reading.evaluation is not None:
            self._last = reading
        if grid is not None:
            self._grids[transformer] = grid
        self._remember(transformer, latents)
        return Moment(
            step=reading.step,
            num_steps=reading.num_steps,
            branch=self._branch(reading, transformer, name),
            source=reading.source,
            new_video=new_video,
        )

    def _branch(self, reading: _Reading, transformer: str, name: str | None) -> str:
        if self._passes.evaluation != reading.evaluation:
            self._passes = _Passes(evaluation=reading.evaluation)
        names = self._passes.names
        before = sum(one == transformer and (name is None or other == name) for one, other in names)
        names.append((transformer, name or ""))
        if name is None:
            known = pass_in_evaluation()
            return f"call {before if known is None else known}"
        # A second pass under one name, such as a perturbed one, has a memory of its own.
        return name if before == 0 else f"{name} {before + 1}"

    def _starts_over(
        self,
        reading: _Reading,
        transformer: str,
        name: str | None,
        latents: Any,
        grid: tuple[int, int, int] | None,
    ) -> bool:
        last = self._last
        if last is None or self.finished:
            return True
        if grid is not None and self._grids.get(transformer, grid) != grid:
            return True
        counts = (last.num_steps, reading.num_steps)
        if None not in counts and counts[0] != counts[1]:
            return True
        if reading.evaluation is None or last.evaluation is None:
            return False
        if reading.evaluation < last.evaluation:
            return True
        # A generation that was interrupted never says that it ended. The next one makes a new table
        # of timesteps; a loop without a scheduler begins with other latents.
        if self._timesteps() is not self._schedule and reading.evaluation <= last.evaluation:
            return True
        again = reading.evaluation == last.evaluation == 0 and not self._running
        repeated = name is not None and (transformer, name) in self._passes.names
        return again and repeated and not self._same_latents(transformer, latents)

    def _remember(self, transformer: str, latents: Any) -> None:
        if isinstance(latents, Tensor) and transformer not in self._latents:
            self._latents[transformer] = (weakref.ref(latents), _version(latents))

    def _same_latents(self, transformer: str, latents: Any) -> bool:
        if transformer not in self._latents or not isinstance(latents, Tensor):
            return True
        first, version = self._latents[transformer]
        return first() is latents and version == _version(latents)

    def _timesteps(self) -> Any:
        return getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)

    def _read(self, announced: Any, timestep: Any) -> _Reading:
        pipe = self.pipe
        scheduler = getattr(pipe, "scheduler", None)
        order = max(1, int(getattr(scheduler, "order", 1) or 1)) if self._running else 1
        count = getattr(announced, "num_inference_steps", None) or _evaluations(pipe)
        index = getattr(announced, "step_index", None)
        if index is not None:
            return _Reading(
                evaluation=int(index), evaluations=count, order=order, source="cache_context"
            )
        if pipe is None or scheduler is None:
            return _Reading(evaluation=None, evaluations=count)
        order = max(1, int(getattr(scheduler, "order", 1) or 1))
        index, source = self._index(scheduler, count, timestep), "scheduler"
        if index is None and self._running:
            current = getattr(pipe, "_current_timestep", None)
            source = "timestep" if current is None else "pipeline timestep"
            index = self._place(timestep if current is None else current, count)
        if index is None:
            return _Reading(evaluation=None, evaluations=count)
        return _Reading(evaluation=index, evaluations=count, order=order, source=source)

    def _index(self, scheduler: Any, count: int | None, timestep: Any) -> int | None:
        """Return the scheduler's step index, counted from where the generation enters its table."""
        table = self._values()
        if not hasattr(scheduler, "step_index"):
            if self._running or timestep is None:
                return None
            value = _last_value(timestep)  # of a loop without a pipeline
            return table.index(value) if value in table else None
        start = getattr(scheduler, "begin_index", None)
        if start is None:  # video-to-video enters the table late, often without saying where
            start = max(0, len(table) - (count or len(table))) if self._running else 0
        index = scheduler.step_index
        index = int(start) if index is None else int(index)  # None before the first step
        if not self._running and not (
            0 <= index < len(table) and _is_timestep(table[index], timestep)
        ):
            return None
        return max(0, index - int(start))

    def _place(self, timestep: Any, count: int | None) -> int | None:
        """Return the place of a timestep in the scheduler's table, or else count its changes."""
        if timestep is None or count is None:
            return None
        value, table = _last_value(timestep), self._values()
        if table.count(value) == 1:
            return max(0, table.index(value) - max(0, len(table) - count))
        if self._value is None or value > self._value:
            self._counted = 0
        elif value < self._value:
            self._counted += 1
        self._value = value
        return self._counted

    def _values(self) -> list[float]:
        """Return the scheduler's table on the host, copied once for each new one."""
        table = self._timesteps()
        if table is not self._table[0]:
            values = table.tolist() if hasattr(table, "tolist") else list(table)
            self._table = (table, [float(value) for value in values])
        return self._table[1]


def _evaluations(pipe: object | None) -> int | None:
    count = getattr(pipe, "_num_timesteps", None)
    if count is None:
        timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
        count = None if timesteps is None else len(timesteps)
    return int(count) if count else None


def _last_value(timestep: Any) -> float:
    # On an accelerator this waits for the device, once per forward pass and only without a context.
    if isinstance(timestep, Tensor):
        return float(timestep.detach().flatten()[-1])
    return float(timestep)


def _is_timestep(value: float, timestep: Any) -> bool:
    """Return whether a transformer is given this timestep, in the precision that it is given."""
    if timestep is None:
        return False
    if isinstance(timestep, Tensor):
        given = timestep.detach().flatten()[-1]
        return bool(given == given.new_tensor(value))
    return float(timestep) == value


def _version(latents: Tensor) -> int:
    return 0 if latents.is_inference() else latents._version
