"""Inside a sparse run: from a forward pass of the transformer to its attention calls."""

from __future__ import annotations

import math
import warnings
import weakref
from typing import Any

from torch import Tensor

from svg_attention import Call, CallRecord, Dense, Schedule, Session, TokenLayout
from svg_models import attention_op
from svg_models.method_names import MethodSpec
from svg_models.recipes import Recipe, choose_recipe
from svg_models.sparse.context import Clock, ForwardContext, Moment
from svg_models.sparse.hooks import Slot
from svg_models.sparse.layers import FastLayers

__all__ = ["Engine"]


class Engine:
    """The part of a run that hooks and the operator talk to.

    Args:
        pipe: the pipeline or transformer, held weakly.
        spec: the method that was asked for.
        schedule: the schedule, or None for the recipe's.
        backend: see `svg_attention.sparse_attention`.
        seed: seed of every video.
        profile: time each call.

    Attributes:
        number: identifies the run in this process.
        slots: the attentions that the run has taken over; handles count in it.
        layers: what the run does to the other layers of each transformer.
        recipe: what the current video runs with; None before the first forward pass.
        grid: its latent frames, rows and columns of tokens.
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
    ) -> None:
        self._pipe = weakref.ref(pipe)
        self._spec, self._schedule = spec, schedule
        self._options: dict[str, Any] = {"backend": backend, "seed": seed, "profile": profile}
        self._clock = Clock(pipe)
        self._session: Session | None = None
        self._contexts: dict[str, ForwardContext] = {}
        self.slots: list[Slot] = []
        self.layers: dict[str, FastLayers] = {}
        self.recipe: Recipe | None = None
        self.grid: tuple[int, int, int] | None = None
        self.messages: list[str] = []
        self.number = attention_op.register(self)

    def records(self) -> tuple[CallRecord, ...]:
        """Return the attention calls of the last video; waits for the device once."""
        return () if self._session is None else tuple(self._session.records())

    def tell(self, message: str) -> None:
        """Warn the user, once per message."""
        if message not in self.messages:
            self.messages.append(message)
            warnings.warn(message, UserWarning, stacklevel=2)

    def tick(self, transformer: str, announced: Any, timestep: Any) -> Moment:
        """Read the clock at the start of a forward pass of `transformer`."""
        return self._clock.tick(transformer=transformer, announced=announced, timestep=timestep)

    def finish(self) -> None:
        """Note that the pipeline has ended a generation."""
        self._clock.finish()

    def begin_forward(self, transformer: str, context: ForwardContext) -> None:
        """Take note of a forward pass that starts; a new video starts with empty memory."""
        moment = context.moment
        if moment.new_video or self._session is None:
            self._begin_video(context)
        if moment.step is None:
            self.tell(
                "cannot tell the denoising step, so attention stays dense; call the transformer "
                "inside transformer.cache_context(name, step_index=i, num_inference_steps=n)"
            )
        self._contexts[transformer] = context
        if transformer in self.layers:
            self.layers[transformer].begin_forward(sparse=self._is_sparse(moment))

    def _is_sparse(self, moment: Moment) -> bool:
        """Return whether attention is sparse in a step, at least in the last layers."""
        if self.recipe is None or isinstance(self.recipe.method, Dense):
            return False
        step, num_steps = moment.step, moment.num_steps
        last = {"layer": 1, "num_layers": 1}
        return not self.recipe.schedule.is_dense(step=step, num_steps=num_steps, **last)

    def _begin_video(self, context: ForwardContext) -> None:
        recipe = self._choose(context)
        self.grid = context.grid
        same = self.recipe is not None and (recipe.method, recipe.schedule) == (
            self.recipe.method,
            self.recipe.schedule,
        )
        self.recipe = recipe
        if self._session is not None and same:
            self._session.reset()
        else:
            self._session = Session(recipe.method, recipe.schedule, **self._options)

    def _choose(self, context: ForwardContext) -> Recipe:
        recipe = choose_recipe(
            self._spec,
            self._pipe(),
            math.prod(context.grid),
            schedule=self._schedule,
            num_steps=context.moment.num_steps,
            latent_frames=context.grid[0],
        )
        if isinstance(recipe.method, Dense) and recipe.note:
            self.tell(recipe.note)
        return recipe

    def attend(self, slot: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute the attention of one layer in the current forward pass.

        Args:
            slot: which attention.
            query: `[B, S, H, D]`.
            key: as `query`.
            value: as `query`.

        Returns:
            `[B, S, H, D]`.

        Raises:
            RuntimeError: if the transformer's forward was entered without calling the module.
            ValueError: if the tokens are not those of the grid.
        """
        place = self.slots[slot]
        context = self._contexts.get(place.transformer)
        if context is None or self._session is None:
            raise RuntimeError(
                f"{place.path} ran outside of a forward pass of {place.transformer}; call the "
                "transformer itself, transformer(...), not one of its parts or its forward method"
            )
        layout = _layout(place, context.grid, query.shape[1])
        video, counts = layout.video_tokens, context.text_counts

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return place.family.dense(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                backend=getattr(place.processor.original, "_attention_backend", None),
                key_lengths=None if counts is None else tuple(video + n for n in counts),
            ).transpose(1, 2)

        out = self._session.attend(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            layout=layout,
            call=Call(
                step=context.moment.step,
                num_steps=context.moment.num_steps,
                layer=place.layer,
                num_layers=place.num_layers,
                branch=context.moment.branch,
                transformer=place.transformer,
            ),
            text_lengths=context.text_lengths,
            dense=dense,
        )
        return out.transpose(1, 2)


def _layout(place: Slot, grid: tuple[int, int, int], tokens: int) -> TokenLayout:
    position = place.family.text_position
    text_tokens = tokens - math.prod(grid)
    if text_tokens < 0 or (text_tokens and position is None):
        raise ValueError(
            f"{place.path} of {place.transformer} sees {tokens} tokens, but the clip has "
            f"{grid[0]} x {grid[1]} x {grid[2]} = {math.prod(grid)}; if the sequence is split over "
            "devices, split it as the model's own plan does"
        )
    return TokenLayout(grid=grid, text_tokens=text_tokens, text_position=position or "last")
