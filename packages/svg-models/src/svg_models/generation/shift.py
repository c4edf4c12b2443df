"""Run a pipeline with another flow shift of its scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from svg_models.errors import SettingError
from svg_models.loading import LoadedPipeline

__all__ = ["check_flow_shift", "shifted"]


def check_flow_shift(loaded: LoadedPipeline) -> None:
    """Refuse a flow shift for a scheduler that has none, or that chooses it by the clip's size.

    Raises:
        SettingError: it names the scheduler.
    """
    _setting(loaded.name, loaded.pipe.scheduler)


@contextmanager
def shifted(loaded: LoadedPipeline, flow_shift: float | None) -> Iterator[None]:
    """Give the pipeline a scheduler with another flow shift, and its own back at the end.

    Args:
        loaded: the model.
        flow_shift: `s` of `sigma = s * t / (1 + (s - 1) * t)`; None leaves the scheduler alone.
    """
    if flow_shift is None:
        yield
        return
    pipe, own = loaded.pipe, loaded.pipe.scheduler
    name = _setting(loaded.name, own)
    pipe.scheduler = type(own).from_config(own.config, **{name: flow_shift})
    try:
        yield
    finally:
        pipe.scheduler = own


def _setting(model: str, scheduler: Any) -> str:
    """Return the name that a scheduler has for its flow shift."""
    config = scheduler.config
    named = "flow_shift" if config.get("use_flow_sigmas") else "shift"
    if named not in config or config.get("use_dynamic_shifting"):
        why = "chooses it by the size of the clip" if named in config else "has none"
        raise SettingError(
            f"flow_shift is a setting of flow matching, and the {type(scheduler).__name__} of "
            f"{model} {why}; leave it out"
        )
    return named
