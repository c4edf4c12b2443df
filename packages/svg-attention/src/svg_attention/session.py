"""One generation: a method, a schedule, what is remembered between steps, and a log."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from svg_attention import config
from svg_attention.attention import dense_backend, sparse_attention
from svg_attention.backends import check_backend
from svg_attention.heads import by_head, deal_again, imbalance
from svg_attention.layout import TokenLayout
from svg_attention.log import Call, CallLog, CallRecord, Stopwatch
from svg_attention.memory import LayerMemory
from svg_attention.methods import Arrivals, Dense, HeadShare, Method
from svg_attention.plan import SparsePlan
from svg_attention.ring import Ring, attend_in_ring
from svg_attention.schedule import Schedule

Layout = Literal["BHSD", "BSHD"]
# Calls that the log keeps: ten videos of 50 guided steps through 60 layers.
MAX_RECORDS = 60_000


@dataclass
class _Site:
    """What is kept for one layer, branch and transformer."""

    memory: LayerMemory
    generator: torch.Generator
    dealt: tuple[int, Tensor] | None = None  # devices, and the order in which they have the heads


class Session:
    """Run the attention calls of one generation; knows no model.

    Each layer, guidance branch and transformer has its own memory and its own random generator,
    seeded from `seed` and its name, so that a call's result depends on no other call's draws, and
    not on which heads of the layer are on this device.

    ```python
    session = Session(SVG2(), layout=layout, num_steps=50, num_layers=30)
    for i in range(50):
        with session.step(i):
            ...                                     # and in block n of the transformer:
            out = session.attend(query, key, value, layer=n)
    ```

    Args:
        method: which keys each query reads in calls that are not dense.
        schedule: which calls stay dense; `Schedule()` when None.
        schedules: for transformers that have a schedule of their own, by name. Steps are counted
            over the whole generation there, too.
        layout: where the tokens of every call are, unless a call says otherwise.
        num_steps: denoising steps of a generation; None when unknown.
        num_layers: self-attention layers of the transformer.
        backend: passed on to `sparse_attention`.
        seed: start of all random draws.
        profile: also record the seconds of every call.
        max_records: calls that the log keeps; older ones are dropped.

    Attributes:
        watch: called after each sparse call with it, its queries, its keys and its plan, to measure
            what a plan reads; no call's time includes it.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a number is not positive.
    """

    def __init__(
        self,
        method: Method,
        schedule: Schedule | None = None,
        *,
        schedules: Mapping[str, Schedule] | None = None,
        layout: TokenLayout | None = None,
        num_steps: int | None = None,
        num_layers: int | None = None,
        backend: str = "auto",
        seed: int = 0,
        profile: bool = False,
        max_records: int = MAX_RECORDS,
    ) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"method must be a Method such as SVG2(), got {method!r}")
        for one in (schedule, *(schedules or {}).values()):
            if not isinstance(one, Schedule | None):
                raise TypeError(f"schedule must be a Schedule or None, got {one!r}")
            if one is not None:
                one.check_suits(method)
        self.method = method
        self.schedule = Schedule() if schedule is None else schedule
        self.schedules = dict(schedules or {})
        self.layout = layout
        self.num_steps = _count("num_steps", num_steps)
        self.num_layers = _count("num_layers", num_layers)
        self.backend = check_backend(backend)
        self.seed = config.integer("seed", seed, least=0)
        self.profile = profile
        self.watch: Callable[[Call, Tensor, Tensor, SparsePlan], None] | None = None
        self._log = CallLog(config.integer("max_records", max_records, least=1))
        # Whose plan the branches of a step may follow: the first one's.
        self._leaders: dict[tuple[str, int, str], tuple[int | None, LayerMemory]] = {}
        self._sites: dict[tuple[str, str, int, str], _Site] = {}
        self._current: tuple[int, str, str] | None = None
        self._latest = -1

    @contextmanager
    def step(
        self, index: int, *, branch: str = "cond", transformer: str = "transformer"
    ) -> Iterator[None]:
        """Mark the calls inside the `with` block as those of a denoising step.

        A step before the last one begins a new video, as `reset` does.

        Args:
            index: step from 0.
            branch: guidance branch, such as "cond" and "uncond".
            transformer: which transformer, for models with two.

        Raises:
            ValueError: if the step is not one of `num_steps`.
        """
        index = config.integer("step", index, least=0)
        for name, value in (("branch", branch), ("transformer", transformer)):
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string such as 'cond', got {value!r}")
        if self.num_steps is not None and index >= self.num_steps:
            raise ValueError(
                f"step {index} is not one of the {self.num_steps} steps, which count from 0"
            )
        if index < self._latest:
            self.reset()
        outer, self._current, self._latest = self._current, (index, branch, transformer), index
        try:
            yield
        finally:
            self._current = outer

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int | None = None,
        layout: TokenLayout | None = None,
        call: Call | None = None,
        text_lengths: Tensor | None = None,
        scale: float | None = None,
        dense: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        head_share: HeadShare | None = None,
        out_layout: Layout = "BHSD",
        ring: Ring | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Compute one self-attention call, dense or sparse as the schedule says, and log it.

        Args:
            query: `[B, H, S, D]`.
            key: `[B, H_kv, S, D]`.
            value: `[B, H_kv, S, D]`.
            layer: self-attention layer from 0, inside `with session.step(...)`.
            layout: where the video and text tokens are; the session's when None.
            call: which call of the generation this is, in place of `layer` and `step`; for
                adapters that follow a pipeline.
            text_lengths: integers `[B]` on the device, valid text tokens; None for all.
            scale: factor of the logits, `D ** -0.5` when None.
            dense: what computes dense calls, for results equal to the last bit with a model's own
                kernel; it must know about text padding itself.
            head_share: which of the layer's heads these are, if others are on other devices. Those
                may still be sending keys and values, see `HeadShare`.
            out_layout: how the output lies in memory; with "BSHD" `out.transpose(1, 2)` is
                contiguous. Its shape is `[B, H, S, D]` either way.
            ring: processes that share the video tokens of the call; see `attend_in_ring` for what
                the tensors then are. Dense calls are computed in the ring, too, not by `dense`.
            backend: who computes this call, also where it is dense and `dense` is not given; the
                session's for sparse calls and the fastest exact one for dense ones when None.

        Returns:
            Tensor shaped and typed as `query`.

        Raises:
            ValueError: if the tensors are not one self-attention call over the layout, or it is
                not said which layer or step this is.
            UnsupportedError: if the method cannot plan in a ring, or the backend cannot run this.
        """
        call = self._call(layer) if call is None else call
        layout = self.layout if layout is None else layout
        if layout is None:
            raise ValueError("where are the tokens? pass layout=TokenLayout(...) to the session")
        stopwatch = Stopwatch(query.device) if self.profile and not _capturing(query) else None
        method = self._method_for(call)
        density = broken = plan = unequal = None
        probe_density, computed_by = 0.0, ""
        arrivals = Arrivals() if head_share is None else head_share.arrivals
        if ring is not None and ring.size > 1:
            arrivals.wait()
            site = self._site_for(call, query.device)
            computed_by = backend or ("auto" if method.is_full else self.backend)
            found = attend_in_ring(
                method,
                query,
                key,
                value,
                ring=ring,
                layout=layout,
                memory=site.memory,
                text_lengths=text_lengths,
                generator=site.generator,
                scale=scale,
                backend=computed_by,
                dense_backend=backend or "auto",
            )
            out = found.out
            density = None if found.density is None else found.density.mean(dim=0)
            broken = None if found.broken is None else found.broken.any()
        elif isinstance(method, Dense) and dense is not None:
            arrivals.wait()
            out = dense(query, key, value)
        else:
            site = self._site_for(call, query.device)
            plan = method.plan(
                query,
                key,
                value,
                layout=layout,
                memory=site.memory,
                leader=self._leader(call, site.memory, query.device),
                text_lengths=text_lengths,
                generator=site.generator,
                scale=scale,
                head_share=head_share,
            )
            arrivals.wait()
            # torch's dense kernel chooses its own layout, which is mostly that of the queries.
            computed_by = backend or ("auto" if plan.is_full else self.backend)
            chooses = (
                plan.is_full
                and computed_by == "auto"
                and dense_backend(query, key, value) == "sdpa"
            )
            target = None if chooses else _allocate(query, value, out_layout)
            out = sparse_attention(
                query, key, value, plan, scale=scale, backend=computed_by, out=target
            )
        if out_layout == "BSHD" and not out.transpose(1, 2).is_contiguous():
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        if plan is not None:
            arrivals.give(out)
        if plan is not None and not plan.is_full:
            density = plan.density().mean(dim=0)
            if head_share is not None and head_share.devices > 1:
                density = by_head(density, head_share)
                unequal = imbalance(density, head_share)
                if head_share.deals and method.heads_differ:
                    order = deal_again(density, head_share, site.memory)
                    site.dealt = head_share.devices, order
            probe_density = plan.probe_density
            broken = None if plan.broken is None else plan.broken.any()
        if stopwatch is not None:
            stopwatch.stop()
        if self.watch is not None and plan is not None and not plan.is_full:
            self.watch(call, query, key, plan)
        self._log.add(
            call,
            type(method).__name__,
            layout.tokens,
            density,
            broken,
            stopwatch,
            probe_density,
            backend=computed_by,
            imbalance=unequal,
        )
        return out

    def head_order(self, call: Call, devices: int, device: torch.device) -> Tensor | None:
        """Return the order in which devices have the heads of a layer, int64 `[H]`.

        Args:
            call: which call comes next.
            devices: how many share the heads.
            device: of its tensors.

        Returns:
            None for the order of their numbers. See `HeadShare`.
        """
        dealt = self._site_for(call, device).dealt
        return None if dealt is None or dealt[0] != devices else dealt[1]

    def reset(self) -> None:
        """Begin a new video: forget what was remembered and the log, keep the configuration."""
        self._sites.clear()
        self._leaders.clear()
        self._log.clear()
        self._latest = -1

    def forget(self, transformer: str) -> None:
        """Let go of what the layers of a transformer remember, which none of them will need again.

        Should it run once more, it starts over. Random draws and the log go on.

        Args:
            transformer: as calls name it.
        """
        for (name, *_), site in self._sites.items():
            if name == transformer:
                site.memory = LayerMemory()
        for key in [key for key in self._leaders if key[0] == transformer]:
            del self._leaders[key]

    def records(self) -> list[CallRecord]:
        """Return one record per call since the last reset, in order; waits for the device.

        Of more than `max_records` calls these are the latest.
        """
        return self._log.records()

    def _call(self, layer: int | None) -> Call:
        """Return the call of a layer in the current step."""
        if layer is None:
            raise ValueError("which layer is this? pass layer=n, counted from 0")
        if self._current is None:
            raise ValueError("which step is this? attend inside `with session.step(i):`")
        layer = config.integer("layer", layer, least=0)
        if self.num_layers is None:
            raise ValueError("pass num_layers to the session, so that it knows which stay dense")
        if layer >= self.num_layers:
            raise ValueError(
                f"layer {layer} is not one of the {self.num_layers} layers, which count from 0"
            )
        step, branch, transformer = self._current
        return Call(
            step=step,
            num_steps=self.num_steps,
            layer=layer,
            num_layers=self.num_layers,
            branch=branch,
            transformer=transformer,
        )

    def _method_for(self, call: Call) -> Method:
        """Return what runs this call: dense, or the method at the density of this step."""
        schedule = self.schedules.get(call.transformer, self.schedule)
        method: Any = self.method
        own = getattr(method, "density", None)
        where: dict[str, Any] = {
            "step": call.step,
            "num_steps": call.num_steps,
            "layer": call.layer,
            "num_layers": call.num_layers,
            "own": own,
        }
        if schedule.is_dense(**where):
            return Dense()
        density = schedule.density_at(**where)
        if not hasattr(method, "density") or density is None or density == own:
            return self.method
        return replace(method, density=density)

    def _leader(self, call: Call, memory: LayerMemory, device: torch.device) -> LayerMemory | None:
        """Return the memory of the branch that planned this layer and step first, if another."""
        key = (call.transformer, call.layer, str(device))
        step, first = self._leaders.get(key, (None, memory))
        if step is None or step != call.step or first is memory:
            self._leaders[key] = (call.step, memory)
            return None
        return first

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


def _capturing(tensor: Tensor) -> bool:
    """Return whether a CUDA graph is being captured, in which no time passes."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _count(name: str, value: int | None) -> int | None:
    return None if value is None else config.integer(name, value, least=1)


def _allocate(query: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Allocate `[B, H, S, D]` that lies in memory as asked."""
    batch, heads, length, _ = query.shape
    if layout == "BHSD":
        return query.new_empty(batch, heads, length, value.shape[-1])
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
