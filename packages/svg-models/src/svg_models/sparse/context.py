"""Which denoising step, guidance branch and token grid a forward pass of a transformer belongs to.

Everything here runs once per forward pass, never once per layer, and outside of compiled code.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn

__all__ = ["Clock", "ContextProbe", "ForwardContext", "Moment", "place_probe", "remove_probe"]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where in a generation a forward pass stands.

    Attributes:
        step: denoising step from 0, over all transformers of the pipeline; None if unknown.
        num_steps: denoising steps of this generation; None if unknown.
        branch: guidance branch, for example `"cond"`, `"uncond"`, `"cond_uncond"`.
        source: what told the step: `"cache_context"`, `"scheduler"`, `"pipeline timestep"`,
            `"timestep"` or `"unknown"`.
        new_video: True on the first forward pass of a generation.
    """

    step: int | None
    num_steps: int | None
    branch: str
    source: str
    new_video: bool


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """One forward pass of one transformer.

    Attributes:
        moment: step and guidance branch.
        grid: latent frames, rows and columns of tokens after patching.
        text_lengths: valid text tokens of each sample, integers `[B]` on the model's device; None
            if all count or there are none.
        text_counts: the same numbers on the host.
    """

    moment: Moment
    grid: tuple[int, int, int]
    text_lengths: Tensor | None = None
    text_counts: tuple[int, ...] | None = None


class _NoState(BaseState):
    def reset(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Listener(StateManager):
    """Receive what the pipeline announces through `transformer.cache_context(...)`."""

    def __init__(self) -> None:
        super().__init__(_NoState)
        self.announced: Any = None

    def set_context(self, context: Any) -> None:
        super().set_context(context)
        self.announced = context


class ContextProbe(ModelHook):
    """A diffusers hook that computes nothing and only listens.

    Pipelines announce each denoising call to the stateful hooks of a model, and reset these hooks
    when a generation ends. A copy of a model must not report to the run of the original, so a
    copied probe is mute.
    """

    _is_stateful = True

    def __init__(self, finished: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.listener = _Listener()
        self._finished = finished

    @property
    def announced(self) -> Any:
        """Return the pipeline's `CacheContext` of the running call, or None outside of one."""
        return self.listener.announced

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Note the end of a generation."""
        self.listener.announced = None
        if self._finished is not None:
            self._finished()
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextProbe:
        return ContextProbe()


def _seat(transformer: nn.Module) -> nn.Module:
    # Registering a diffusers hook wraps the module's forward; on the transformer itself that would
    # fight with offloading hooks set later and break deepcopy. Nobody calls forward of a list of
    # blocks, and hooks of descendants are told the same things.
    for module in transformer.modules():
        if isinstance(module, nn.ModuleList):
            return module
    raise ValueError(f"{type(transformer).__name__} has no ModuleList of blocks to listen at")


def place_probe(transformer: nn.Module, probe: ContextProbe, name: str) -> Callable[[], None]:
    """Let `probe` hear what pipelines tell `transformer`.

    Args:
        transformer: the model that pipelines call.
        probe: the listener.
        name: unique name of the hook in diffusers' registry.

    Returns:
        The undo, see `remove_probe`.
    """
    seat = _seat(transformer)
    had_registry = {id(m) for m in (seat, transformer) if hasattr(m, "_diffusers_hook")}
    HookRegistry.check_if_exists_or_initialize(seat).register_hook(probe, name)
    seat.__dict__.pop("forward", None)
    _forget_child_registries(transformer)
    transformer_ref = weakref.ref(transformer)

    def undo() -> None:
        model = transformer_ref()
        if model is not None:
            remove_probe(model, name, had_registry)

    return undo


def remove_probe(transformer: nn.Module, name: str, had_registry: set[int]) -> None:
    """Take the probe out and drop the hook registries that would not be there without it.

    Args:
        transformer: the model given to `place_probe`.
        name: the hook's name.
        had_registry: ids of the modules whose registry was there before.
    """
    seat = _seat(transformer)
    registry = getattr(seat, "_diffusers_hook", None)
    if registry is not None:
        registry.remove_hook(name, recurse=False)
        seat.__dict__.pop("forward", None)
    _forget_child_registries(transformer)
    for module in (seat, transformer):
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and id(module) not in had_registry and not registry.hooks:
            del module._diffusers_hook


def _forget_child_registries(transformer: nn.Module) -> None:
    registry = getattr(transformer, "_diffusers_hook", None)
    if registry is not None:
        registry.invalidate_child_registries_cache()


class Clock:
    """Tell the denoising step of each forward pass, once for all transformers of a pipeline.

    Sources in order: what the pipeline announced (`CacheContext`), the scheduler's step index, the
    pipeline's current timestep, the timestep the transformer was given. The last two count changes,
    so they can only stand in: in bf16, neighbouring steps may have equal timesteps. Calls are never
    counted, because caches skip some of them.

    Args:
        pipe: the pipeline, held weakly, or None for a transformer alone.
    """

    def __init__(self, pipe: object | None = None) -> None:
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._finished = True
        self._schedule: object = None
        self._forget()

    def _forget(self) -> None:
        self._step: int | None = None
        self._value: float | None = None
        self._counted = 0
        self._passes: dict[str, int] = {}

    def finish(self) -> None:
        """Note that the generation has ended: the next forward pass opens a new video."""
        self._finished = True

    def tick(self, *, transformer: str, announced: Any, timestep: Any) -> Moment:
        """Read the clock at the start of a forward pass.

        Args:
            transformer: which transformer runs, for example `"transformer_2"`.
            announced: the pipeline's `CacheContext`, or None.
            timestep: the `timestep` argument of the forward pass: a number, a tensor of any shape
                (the last element counts: with per-token timesteps the first frame's may be 0), or
                None.

        Returns:
            Where the generation stands.
        """
        new_video = self._finished
        if new_video:
            self._forget()
            self._finished = False
        step, num_steps, source = self._read(announced, timestep)
        new_video = self._starts_over(step) or new_video
        if new_video or step != self._step:
            self._passes = {}
        self._step = step
        passes = self._passes.get(transformer, 0)
        self._passes[transformer] = passes + 1
        branch = getattr(announced, "name", None) or f"call {passes}"
        return Moment(
            step=step, num_steps=num_steps, branch=branch, source=source, new_video=new_video
        )

    def _starts_over(self, step: int | None) -> bool:
        # A generation that was interrupted never says that it ended. The next one goes back to an
        # earlier step, or makes a new table of timesteps for its first.
        pipe = None if self._pipe is None else self._pipe()
        schedule = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
        new_schedule = schedule is not self._schedule
        self._schedule = schedule
        if step is None or self._step is None:
            return False
        return step < self._step or (step == 0 and new_schedule)

    def _read(self, announced: Any, timestep: Any) -> tuple[int | None, int | None, str]:
        pipe = None if self._pipe is None else self._pipe()
        num_steps = getattr(announced, "num_inference_steps", None) or _num_steps(pipe)
        step = getattr(announced, "step_index", None)
        if step is not None:
            return int(step), num_steps, "cache_context"
        step = _scheduler_step(pipe, num_steps)
        if step is not None:
            return step, num_steps, "scheduler"
        current = getattr(pipe, "_current_timestep", None)
        if current is not None:
            return self._count(_last_value(current)), num_steps, "pipeline timestep"
        if timestep is not None and num_steps is not None:
            return self._count(_last_value(timestep)), num_steps, "timestep"
        return None, num_steps, "unknown"

    def _count(self, value: float) -> int:
        if self._value is None or value > self._value:
            self._counted = 0
        elif value < self._value:
            self._counted += 1
        self._value = value
        return self._counted


def _scheduler_step(pipe: object | None, num_steps: int | None) -> int | None:
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "step_index"):
        return None
    if scheduler.step_index is None:  # before the first step
        return 0
    start = getattr(scheduler, "begin_index", None)
    if start is None:  # video-to-video enters the schedule late, often without saying where
        start = max(0, len(scheduler.timesteps) - (num_steps or len(scheduler.timesteps)))
    return max(0, int(scheduler.step_index) - int(start))


def _num_steps(pipe: object | None) -> int | None:
    count = getattr(pipe, "_num_timesteps", None)
    if count is None:
        timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
        count = None if timesteps is None else len(timesteps)
    return int(count) if count else None


def _last_value(timestep: Any) -> float:
    # On an accelerator this waits for the device, once per forward pass and only without a context.
    if isinstance(timestep, Tensor):
        return float(timestep.detach().flatten()[-1])
    return float(timestep)
