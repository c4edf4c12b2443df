"""Listen to what a pipeline announces to its transformer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import nn

__all__ = ["ContextProbe", "place_probe", "remove_probe"]


class _NoState(BaseState):
    def reset(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Listener(StateManager):
    """Receive what the pipeline announces through `transformer.cache_context(...)`."""

    def __init__(self) -> None:
        super().__init__(_NoState)
        # Pipelines on several threads may share the model, and announce from their own thread.
        self._heard = threading.local()

    @property
    def announced(self) -> Any:
        return getattr(self._heard, "context", None)

    def set_context(self, context: Any) -> None:
        super().set_context(context)
        self._heard.context = context


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
        """Record the end of a generation."""
        self.listener.set_context(None)
        if self._finished is not None:
            self._finished()
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextProbe:
        return ContextProbe()

    def __reduce__(self) -> tuple[type[ContextProbe], tuple[()]]:
        return ContextProbe, ()


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
    registry = HookRegistry.check_if_exists_or_initialize(seat)
    registry.remove_hook(name, recurse=False)  # a mute one, if the model was loaded from a pickle
    registry.register_hook(probe, name)
    seat.__dict__.pop("forward", None)
    # The registry keeps the forward that it wrapped; bound to the list, it could not be unpickled.
    probe.fn_ref.forward = type(seat).forward
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
