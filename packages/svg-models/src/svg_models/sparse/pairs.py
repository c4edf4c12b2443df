"""Time sparse forward passes, each beside the same pass with dense attention.

Two whole clips are made minutes apart, and whatever else the machine did meanwhile would be in the
ratio of their times. Here the same inputs pass through the transformer twice, one pass right behind
the other, sparse and dense in turns, so that both meet the same machine. What the method remembers
from step to step stays that of its own clip, since the dense pass neither plans nor remembers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from svg_attention import Call, CallRecord, Session, SparsePlan
from svg_attention.metrics import recall

if TYPE_CHECKING:
    from torch import Tensor, nn

    from svg_models.sparse.engine import Engine

__all__ = ["DensePairs", "PairedStep"]

LATER_STEPS = 3
"""Sparse steps after the first that are timed."""
RECALL_ROWS = 32
"""Queries of each call on which the recall is measured."""


@dataclass(frozen=True, kw_only=True)
class PairedStep:
    """The forward passes of one denoising step, sparse and dense, over all guidance branches.

    Attributes:
        step: denoising step from 0.
        first: whether it was the first sparse step, which begins without anything remembered.
        seconds: time of the sparse passes.
        attention: time of self-attention in them, planning included.
        dense_seconds: time of the same passes with dense attention.
        dense_attention: time of self-attention in those.
    """

    step: int
    first: bool
    seconds: float
    attention: float
    dense_seconds: float
    dense_attention: float


@dataclass
class _Pass:
    """One forward pass that is timed."""

    transformer: str
    step: int
    branch: str
    first: bool
    dense_before: bool
    began: float = 0.0
    seconds: float = 0.0
    dense_seconds: float = 0.0


class DensePairs:
    """Time some sparse steps of a run beside the same steps dense.

    Args:
        engine: of the run.
        transformers: that the run has made sparse, by name.
        now: returns the time once the device has finished.
        leave_out: is told the seconds that the dense passes took, which belong to no clip.
    """

    def __init__(
        self,
        engine: Engine,
        transformers: dict[str, nn.Module],
        *,
        now: Callable[[], float] = time.perf_counter,
        leave_out: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._engine, self._transformers = engine, transformers
        self._now, self._leave_out = now, leave_out
        self._twin: Session | None = None
        self._wanted: dict[str, set[int]] = {}
        self._open: dict[str, _Pass] = {}
        self._passes: list[_Pass] = []
        self._recalls: list[torch.Tensor] = []
        self._undo = ExitStack()

    def __enter__(self) -> DensePairs:
        with ExitStack() as undo:
            for name, transformer in self._transformers.items():
                for hook in (
                    transformer.register_forward_pre_hook(self._before(name), with_kwargs=True),
                    transformer.register_forward_hook(self._after(name), with_kwargs=True),
                ):
                    undo.callback(hook.remove)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def steps(self) -> tuple[PairedStep, ...]:
        """Return the steps that were timed, in order; waits for the device once."""
        if self._twin is None:
            return ()
        sparse, dense = _attention(self._engine.records()), _attention(self._twin.records())
        steps = []
        for step in sorted({p.step for p in self._passes}):
            passes = [p for p in self._passes if p.step == step]
            keys = [(p.transformer, p.step, p.branch) for p in passes]
            steps.append(
                PairedStep(
                    step=step,
                    first=any(p.first for p in passes),
                    seconds=sum(p.seconds for p in passes),
                    attention=sum(sparse.get(key, 0.0) for key in keys),
                    dense_seconds=sum(p.dense_seconds for p in passes),
                    dense_attention=sum(dense.get(key, 0.0) for key in keys),
                )
            )
        return tuple(steps)

    def recall(self) -> float | None:
        """Return the share of the attention weight that sparse calls kept, mean over those sampled.

        They are the calls of the steps behind those that were timed.
        """
        return float(torch.stack(self._recalls).mean()) if self._recalls else None

    def _measure_recall(self, call: Call, query: Tensor, key: Tensor, plan: SparsePlan) -> None:
        if plan.residual is not None:  # its probes stand among the queries
            return
        began = self._now()
        valid = plan.tile_rows_valid()
        full = (valid.reshape(-1, valid.shape[-1]).amin(dim=0) > 0).nonzero().flatten()
        chosen = full[torch.linspace(0, len(full) - 1, min(len(full), RECALL_ROWS)).long()]
        rows = chosen * plan.tile_rows
        self._recalls.append(recall(query, key, plan, rows=rows).mean().cpu())
        self._leave_out(self._now() - began)

    def _before(self, name: str) -> Callable[..., None]:
        @torch.compiler.disable
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            timed = self._choose(name)
            self._engine.watch(self._measure_recall if self._is_behind(name) else None)
            if timed is None:
                return
            if timed.dense_before:
                timed.dense_seconds = self._run_dense(name, module, args, kwargs)
            self._open[name] = timed
            timed.began = self._now()

        return before

    def _after(self, name: str) -> Callable[..., None]:
        @torch.compiler.disable
        def after(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            timed = self._open.pop(name, None)
            if timed is None:
                return
            timed.seconds = self._now() - timed.began
            if not timed.dense_before:
                timed.dense_seconds = self._run_dense(name, module, args, kwargs)
            self._passes.append(timed)

        return after

    def _choose(self, name: str) -> _Pass | None:
        """Return the pass that begins if it is to be timed."""
        moment, sparse = self._engine.where(name)
        if not sparse or moment.step is None:
            return None
        first = name not in self._wanted
        if first:
            later = range(moment.step + 1, moment.num_steps or moment.step + 1 + LATER_STEPS)
            places = np.linspace(0, len(later) - 1, min(len(later), LATER_STEPS)).round()
            self._wanted[name] = {moment.step, *(later[int(place)] for place in places)}
        elif moment.step not in self._wanted[name]:
            return None
        first = moment.step == min(self._wanted[name])
        turns = len(self._passes) % 2 == 1  # whoever is second finds warmer caches
        return _Pass(name, moment.step, moment.branch, first, turns)

    def _is_behind(self, name: str) -> bool:
        """Return whether the pass that begins is of a step right behind a timed one."""
        wanted, (moment, sparse) = self._wanted.get(name, set()), self._engine.where(name)
        step = moment.step
        return sparse and step is not None and step - 1 in wanted and step not in wanted

    def _run_dense(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> float:
        if self._twin is None:
            self._twin = self._engine.dense_session()
        began = self._now()
        with self._engine.computing_with(name, self._twin):
            module.forward(*args, **kwargs)
        took = self._now() - began
        self._leave_out(took)
        return took


def _attention(records: tuple[CallRecord, ...] | list[CallRecord]) -> dict[Any, float]:
    """Return the seconds of attention of each forward pass."""
    seconds: dict[Any, float] = {}
    for record in records:
        key = record.transformer, record.step, record.branch
        seconds[key] = seconds.get(key, 0.0) + (record.seconds or 0.0)
    return seconds
