"""What a session reports of its calls, read from the device a step at a time without waiting."""

from __future__ import annotations

import time
import warnings
from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Call:
    """Identify an attention call of a generation.

    Args:
        step: denoising step from 0; None when unknown, which keeps the call dense.
        num_steps: denoising steps of the generation, or None.
        layer: self-attention layer from 0.
        num_layers: self-attention layers of the transformer.
        branch: guidance branch, such as "cond" and "uncond".
        transformer: which transformer, for pipelines with two.
    """

    step: int | None
    num_steps: int | None
    layer: int
    num_layers: int
    branch: str = "cond"
    transformer: str = "transformer"


@dataclass(frozen=True, kw_only=True)
class CallRecord:
    """Report one attention call.

    Attributes:
        step: as in the call.
        layer: as in the call.
        branch: as in the call.
        transformer: as in the call.
        method: name of the method that ran; "Dense" for what the schedule kept dense.
        density: fraction of the valid query-key pairs computed exactly, mean over batch and heads.
        seconds: time of planning and attention together; None unless the session profiles.
        tokens: tokens of the sequence.
        finite: False if some head read every key because a query or key was NaN or infinite.
        probe_density: what the method's probes took beside it; see `SparsePlan`.
        head_density: density of each head, mean over the batch; empty where all heads are alike.
        backend: who was asked to compute it; empty for a model's own dense kernel.
        imbalance: pairs of the device that computed most of them, over the mean of all devices; 1
            on one device and for a dense call.
    """

    step: int | None
    layer: int
    branch: str
    transformer: str
    method: str
    density: float
    seconds: float | None
    tokens: int
    finite: bool = True
    probe_density: float = 0.0
    head_density: tuple[float, ...] = ()
    backend: str = ""
    imbalance: float = 1.0


class Stopwatch:
    """Measure the time of some work: by CUDA events on a GPU, by the wall elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._elapsed = 0.0
        self._begin = 0.0
        if device.type == "cuda":
            self._events = (
                torch.cuda.Event(enable_timing=True),
                torch.cuda.Event(enable_timing=True),
            )
            self._events[0].record()
        else:
            self._begin = time.perf_counter()

    def stop(self) -> None:
        """End the measurement."""
        if self._events is not None:
            self._events[1].record()
        else:
            self._elapsed = time.perf_counter() - self._begin

    def seconds(self) -> float:
        """Return the time measured, waiting for the device if need be."""
        if self._events is None:
            return self._elapsed
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000.0


# Calls whose numbers travel together at most.
TOGETHER = 512
# Densities of heads that differ by less are those of heads alike.
HEADS_ALIKE = 1e-3


@dataclass
class _Entry:
    """A call, and its numbers once they are known."""

    call: Call
    method: str
    tokens: int
    stopwatch: Stopwatch | None
    probe_density: float = 0.0
    density: float = 1.0
    finite: bool = True
    head_density: tuple[float, ...] = ()
    backend: str = ""
    imbalance: float = 1.0


@dataclass
class _Batch:
    """Numbers on their way from the device: `[density, broken, imbalance, *heads]` of each."""

    entries: list[_Entry]
    numbers: Tensor
    arrived: torch.cuda.Event | None

    def ready(self) -> bool:
        return self.arrived is None or self.arrived.query()

    def deliver(self) -> list[_Entry]:
        """Fill the entries, waiting for the numbers if need be; return those that were broken."""
        if self.arrived is not None:
            self.arrived.synchronize()
        for entry, row in zip(self.entries, self.numbers.tolist(), strict=True):
            density, broken, entry.imbalance, *heads = row
            entry.density, entry.finite = density, not broken
            heads = [head for head in heads if head == head]  # NaN fills up what has fewer heads
            if heads and max(heads) - min(heads) > HEADS_ALIKE:
                entry.head_density = tuple(heads)
        return [entry for entry in self.entries if not entry.finite]


class CallLog:
    """Keep the latest calls of a session, and say once when one was not finite.

    Numbers stay on the device until their step is over, then travel together to pinned memory;
    nothing waits for them before they are asked for.

    Args:
        most: calls to keep.
    """

    def __init__(self, most: int) -> None:
        self._entries: deque[_Entry] = deque(maxlen=most)
        self._fresh: list[tuple[_Entry, Tensor]] = []
        self._travelling: deque[_Batch] = deque()
        self._told = False

    def add(
        self,
        call: Call,
        method: str,
        tokens: int,
        density: Tensor | None,
        broken: Tensor | None,
        stopwatch: Stopwatch | None,
        probe_density: float = 0.0,
        *,
        backend: str = "",
        imbalance: Tensor | None = None,
    ) -> None:
        """Take note of a call.

        Args:
            call: which one.
            method: that ran.
            tokens: of the sequence.
            density: fp32 `[H]` on the device, or None if it was dense.
            broken: scalar on the device, or None.
            stopwatch: stopped, or None.
            probe_density: see `CallRecord`.
            backend: see there.
            imbalance: scalar on the device, see there; None on one device.
        """
        entry = _Entry(call, method, tokens, stopwatch, probe_density, backend=backend)
        new_step = bool(self._fresh) and self._fresh[-1][0].call.step != call.step
        if new_step or len(self._fresh) >= TOGETHER:
            self._send()
        if density is not None:
            none, one = density.new_zeros(()), density.new_ones(())
            flag = none if broken is None else broken.to(density.dtype)
            first = torch.stack([density.mean(), flag, one if imbalance is None else imbalance])
            self._fresh.append((entry, torch.cat([first, density])))
            if density.device.type == "cpu":
                self._send()
        self._entries.append(entry)

    def records(self) -> list[CallRecord]:
        """Return one record per call that is kept, in order; waits for the device."""
        self._send()
        while self._travelling:
            self._tell(self._travelling.popleft().deliver(), stacklevel=4)
        return [
            CallRecord(
                step=entry.call.step,
                layer=entry.call.layer,
                branch=entry.call.branch,
                transformer=entry.call.transformer,
                method=entry.method,
                density=entry.density,
                seconds=None if entry.stopwatch is None else entry.stopwatch.seconds(),
                tokens=entry.tokens,
                finite=entry.finite,
                probe_density=entry.probe_density,
                head_density=entry.head_density,
                backend=entry.backend,
                imbalance=entry.imbalance,
            )
            for entry in self._entries
        ]

    def clear(self) -> None:
        """Forget every call; what has arrived by now is still said."""
        self._send()
        self._entries.clear()
        self._fresh.clear()
        self._travelling.clear()
        self._told = False

    def _send(self) -> None:
        """Send the numbers of the calls so far on their way, and read those that have arrived."""
        on_device = any(row.device.type == "cuda" for _, row in self._fresh)
        if on_device and torch.cuda.is_current_stream_capturing():
            return
        by_device: dict[torch.device, list[tuple[_Entry, Tensor]]] = {}
        for item in self._fresh:
            by_device.setdefault(item[1].device, []).append(item)
        self._fresh.clear()
        for device, items in by_device.items():
            widest = max(len(row) for _, row in items)
            numbers = torch.stack(
                [F.pad(row, (0, widest - len(row)), value=torch.nan) for _, row in items]
            )
            arrived = None
            if device.type == "cuda":
                host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
                with torch.cuda.device(device):
                    numbers = host.copy_(numbers, non_blocking=True)
                    arrived = torch.cuda.Event()
                    arrived.record()
            self._travelling.append(_Batch([entry for entry, _ in items], numbers, arrived))
        while self._travelling and self._travelling[0].ready():
            self._tell(self._travelling.popleft().deliver(), stacklevel=5)

    def _tell(self, broken: list[_Entry], stacklevel: int) -> None:
        """Warn of the first broken call of a video, at the line that called the session."""
        if not broken or self._told:
            return
        self._told = True
        call = broken[0].call
        warnings.warn(
            f"queries or keys of layer {call.layer} at step {call.step} (branch {call.branch!r}, "
            f"{call.transformer!r}) hold NaN or infinity; heads that do are computed dense. "
            "This is said once a video",
            RuntimeWarning,
            stacklevel=stacklevel,
        )
