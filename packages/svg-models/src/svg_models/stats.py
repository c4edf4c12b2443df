"""What a sparse run did: density and time by step and layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from svg_attention import CallRecord

__all__ = ["RunStats"]


def _mean(densities: Iterable[float]) -> float:
    numbers = list(densities)
    return sum(numbers) / len(numbers) if numbers else 1.0


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """The attention calls of the last video.

    Attributes:
        records: one record per call, in order; density is the mean over batch and heads.
        recipe: method, schedule, source and note of the run as plain values; empty before the first
            forward pass.
        messages: what the run had to say, for example that a clip was too short.
    """

    records: tuple[CallRecord, ...]
    recipe: dict[str, Any]
    messages: tuple[str, ...] = ()

    @property
    def sparse_records(self) -> tuple[CallRecord, ...]:
        """Return the calls that a sparse method planned."""
        return tuple(record for record in self.records if record.method.lower() != "dense")

    @property
    def mean_density(self) -> float:
        """Return the mean density of the sparse calls; 1 if every call was dense."""
        return _mean(record.density for record in self.sparse_records)

    @property
    def mean_density_with_dense_calls(self) -> float:
        """Return the mean density of all calls, which is what the time depends on."""
        return _mean(record.density for record in self.records)

    @property
    def density_by_step(self) -> dict[int, float]:
        """Return the mean density of each denoising step over its layers, dense calls included."""
        return self._by(lambda record: record.step)

    @property
    def density_by_layer(self) -> dict[int, float]:
        """Return the mean density of each layer over all steps, dense calls included."""
        return self._by(lambda record: record.layer)

    @property
    def seconds(self) -> float | None:
        """Return the time spent in attention, or None if the run was not profiled."""
        times = [record.seconds for record in self.records if record.seconds is not None]
        return sum(times) if times else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold."""
        return {
            "recipe": self.recipe,
            "messages": list(self.messages),
            "calls": len(self.records),
            "sparse_calls": len(self.sparse_records),
            "mean_density": self.mean_density,
            "mean_density_with_dense_calls": self.mean_density_with_dense_calls,
            "density_by_step": self.density_by_step,
            "density_by_layer": self.density_by_layer,
            "seconds": self.seconds,
            "records": [asdict(record) for record in self.records],
        }

    def _by(self, key: Callable[[CallRecord], int | None]) -> dict[int, float]:
        groups: dict[int, list[float]] = defaultdict(list)
        for record in self.records:
            value = key(record)
            if value is not None:
                groups[value].append(record.density)
        return {value: _mean(group) for value, group in sorted(groups.items())}
