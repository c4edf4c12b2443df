"""Inside a sparse run: from a forward pass of the transformer to its attention calls."""

from __future__ import annotations

import dataclasses
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from svg_attention import (
    Arrivals,
    Call,
    CallRecord,
    Dense,
    HeadShare,
    Schedule,
    Session,
    SparsePlan,
    TokenLayout,
    UnsupportedError,
    dense_backend,
)
from svg_models import attention_op
from svg_models.caching import NO_CACHE
from svg_models.method_names import MethodSpec
from svg_models.parallel import (
    Share,
    attend_over_ranks,
    begin_over_ranks,
    head_share,
    share_of,
)
from svg_models.recipe import Layers, Recipe
from svg_models.recipes import choose_recipe
from svg_models.sparse.caller import call_of, pipelines_running
from svg_models.sparse.context import ForwardContext, Moment
from svg_models.sparse.hooks import Installation, Slot
from svg_models.sparse.layers import FastDecoder, FastLayers, fp8_backend
from svg_models.sparse.tracker import StepTracker

__all__ = ["Engine"]


class Generation:
    """One video in the making: a pipeline, on one thread.

    Attributes:
        tracker: knows the step.
        session: what computes, and remembers from step to step; None before the first forward pass
            and after the last.
        recipe: what it runs with.
        grid: latent frames, rows and columns of tokens.
        asked: what the pipeline's call was asked for.
        contexts: the forward pass that each transformer is in.
    """

    def __init__(self, tracker: StepTracker) -> None:
        self.tracker = tracker
        self.session: Session | None = None
        self.recipe: Recipe | None = None
        self.grid: tuple[int, int, int] | None = None
        self.asked: dict[str, Any] = {}
        self.contexts: dict[str, ForwardContext] = {}
        self._log: tuple[CallRecord, ...] = ()

    def records(self) -> tuple[CallRecord, ...]:
        """Return the attention calls; waits for the device once."""
        return self._log if self.session is None else tuple(self.session.records())

    def end(self) -> None:
        """Keep the log, and let go of all that was remembered for further steps."""
        self._log, self.session = self.records(), None
        self.contexts.clear()
        self.tracker.finished = True


class Engine:
    """The part of a run that hooks and the operator talk to.

    Each pipeline that uses a transformer of the run, on each thread, has a generation of its own,
    so that two of them share weights and nothing else.

    Args:
        pipe: the pipeline or transformer, held weakly.
        spec: the method that was asked for.
        schedule: the schedule, or None for the recipe's.
        backend: see `svg_attention.sparse_attention`.
        seed: seed of every video.
        profile: time each call.
        layers: what the run does beside sparse attention.

    Attributes:
        number: identifies the run in this process.
        slots: the attentions that the run has taken over; handles count in it.
        fast_layers: what makes the other layers of each transformer faster.
        fast_decoder: what makes decoding faster; None where there is no pipeline, thus no VAE.
        installations: the run's hold on each transformer; empty once it is restored.
        messages: warnings given so far.
    """

    def __init__(
        self,
        pipe: Any,
        spec: MethodSpec,
        schedule: Schedule | None,
        *,
        backend: str,
        seed: int,
        profile: bool,
        layers: Layers,
    ) -> None:
        self._layers = layers
        self._fp8_backend = fp8_backend(backend) if layers.attention == "fp8" else None
        self._pipe = weakref.ref(pipe)
        self._spec, self._schedule = spec, schedule
        self._options: dict[str, Any] = {"backend": backend, "seed": seed, "profile": profile}
        self._generations: dict[tuple[int, int], Generation] = {}
        self._latest: Generation | None = None
        self._lock = threading.Lock()
        self._here = threading.local()
        self.slots: list[Slot] = []
        self.fast_layers: dict[str, FastLayers] = {}
        self.fast_decoder: FastDecoder | None = None
        self.installations: list[Installation] = []
        self.messages: list[str] = []
        self.number = attention_op.register(self)

    @property
    def recipe(self) -> Recipe | None:
        """Return what the last video runs with; None before the first forward pass."""
        return None if self._latest is None else self._latest.recipe

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """Return latent frames, rows and columns of tokens of the last video."""
        return None if self._latest is None else self._latest.grid

    @property
    def asked(self) -> dict[str, Any]:
        """Return what the call that made the last video was asked for."""
        return {} if self._latest is None else dict(self._latest.asked)

    @property
    def caches(self) -> bool:
        """Return whether a cache leaves out the blocks of some steps."""
        return self._layers.cache != NO_CACHE

    @property
    def method_words(self) -> list[str]:
        """Return the options of `svg generate` that say how; none for a ready method."""
        if self._spec.method is not None:
            return []
        asked = {"backend": self._options["backend"], **dataclasses.asdict(self._layers)}
        usual = {"backend": "auto", **dataclasses.asdict(self._spec.layers)}
        words = list(self._spec.words)
        for name in ("backend", "linears", "attention", "fp8_from"):
            if asked[name] != usual[name]:
                words += [f"--{name.replace('_', '-')}", asked[name]]
        return words

    def records(self) -> tuple[CallRecord, ...]:
        """Return the attention calls of the last video; waits for the device once."""
        return () if self._latest is None else self._latest.records()

    def tell(self, message: str) -> None:
        """Warn the user, once per message."""
        if message not in self.messages:
            self.messages.append(message)
            warnings.warn(message, UserWarning, stacklevel=2)

    def tick(
        self,
        name: str,
        transformer: nn.Module,
        *,
        announced: Any,
        timestep: Any,
        latents: Any,
        grid: tuple[int, int, int],
    ) -> Moment:
        """Return where the generation stands that a forward pass belongs to.

        Args:
            name: of the transformer in the run.
            transformer: the module whose forward pass begins.
            announced: see `StepTracker.tick`, also for the others.
            timestep: see there.
            latents: see there.
            grid: see there.
        """
        generation = self._here.generation = self._generation(pipelines_running(transformer))
        return generation.tracker.tick(
            transformer=name, announced=announced, timestep=timestep, latents=latents, grid=grid
        )

    def finish(self, transformer: nn.Module) -> None:
        """Record that the pipeline on this thread has ended a generation."""
        running = pipelines_running(transformer)
        key = threading.get_ident(), id(running[0]) if running else 0
        generation = self._generations.get(key)
        if generation is not None:
            generation.end()

    def _generation(self, running: list[Any]) -> Generation:
        """Return the generation of the innermost pipeline that runs on this thread."""
        pipe = running[0] if running else None
        key = threading.get_ident(), id(pipe) if running else 0
        with self._lock:
            generation = self._generations.get(key)
            if generation is None or (running and generation.tracker.pipe is not pipe):
                self._forget_ended(running)
                known = self._pipe() if pipe is None else pipe
                tracker = StepTracker(known, running=pipe is not None)
                generation = self._generations[key] = Generation(tracker)
            return generation

    def _forget_ended(self, running: list[Any]) -> None:
        """Drop generations that nobody can go on with; the last one's log stays readable."""
        threads = {thread.ident for thread in threading.enumerate()}
        here, on_stack = threading.get_ident(), {0, *map(id, running)}
        for thread, pipe in list(self._generations):
            ended = self._generations[thread, pipe].tracker.finished or thread not in threads
            if ended or (thread == here and pipe not in on_stack):
                del self._generations[thread, pipe]

    def begin_forward(self, transformer: str, context: ForwardContext) -> None:
        """Begin a forward pass; a new video starts with empty memory."""
        generation: Generation = self._here.generation
        if context.moment.new_video or generation.session is None:
            self._begin_video(generation, context)
        if context.moment.step is None:
            self.tell(
                "cannot tell the denoising step, so attention stays dense; call the transformer "
                "inside transformer.cache_context(name, step_index=i, num_inference_steps=n)"
            )
        if transformer not in generation.contexts and generation.session is not None:
            # Experts follow one another: a video does not go back to one, nor to what it remembers.
            for other in generation.contexts:
                generation.session.forget(other)
        generation.contexts[transformer] = context
        if transformer in self.fast_layers:
            fp8, step = self._in_fp8(transformer), context.moment.step
            if fp8:  # two transformers take turns, and both with copies would not fit on a GPU
                for name, others in self.fast_layers.items():
                    if name != transformer:
                        others.release()
            self.fast_layers[transformer].begin_forward(fp8=fp8, step=step)

    def where(self, transformer: str) -> tuple[Moment, bool]:
        """Return where the forward pass of a transformer stands, and whether its step is sparse."""
        generation: Generation = self._here.generation
        moment = generation.contexts[transformer].moment
        layers = next(place.num_layers for place in self.slots if place.transformer == transformer)
        sparse = _is_sparse(generation.recipe, transformer, moment.step, moment.num_steps, layers)
        return moment, sparse

    def _in_fp8(self, transformer: str) -> bool:
        """Return whether the forward pass of a transformer is one of those that fp8 is for."""
        moment, sparse = self.where(transformer)
        return self._layers.in_fp8(sparse=sparse, step=moment.step, num_steps=moment.num_steps)

    def watch(self, watch: Callable[[Call, Tensor, Tensor, SparsePlan], None] | None) -> None:
        """Have each sparse call of the generation on this thread watched; see `Session.watch`."""
        generation: Generation = self._here.generation
        if generation.session is not None:
            generation.session.watch = watch

    def dense_session(self) -> Session:
        """Return a session that computes every call dense, timed as the run's own."""
        return Session(Dense(), **self._options)

    @contextmanager
    def computing_with(self, transformer: str, session: Session) -> Iterator[None]:
        """Compute the attention of a forward pass with another session, on this thread.

        Args:
            transformer: in whose forward pass the run stands; nothing of it is in fp8.
            session: computes, remembers and logs in place of the run's own.
        """
        layers = self.fast_layers.get(transformer)
        moment, _ = self.where(transformer)
        self._here.session = session
        if layers is not None:
            layers.begin_forward(fp8=False, step=moment.step)
        try:
            yield
        finally:
            self._here.session = None
            if layers is not None:
                layers.begin_forward(fp8=self._in_fp8(transformer), step=moment.step)

    def _begin_video(self, generation: Generation, context: ForwardContext) -> None:
        generation.recipe = recipe = self._choose(generation, context)
        generation.grid = context.grid
        generation.asked = call_of(generation.tracker.pipe)
        generation.contexts.clear()
        for layers in self.fast_layers.values():
            layers.release()  # weights may have changed since, as when a LoRA is fused
        generation.session = Session(
            recipe.method, recipe.schedule, schedules=recipe.schedules, **self._options
        )
        self._latest = generation
        self._tell_replaced(generation)

    def _choose(self, generation: Generation, context: ForwardContext) -> Recipe:
        # Not by truth: some wrappers of modules have a length and raise when they are asked for it.
        models = (installed.transformer for installed in self.installations)
        known = (generation.tracker.pipe, self._pipe(), *models)
        recipe = choose_recipe(
            self._spec,
            next(one for one in known if one is not None),
            math.prod(context.grid),
            schedule=self._schedule,
            num_steps=context.moment.num_steps,
            latent_frames=context.grid[0],
        )
        if isinstance(recipe.method, Dense) and recipe.note:
            self.tell(recipe.note)
        why = self._why_without_fp8(recipe, context.moment.num_steps)
        if why:
            self.tell(
                f"{why}, so none is computed in fp8; fp8_from='start' computes all steps in it"
            )
        return dataclasses.replace(recipe, layers=self._layers)

    def _why_without_fp8(self, recipe: Recipe, num_steps: int | None) -> str:
        """Return why no step will be in fp8; empty if one is, or may be, or nothing has to be."""
        waits = self._layers.has_fp8 and self._layers.fp8_from == "sparse"
        if not waits or (num_steps is None and not isinstance(recipe.method, Dense)):
            return ""
        sparse = {
            step
            for installed in self.installations
            for step in range(num_steps or 0)
            if _is_sparse(recipe, installed.name, step, num_steps, len(installed.slots))
        }
        if not sparse:
            return "no step of this video is sparse"
        in_fp8 = self._layers.in_fp8
        if any(in_fp8(sparse=True, step=step, num_steps=num_steps) for step in sparse):
            return ""
        return "only the last steps of this video are sparse, and fp8 leaves them as they are"

    def _tell_replaced(self, generation: Generation) -> None:
        """Warn of transformers of the pipeline that were exchanged for others, which are dense."""
        pipe = self._pipe()
        if pipe is None or isinstance(pipe, nn.Module):
            return
        for installation in self.installations:
            if not installation.still_in(pipe):
                self.tell(
                    f"{installation.name} of the pipeline was replaced after sparsify, and the new "
                    "one is dense; call restore(), then sparsify again"
                )

    def is_of(self, pipe: Any) -> bool:
        """Return whether the run was made for a pipeline, or for a transformer alone."""
        return self._pipe() is pipe

    def release(self) -> None:
        """Let go of what only further steps of this thread's videos would need; see `SparseRun`."""
        for (thread, _), generation in list(self._generations.items()):
            if thread == threading.get_ident():
                generation.end()
        for layers in self.fast_layers.values():
            layers.release()

    def restore(self) -> None:
        """Put back the processors that were there and remove every hook."""
        installations, self.installations = self.installations, []
        for generation in self._generations.values():
            generation.end()
        for layers in self.fast_layers.values():
            layers.remove()
        if self.fast_decoder is not None:
            self.fast_decoder.remove()
        for installed in installations:
            left_alone = installed.remove()
            if left_alone:
                self.tell(
                    f"{len(left_alone)} attention processors of {installed.name} were replaced by "
                    f"others after sparsify, first at {left_alone[0]}; restore left them in place"
                )

    def begin(self, slot: int, query: Tensor, key: Tensor) -> None:
        """Send queries and keys of a call on their way to where several ranks share it.

        Args:
            slot: which attention.
            query: as `attend` gets it next.
            key: as `query`.
        """
        place = self.slots[slot]
        share = share_of(place.processor.original, query.shape[1])
        if share is not None and share.direct is not None:
            exchanged, position = share.of_heads, place.family.text_position
            order = self._head_order(place, exchanged.ranks, query.device)
            begin_over_ranks(exchanged, query, key, text_position=position, order=order)

    def attend(self, slot: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute the attention of one layer in the current forward pass.

        Args:
            slot: which attention.
            query: `[B, S, H, D]`; under context parallelism this rank's share of the tokens.
            key: as `query`.
            value: as `query`.

        Returns:
            As `query`.

        Raises:
            RuntimeError: if the transformer's forward was entered without calling the module.
            ValueError: if the tokens are not those of the grid.
        """
        place = self.slots[slot]
        share = share_of(place.processor.original, query.shape[1])
        if share is None:
            return self._attend(place, query, key, value)
        exchanged, position = share.of_heads, place.family.text_position
        order = self._head_order(place, exchanged.ranks, query.device)
        here = head_share(exchanged, query.shape[2], order=order, deals=share.balanced)

        def attend(q: Tensor, k: Tensor, v: Tensor, arrivals: Arrivals) -> Tensor:
            heads_here = dataclasses.replace(here, arrivals=arrivals)
            return self._attend(place, q, k, v, share=share, heads_here=heads_here)

        return attend_over_ranks(
            exchanged, query, key, value, attend, text_position=position, order=order
        )

    def _head_order(self, place: Slot, ranks: int, device: torch.device) -> Tensor | None:
        """Return the order in which ranks have the heads of a layer; None for their numbers'."""
        generation: Generation | None = getattr(self._here, "generation", None)
        context = None if generation is None else generation.contexts.get(place.transformer)
        if ranks == 1 or generation is None or context is None:
            return None
        session: Session | None = getattr(self._here, "session", None) or generation.session
        call = _call(place, context)
        return None if session is None else session.head_order(call, ranks, device)

    def _attend(
        self,
        place: Slot,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        share: Share | None = None,
        heads_here: HeadShare | None = None,
    ) -> Tensor:
        """Compute attention of all heads or some, over all tokens or, in a ring, a part of them."""
        generation: Generation | None = getattr(self._here, "generation", None)
        context = None if generation is None else generation.contexts.get(place.transformer)
        if generation is None or context is None or generation.session is None:
            raise RuntimeError(
                f"{place.path} ran outside of a forward pass of {place.transformer}; call the "
                "transformer itself, transformer(...), not one of its parts or its forward method"
            )
        tokens, ring = query.shape[1], None if share is None else share.ring
        if share is not None and ring is not None:
            if share.tokens != math.prod(context.grid):
                raise UnsupportedError(
                    {
                        "ring": f"{place.family.title} has tokens of conditions among those of the "
                        "clip, of which no sparse plan is made where each rank has a part of them; "
                        "use ulysses alone"
                    }
                )
            tokens += share.tokens - ring.shares(share.tokens)[ring.rank]
        layout = _layout(place, context.grid, tokens)
        session: Session = getattr(self._here, "session", None) or generation.session
        fp8 = None
        if session is generation.session and self._fp8_backend is not None:
            fp8 = self._fp8_backend if self._in_fp8(place.transformer) else None
        video, counts, before = layout.video_tokens, context.text_counts, context.before

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (_swapped(x.transpose(1, 2), video, before) for x in (q, k, v))
            out = place.family.dense(
                *(q, k, v),
                backend=getattr(place.processor.original, "_attention_backend", None),
                key_lengths=None if counts is None else tuple(before + video + n for n in counts),
            )
            if fp8 is not None and not self._layers.exact_dense:
                self.tell(
                    "dense calls are computed by the kernel that set_attention_backend chose, not "
                    "in fp8"
                )
            return _swapped(out, before, video).transpose(1, 2)

        # A plan knows a clip and, on one side of it, tokens that it attends to exactly. Conditions
        # that stand on the other side than the text go between both, where they all count.
        if before and heads_here is not None:
            heads_here.arrivals.wait()
            heads_here = dataclasses.replace(heads_here, arrivals=Arrivals())
        heads = tuple(_swapped(x, before, video).transpose(1, 2) for x in (query, key, value))
        out = session.attend(
            *heads,
            layout=layout,
            call=_call(place, context),
            text_lengths=(
                context.text_lengths + before
                if context.text_lengths is not None and before
                else context.text_lengths
            ),
            dense=dense if self._asks_original(place, *heads, fp8=fp8 is not None) else None,
            head_share=heads_here,
            out_layout="BSHD",  # as the model goes on with it, so that nothing is copied
            ring=ring,
            backend=fp8,
        )
        return _swapped(out.transpose(1, 2), video, before)

    def _asks_original(
        self, place: Slot, query: Tensor, key: Tensor, value: Tensor, *, fp8: bool
    ) -> bool:
        """Return whether dense calls are computed by the kernel of the original processor."""
        chosen = getattr(place.processor.original, "_attention_backend", None)
        faster = fp8 or dense_backend(query, key, value) != "sdpa"
        return self._layers.exact_dense or chosen is not None or not faster


def _call(place: Slot, context: ForwardContext) -> Call:
    """Return which call of the generation an attention computes."""
    return Call(
        step=context.moment.step,
        num_steps=context.moment.num_steps,
        layer=place.layer,
        num_layers=place.num_layers,
        branch=context.moment.branch,
        transformer=place.transformer,
    )


def _swapped(x: Tensor, first: int, second: int) -> Tensor:
    """Return tokens `[B, S, H, D]` with the first of them and the second swapped."""
    if not first or not second:
        return x
    return torch.cat((x[:, first : first + second], x[:, :first], x[:, first + second :]), dim=1)


def _is_sparse(
    recipe: Recipe | None,
    transformer: str,
    step: int | None,
    num_steps: int | None,
    num_layers: int,
) -> bool:
    """Return whether attention is sparse in a step, in one layer at least."""
    if recipe is None or isinstance(recipe.method, Dense):
        return False
    schedule = recipe.schedule_of(transformer)
    return not schedule.is_dense_throughout(
        step=step,
        num_steps=num_steps,
        num_layers=num_layers,
        own=getattr(recipe.method, "density", None),
    )


def _layout(place: Slot, grid: tuple[int, int, int], tokens: int) -> TokenLayout:
    position = place.family.text_position or place.family.conditions
    text_tokens = tokens - math.prod(grid)
    if text_tokens < 0 or (text_tokens and position is None):
        raise ValueError(
            f"{place.path} of {place.transformer} sees {tokens} tokens, but the clip has "
            f"{grid[0]} x {grid[1]} x {grid[2]} = {math.prod(grid)}; if the sequence is split over "
            "devices, split it as the model's own plan does"
        )
    return TokenLayout(grid=grid, text_tokens=text_tokens, text_position=position or "last")
