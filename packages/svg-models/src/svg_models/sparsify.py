"""Make a diffusers pipeline sparse, and dense again."""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from svg_attention import Call, Dense, Method, Schedule, Session, TokenLayout
from svg_models import operator
from svg_models.context import Clock, ForwardContext, Moment
from svg_models.families import family_of, transformers_of
from svg_models.install import Installation, Slot
from svg_models.recipes import Recipe, recipe_for
from svg_models.stats import RunStats

__all__ = ["SparseRun", "sparsify"]


def sparsify(
    pipe: Any,
    method: Method | None = None,
    schedule: Schedule | None = None,
    *,
    backend: str = "auto",
    seed: int = 0,
    profile: bool = False,
) -> SparseRun:
    """Make the self-attention of a diffusers video pipeline sparse until `restore`.

    Only this instance changes: its self-attentions get processors of this package and its
    transformers a hook. Nothing of diffusers is patched and no global is set. Use the result as a
    context manager, or call `restore` on it.

        with sparsify(pipe) as run:
            frames = pipe(prompt, num_frames=81).frames[0]
        print(run.stats().mean_density)

    Args:
        pipe: a pipeline of a known family, with one or two transformers, or a transformer alone.
            For a transformer alone, tell the step with diffusers' own
            `transformer.cache_context("cond", step_index=i, num_inference_steps=n)`; without it
            every call stays dense.
        method: `SVG2(...)`, `SVG1(...)`, `Dense()` or another method of svg_attention. None takes
            the recipe of the model for the clip's size, see `recipe_for`.
        schedule: steps and layers that stay dense. None takes the recipe's.
        backend: who computes sparse attention, see `svg_attention.sparse_attention`.
        seed: seed of every random choice; each video starts from it again.
        profile: time each attention call. Costs a little, and a synchronisation when read.

    Returns:
        The run.

    Raises:
        TypeError: if `pipe` has no transformer.
        ValueError: if no family covers it, it is sparse already, or its attention processors were
            replaced by some that this package cannot reproduce.
        UnsupportedError: if it runs ring attention over several devices (Ulysses is supported).
    """
    return SparseRun(pipe, method, schedule, backend=backend, seed=seed, profile=profile)


class SparseRun:
    """A pipeline made sparse; made by `sparsify`.

    Attributes:
        number: identifies the run in this process.
        recipe: what the current video runs with; None before the first forward pass.
        messages: warnings given so far.
    """

    def __init__(
        self,
        pipe: Any,
        method: Method | None,
        schedule: Schedule | None,
        *,
        backend: str,
        seed: int,
        profile: bool,
    ) -> None:
        found = transformers_of(pipe)
        self._pipe = weakref.ref(pipe)
        self._method, self._schedule = method, schedule
        self._options: dict[str, Any] = {"backend": backend, "seed": seed, "profile": profile}
        self._clock = Clock(pipe)
        self._session: Session | None = None
        self._contexts: dict[str, ForwardContext] = {}
        self.recipe: Recipe | None = None
        self.messages: list[str] = []
        self.number = operator.register(self)
        self._installations: list[Installation] = []
        self._slots: list[Slot] = []
        try:
            self._install(found)
        except BaseException:
            self.restore()
            raise

    def _install(self, transformers: Mapping[str, nn.Module]) -> None:
        families = {name: (model, family_of(model)) for name, model in transformers.items()}
        for name, (transformer, family) in families.items():
            installed = Installation(self, name, transformer, family, len(self._slots))
            self._installations.append(installed)
            self._slots.extend(installed.slots)

    def __enter__(self) -> SparseRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()

    @property
    def active(self) -> bool:
        """Tell whether the pipeline is sparse through this run."""
        return bool(self._installations)

    def restore(self) -> None:
        """Put back the very processors that were there and remove every hook.

        What the run recorded stays readable. Calling it twice does no harm. Processors that
        somebody else put in place meanwhile are left there.
        """
        installations, self._installations = self._installations, []
        for installed in installations:
            left_alone = installed.remove()
            if left_alone:
                self.tell(
                    f"{len(left_alone)} attention processors of {installed.name} were replaced by "
                    f"others after sparsify, first at {left_alone[0]}; restore left them in place"
                )

    def stats(self) -> RunStats:
        """Return what the last video did; waits for the device once."""
        records = () if self._session is None else tuple(self._session.records())
        recipe = {} if self.recipe is None else _describe(self.recipe)
        return RunStats(records=records, recipe=recipe, messages=tuple(self.messages))

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write a self-contained HTML page about the last video.

        Args:
            path: where to write it.

        Returns:
            The path written.
        """
        from svg_models.report import write_run_report

        written: Path = write_run_report(self.stats(), Path(path))
        return written

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

    def _begin_video(self, context: ForwardContext) -> None:
        recipe = self._choose(context)
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
        if self._method is not None and self._schedule is not None:
            return Recipe(method=self._method, schedule=self._schedule, source="user")
        tokens = math.prod(context.grid)
        recipe = recipe_for(self._pipe(), tokens, num_steps=context.moment.num_steps)
        if self._method is not None:
            return Recipe(method=self._method, schedule=recipe.schedule, source="user")
        if isinstance(recipe.method, Dense):
            self.tell(recipe.note)
        return Recipe(
            method=recipe.method,
            schedule=self._schedule or recipe.schedule,
            source=recipe.source,
            note=recipe.note,
        )

    def attend(
        self, slot: int, query: Tensor, key: Tensor, value: Tensor, text_lengths: Tensor | None
    ) -> Tensor:
        """Compute the attention of one layer in the current forward pass; called by the operator.

        Args:
            slot: which attention.
            query: `[B, S, H, D]`.
            key: as `query`.
            value: as `query`.
            text_lengths: int `[B]` or None.

        Returns:
            `[B, S, H, D]`.

        Raises:
            RuntimeError: if the transformer's forward was entered without calling the module.
            ValueError: if the tokens are not those of the grid.
        """
        place = self._slots[slot]
        context = self._contexts.get(place.transformer)
        if context is None or self._session is None:
            raise RuntimeError(
                f"{place.path} ran outside of a forward pass of {place.transformer}; call the "
                "transformer itself, transformer(...), not one of its parts or its forward method"
            )

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return place.family.dense(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                backend=getattr(place.processor.original, "_attention_backend", None),
                text_lengths=text_lengths,
            ).transpose(1, 2)

        out = self._session.attend(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            layout=_layout(place, context.grid, query.shape[1]),
            call=Call(
                step=context.moment.step,
                num_steps=context.moment.num_steps,
                layer=place.layer,
                num_layers=place.num_layers,
                branch=context.moment.branch,
                transformer=place.transformer,
            ),
            text_lengths=text_lengths,
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


def _describe(recipe: Recipe) -> dict[str, Any]:
    return {
        "method": type(recipe.method).__name__,
        "settings": recipe.method.to_dict(),
        "schedule": recipe.schedule.to_dict(),
        "source": recipe.source,
        "note": recipe.note,
    }
