"""One generation: a method, a schedule, what is remembered between steps, and a log."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from svg_attention.attention import sparse_attention
from svg_attention.layout import TokenLayout
from svg_attention.memory import LayerMemory
from svg_attention.methods import Dense, Method
from svg_attention.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Call:
    """Say which attention call of a generation this is.

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
    """

    step: int | None
    layer: int
    branch: str
    transformer: str
    method: str
    density: float
    seconds: float | None
    tokens: int


@dataclass
class _Site:
    """What is kept for one layer, branch and transformer."""

    memory: LayerMemory
    generator: torch.Generator


@dataclass
class _Entry:
    """A call record whose numbers may still be on the device."""

    call: Call
    method: str
    tokens: int
    density: Tensor | None
    clock: _Clock | None = field(default=None)


class _Clock:
    """Time a stretch of work: by CUDA events on a GPU, by the wall elsewhere."""

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
        """End the stretch."""
        if self._events is not None:
            self._events[1].record()
        else:
            self._elapsed = time.perf_counter() - self._begin

    def seconds(self) -> float:
        """Return the length of the stretch, waiting for the device if need be."""
        if self._events is None:
            return self._elapsed
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000.0


class Session:
    """Run the attention calls of one generation; knows no model.

    Each layer, guidance branch and transformer has its own memory and its own random generator,
    seeded from `seed` and its name, so that a call's result depends on no other call's draws.

    Args:
        method: which keys each query reads in calls that are not dense.
        schedule: which calls stay dense.
        backend: passed on to `sparse_attention`.
        seed: start of all random draws.
        profile: also record the seconds of every call.
    """

    def __init__(
        self,
        method: Method,
        schedule: Schedule | None = None,
        *,
        backend: str = "auto",
        seed: int = 0,
        profile: bool = False,
    ) -> None:
        self.method = method
        self.schedule = Schedule() if schedule is None else schedule
        self.backend = backend
        self.seed = seed
        self.profile = profile
        self._sites: dict[tuple[str, str, int, str], _Site] = {}
        self._entries: list[_Entry] = []

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: TokenLayout,
        call: Call,
        text_lengths: Tensor | None = None,
        scale: float | None = None,
        dense: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Compute one self-attention call, dense or sparse as the schedule says, and log it.

        Args:
            query: `[B, H, S, D]`.
            key: `[B, H_kv, S, D]`.
            value: `[B, H_kv, S, D]`.
            layout: where the video and text tokens are.
            call: which call of the generation this is.
            text_lengths: integers `[B]` on the device, valid text tokens; None for all.
            scale: factor of the logits, `D ** -0.5` when None.
            dense: what computes dense calls, for results equal to the last bit with a model's own
                kernel; it must know about text padding itself.

        Returns:
            Tensor shaped and typed as `query`.
        """
        clock = _Clock(query.device) if self.profile else None
        method = self._method_for(call)
        density = None
        if isinstance(method, Dense) and dense is not None:
            out = dense(query, key, value)
        else:
            site = self._site_for(call, query.device)
            plan = method.plan(
                query,
                key,
                value,
                layout=layout,
                memory=site.memory,
                text_lengths=text_lengths,
                generator=site.generator,
                scale=scale,
            )
            backend = "auto" if plan.is_full else self.backend
            out = sparse_attention(query, key, value, plan, scale=scale, backend=backend)
            density = None if plan.is_full else plan.density().mean()
        if clock is not None:
            clock.stop()
        self._entries.append(_Entry(call, type(method).__name__, layout.tokens, density, clock))
        return out

    def reset(self) -> None:
        """Begin a new video: forget what was remembered and the log, keep the configuration."""
        self._sites.clear()
        self._entries.clear()

    def records(self) -> list[CallRecord]:
        """Return one record per call since the last reset, in order; waits for the device."""
        pending = [entry.density for entry in self._entries if entry.density is not None]
        numbers = iter(_to_floats(pending))
        return [
            CallRecord(
                step=entry.call.step,
                layer=entry.call.layer,
                branch=entry.call.branch,
                transformer=entry.call.transformer,
                method=entry.method,
                density=1.0 if entry.density is None else next(numbers),
                seconds=None if entry.clock is None else entry.clock.seconds(),
                tokens=entry.tokens,
            )
            for entry in self._entries
        ]

    def _method_for(self, call: Call) -> Method:
        """Return what runs this call: dense, or the method at the density of this step."""
        if self.schedule.is_dense(
            step=call.step,
            num_steps=call.num_steps,
            layer=call.layer,
            num_layers=call.num_layers,
        ):
            return Dense()
        density = self.schedule.density_at(step=call.step, num_steps=call.num_steps)
        method: Any = self.method
        if density is not None and hasattr(method, "density"):
            return replace(method, density=density)
        return self.method

    def _site_for(self, call: Call, device: torch.device) -> _Site:
        """Return the memory and generator of this call's layer, new at its first use."""
        key = (call.transformer, call.branch, call.layer, str(device))
        site = self._sites.get(key)
        if site is None:
            generator = torch.Generator(device=device).manual_seed(site_seed(self.seed, *key[:3]))
            site = self._sites[key] = _Site(LayerMemory(), generator)
        return site


def site_seed(seed: int, transformer: str, branch: str, layer: int) -> int:
    """Derive the seed of one layer, branch and transformer: the same in every process."""
    name = f"{seed}/{transformer}/{branch}/{layer}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")


def _to_floats(numbers: list[Tensor]) -> list[float]:
    """Bring scalar tensors to the host with one transfer per device."""
    devices = {number.device for number in numbers}
    values: dict[int, float] = {}
    for device in devices:
        places = [i for i, number in enumerate(numbers) if number.device == device]
        column = torch.stack([numbers[i] for i in places]).tolist()
        values.update(zip(places, column, strict=True))
    return [values[i] for i in range(len(numbers))]
