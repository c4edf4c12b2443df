"""One slice of a training run: go on from a checkpoint, step, log, stop in time, store."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svg_models.files import atomic_path

from .optim import Average, learning_rate, make_optimisers
from .ranks import ALONE, Ranks

STARTED = time.perf_counter()
LOG_EVERY = 50

Log = list[dict[str, Any]]
Keep = Callable[["Clock", Sequence[Tensor], Log], None]


def passed() -> float:
    """Return the seconds since the script of a stage has its imports."""
    return time.perf_counter() - STARTED


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Say what one slice of a run may take.

    Attributes:
        out: folder of checkpoints and logs.
        steps: of the whole run.
        lr: peak of the learning rate.
        seed: of everything random.
        device: where it runs.
        seconds: of the whole run, over all its slices; the rate falls with whichever of steps and
            seconds is spent faster.
        max_seconds: of this slice.
        stop_at: step before which this slice ends.
        first: step that the weights given at the start were stored at.
        spent: seconds of the run before, where weights alone were kept of it.
        keep_seconds: after how many seconds the averaged weights are kept, again and again.
        ranks: the processes that share each step.
    """

    out: Path
    steps: int
    lr: float
    seed: int = 0
    device: str = "cpu"
    seconds: float = float("inf")
    max_seconds: float = float("inf")
    stop_at: int | None = None
    first: int = 0
    spent: float = 0.0
    keep_seconds: float = float("inf")
    ranks: Ranks = ALONE


class Clock:
    """Tell how much of a run is done: the same in all ranks, and from one tick to the next."""

    def __init__(self, options: Slice) -> None:
        """Start to count this slice's seconds."""
        self.options = options
        self.step = options.first
        self.before = options.spent
        self.slice_seconds = 0.0
        self._started = time.perf_counter()

    def tick(self) -> None:
        """Read the seconds of this slice, as the first rank sees them."""
        passed = time.perf_counter() - self._started
        self.slice_seconds = self.options.ranks.agree(passed)

    @property
    def seconds(self) -> float:
        """Return the seconds of the whole run so far."""
        return self.before + self.slice_seconds

    @property
    def progress(self) -> float:
        """Return how much of the run is done, from 0 to 1."""
        if self.options.seconds <= 0:
            return 1.0
        by_time = self.seconds / self.options.seconds
        return min(1.0, max(self.step / max(1, self.options.steps), by_time))

    @property
    def over(self) -> bool:
        """Return whether this slice ends here."""
        if self.progress >= 1.0 or self.step == self.options.stop_at:
            return True
        return self.slice_seconds > self.options.max_seconds


def run(
    model: nn.Module,
    name: str,
    options: Slice,
    batches: Callable[[Clock], Iterable[Any]],
    compute: Callable[[Any, torch.Generator], tuple[Tensor, dict[str, Tensor]]],
    *,
    decay: float,
    keep: Keep | None = None,
) -> Clock:
    """Train for one slice; leave the averaged weights in `model` and a checkpoint in the folder.

    Ranks start from the same weights, take batches of their own, and step by their mean gradient.

    Args:
        model: what is trained; parameters without gradient stay as they are.
        name: of the stage and its files.
        options: of the slice.
        batches: makes the batches of the steps that are left. What a log line names a batch is its
            `label`.
        compute: returns a batch's loss and further means to log; it backpropagates nothing.
        decay: of the average of the weights.
        keep: stores the averaged weights, in the order of the model's parameters, and the log; the
            first rank calls it.

    Raises:
        FloatingPointError: if a loss is not finite; the last checkpoint stays as it is.
    """
    clock = Clock(options)
    path = options.out / f"{name}.pt"
    options.out.mkdir(parents=True, exist_ok=True)
    optimisers = make_optimisers(model, lr=options.lr, fused=options.device != "cpu")
    average = Average(model, decay=decay)
    log: Log = []
    if path.exists():
        state = torch.load(path, map_location=options.device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, value in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(value)
        average.values = state["average"]
        clock.step, log, clock.before = state["step"], state["log"], state["seconds"]
    recent: list[tuple[str, Tensor, dict[str, Tensor]]] = []
    trained = [value for value in model.parameters() if value.requires_grad]
    ranks, kept = options.ranks, 0.0
    for batch in _until(clock, batches(clock)):
        progress = clock.progress
        length = clock.step / progress if progress else options.steps
        rate = learning_rate(clock.step, length, peak=options.lr, warmup=100)
        rate *= min(1.0, (clock.step + 1 - options.first) / 50)
        seed = (ranks.rank * 1000 + options.seed) * 10**6 + clock.step
        generator = torch.Generator(options.device).manual_seed(seed)
        loss, extra = compute(batch, generator)
        loss.backward()
        ranks.average([value.grad for value in trained if value.grad is not None])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        average.update(model, clock.step)
        clock.step += 1
        clock.tick()
        recent.append((batch.label, loss.detach(), extra))
        if clock.step % LOG_EVERY == 0 or clock.step == options.steps:
            entry = _summary(clock, recent)
            if ranks.count > 1:
                entry["drift"] = ranks.drift(trained)
            if not all(math.isfinite(value) for value in entry.values()):
                raise FloatingPointError(
                    f"a loss is not finite: {entry}; go on from the last checkpoint with a lower lr"
                )
            log.append(entry)
            recent = []
            if ranks.first:
                print(json.dumps(log[-1]), flush=True)
        if keep is not None and clock.slice_seconds - kept >= options.keep_seconds:
            kept = clock.slice_seconds
            if ranks.first:
                keep(clock, average.values, log)
    if ranks.first:
        _write(options.out, name, clock, model, optimisers, average, log)
    ranks.wait()
    average.copy_to(model)
    if ranks.first:
        print(f"{name}: step {clock.step} of {options.steps}, {clock.seconds:.0f} s", flush=True)
    return clock


def join_logs(earlier: Log, log: Log) -> Log:
    """Return the log of a run whose earlier part is known from its card alone."""
    return [entry for entry in earlier if not log or entry["step"] < log[0]["step"]] + log


def _write(
    folder: Path,
    name: str,
    clock: Clock,
    model: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    average: Average,
    log: Log,
) -> None:
    """Write the checkpoint of a stage and its log."""
    state = {
        "model": model.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "average": average.values,
        "step": clock.step,
        "log": log,
        "seconds": clock.seconds,
    }
    with atomic_path(folder / f"{name}.pt") as temporary:
        torch.save(state, temporary)
    with atomic_path(folder / f"{name}_log.json") as temporary:
        temporary.write_text(json.dumps(log))


def _until(clock: Clock, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches until the slice is over."""
    for batch in batches:
        if clock.over:
            return
        yield batch


def _summary(clock: Clock, recent: list[tuple[str, Tensor, dict[str, Tensor]]]) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": clock.step, "seconds": round(clock.seconds, 1)}
    for label in sorted({row[0] for row in recent}):
        losses = torch.stack([row[1] for row in recent if row[0] == label])
        entry[label] = round(losses.mean().item(), 5)
    for key in recent[-1][2]:
        entry[key] = round(torch.stack([row[2][key] for row in recent]).mean().item(), 6)
    return entry
