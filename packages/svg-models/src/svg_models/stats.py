"""What a sparse run did: density and time by step and layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import numpy as np

from svg_attention import CallRecord
from svg_attention.methods import METHODS
from svg_models.errors import shortened
from svg_models.summary import Summarised, described

__all__ = ["Grids", "RunStats"]


Getter = TypeVar("Getter", bound=Callable[..., Any])


def statistic(getter: Getter) -> Getter:
    """Mark a property as a number of a run: `RunStats.numbers` returns it with all others."""
    _STATISTICS.append(getter)
    return getter


_STATISTICS: list[Callable[..., Any]] = []


@dataclass(frozen=True, kw_only=True, repr=False)
class RunStats(Summarised):
    """The attention calls of the last video.

    Attributes:
        records: one record per call, in order; density is the mean over batch and heads.
        recipe: method, schedule, source and note of the run as plain values; empty before the first
            forward pass.
        messages: what the run had to say, for example that a clip was too short.
        grid: latent frames, rows and columns of tokens; None before the first forward pass.
        facts: model, machine, and what the pipeline was asked for, as far as they are known.
    """

    records: tuple[CallRecord, ...]
    recipe: dict[str, Any]
    messages: tuple[str, ...] = ()
    grid: tuple[int, int, int] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sparse_records(self) -> tuple[CallRecord, ...]:
        """Return the calls that a sparse method planned."""
        return tuple(record for record in self.records if record.method.lower() != "dense")

    @property
    @statistic
    def calls(self) -> int:
        """Return the number of attention calls."""
        return len(self.records)

    @property
    @statistic
    def sparse_calls(self) -> int:
        """Return the number of attention calls that a sparse method planned."""
        return len(self.sparse_records)

    @property
    @statistic
    def fp8_calls(self) -> int:
        """Return the number of attention calls computed in fp8."""
        return sum(record.backend.endswith("_fp8") for record in self.records)

    @property
    @statistic
    def tokens(self) -> int:
        """Return the video tokens of the clip; 0 before the first forward pass."""
        return 0 if self.grid is None else self.grid[0] * self.grid[1] * self.grid[2]

    @property
    @statistic
    def mean_density(self) -> float:
        """Return the mean density of the sparse calls; 1 if every call was dense."""
        return _mean(record.density for record in self.sparse_records)

    @property
    @statistic
    def mean_density_with_dense_calls(self) -> float:
        """Return the mean density of all calls, which is what the time depends on."""
        return _mean(record.density for record in self.records)

    @property
    @statistic
    def mean_probe_density(self) -> float:
        """Return what probes took beside the density of all calls, on average."""
        return sum(r.probe_density for r in self.records) / max(len(self.records), 1)

    @property
    @statistic
    def density_by_step(self) -> dict[int, float]:
        """Return the mean density of each denoising step over its layers, dense calls included."""
        return self._by(lambda record: record.step)

    @property
    @statistic
    def density_by_layer(self) -> dict[int, float]:
        """Return the mean density of each layer over all steps, dense calls included."""
        return self._by(lambda record: record.layer)

    @property
    @statistic
    def imbalance_by_step(self) -> dict[int, float]:
        """Return how unequally devices share the pairs of each step: the most over the mean.

        Mean over the calls of a step, dense ones included, which are shared equally; 1 on one
        device.
        """
        return self._by(lambda record: record.step, lambda record: record.imbalance)

    @property
    @statistic
    def seconds(self) -> float | None:
        """Return the time spent in attention, or None if the run was not timed."""
        times = [record.seconds for record in self.records if record.seconds is not None]
        return sum(times) if times else None

    @property
    def grids(self) -> Grids | None:
        """Return density and time by step and layer; None if no call has a known step."""
        return Grids.of(self.records)

    @property
    def head_density(self) -> np.ndarray | None:
        """Return the density of each head, `[layers, heads]`; None where heads are alike.

        Mean over the sparse calls of a layer in which they differ; NaN for a layer without any. Of
        two transformers the first counts.
        """
        told = [r for r in self.sparse_records if r.head_density]
        if not told:
            return None
        told = [r for r in told if r.transformer == told[0].transformer]
        heads = max(len(r.head_density) for r in told)
        total = np.zeros((1 + max(r.layer for r in told), heads))
        count = np.zeros((len(total), 1))
        for record in told:
            total[record.layer, : len(record.head_density)] += record.head_density
            count[record.layer] += 1
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)

    def numbers(self) -> dict[str, Any]:
        """Return every statistic by name, as plain values that JSON can hold."""
        return {getter.__name__: getter(self) for getter in _STATISTICS}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold."""
        return {
            "recipe": self.recipe,
            "facts": dict(self.facts),
            "messages": list(self.messages),
            **self.numbers(),
            "records": [asdict(record) for record in self.records],
        }

    def _in_fp8(self) -> list[tuple[str, str]]:
        """Return a line on what was asked for in fp8; none if nothing was."""
        which = {"sparse": "sparse steps but those at the end", "start": "all steps"}
        told = [f"{self.fp8_calls:,} attention calls"] if self.fp8_calls else []
        if self.recipe.get("linears") == "fp8":
            told.append(f"linear layers in {which[self.recipe['fp8_from']]}")
        return [("fp8", ", ".join(told))] if told else []

    def _by(
        self,
        key: Callable[[CallRecord], int | None],
        number: Callable[[CallRecord], float] = lambda record: record.density,
    ) -> dict[int, float]:
        groups: dict[int, list[float]] = defaultdict(list)
        for record in self.records:
            value = key(record)
            if value is not None:
                groups[value].append(number(record))
        return {value: _mean(group) for value, group in sorted(groups.items())}

    def _summary(self) -> tuple[str, list[tuple[str, str]]]:
        title = f"RunStats: {self.calls:,} attention calls, {self.sparse_calls:,} of them sparse"
        if not self.records:
            return title, [("no video yet", "run the pipeline")]
        method = f"{self.recipe.get('method')} ({shortened(str(self.recipe.get('source')), 90)})"
        size = "" if self.grid is None else ", {} x {} x {} tokens".format(*self.grid)
        steps, layers = len(self.density_by_step), len(self.density_by_layer)
        seconds = self.seconds
        probes = self.mean_probe_density
        probed = f"{probes:.1%} more by probes; " if probes else ""
        return title, [
            ("method", method),
            ("settings", self._settings()),
            (
                "density",
                f"{self.mean_density:.1%} of sparse calls, "
                f"{self.mean_density_with_dense_calls:.1%} of all; {probed}"
                f"{steps} steps, {layers} layers{size}",
            ),
            *self._in_fp8(),
            ("time", "not timed" if seconds is None else f"{seconds:.2f} s"),
        ]

    def _settings(self) -> str:
        """Return the settings of the method that differ from its defaults."""
        kind = METHODS.get(str(self.recipe.get("method")))
        entries = () if kind is None else fields(kind)  # type: ignore[arg-type]
        usual = {entry.name: entry.default for entry in entries}
        return described(self.recipe.get("settings", {}), usual) or "the defaults"


@dataclass(frozen=True, kw_only=True, eq=False)
class Grids:
    """What attention did, by denoising step (rows) and layer (columns).

    Attributes:
        density: `[steps, layers]`, mean over guidance branches; NaN where nothing ran.
        seconds: `[steps, layers]`, summed over guidance branches; None if nothing was timed.
        dense: `[steps, layers]`, True where the schedule kept the call dense.
    """

    density: np.ndarray
    seconds: np.ndarray | None
    dense: np.ndarray

    @property
    def has_sparse_calls(self) -> bool:
        """Return whether any call was planned by a sparse method."""
        return bool((~self.dense & np.isfinite(self.density)).any())

    @classmethod
    def of(cls, records: Iterable[CallRecord]) -> Grids | None:
        """Tabulate the calls of a run.

        Args:
            records: calls whose step is unknown are left out.

        Returns:
            The tables, or None if no call has a known step.
        """
        known = [(r, r.step) for r in records if r.step is not None]
        if not known:
            return None
        shape = (1 + max(step for _, step in known), 1 + max(r.layer for r, _ in known))
        total, count, seconds = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        sparse = np.zeros(shape, bool)
        for record, step in known:
            place = step, record.layer
            total[place] += record.density
            count[place] += 1
            seconds[place] += record.seconds or 0.0
            sparse[place] |= record.method.lower() != "dense"
        density = np.full(shape, np.nan)
        np.divide(total, count, out=density, where=count > 0)
        timed = any(r.seconds is not None for r, _ in known)
        return cls(density=density, seconds=seconds if timed else None, dense=~sparse)


def _mean(densities: Iterable[float]) -> float:
    numbers = list(densities)
    return sum(numbers) / len(numbers) if numbers else 1.0
