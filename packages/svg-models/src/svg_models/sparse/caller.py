"""Which pipeline call a forward pass belongs to."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn

from svg_models.families import TRANSFORMERS
from svg_models.families.base import unwrap

__all__ = ["call_of", "pipelines_running"]

ASKED = (
    "prompt",
    "negative_prompt",
    "num_frames",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
)


def pipelines_running(transformer: nn.Module) -> list[Any]:
    """Return the pipelines that are running on this thread and use a transformer, innermost first.

    A transformer may serve several pipelines, one after the other or at the same time on several
    threads, and only one of them was given to `sparsify`. None of them says who calls, so the call
    stack is asked: a pipeline's call has the pipeline as its `self`, a block of diffusers' modular
    pipelines as its `components`.

    Args:
        transformer: the module whose forward pass begins.
    """
    found: list[Any] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for candidate in _candidates(frame):
            if _uses(candidate, transformer) and not any(candidate is known for known in found):
                found.append(candidate)
        frame = frame.f_back
    return found


def call_of(pipe: Any) -> dict[str, Any]:
    """Return what the call of a pipeline that runs on this thread was asked for.

    Args:
        pipe: the pipeline.

    Returns:
        Prompt, size, steps, guidance and seed under diffusers' names, as far as they are there;
        nothing if no call of it runs.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and pipe is not None:
            variables = frame.f_locals
            if variables.get("self") is pipe:
                asked = {name: variables.get(name) for name in ASKED}
                asked["seed"] = _seed(variables.get("generator"))
                return {name: v for name, v in asked.items() if isinstance(v, str | int | float)}
        frame = frame.f_back
    return {}


def _seed(generator: Any) -> int | None:
    """Return the seed that a generator began with."""
    first = generator[0] if isinstance(generator, list) and generator else generator
    return first.initial_seed() if isinstance(first, torch.Generator) else None


def _candidates(frame: FrameType) -> list[Any]:
    code = frame.f_code
    # Looking into a frame copies its variables, so frames that cannot be meant are passed over.
    if not code.co_argcount or code.co_varnames[0] != "self":
        return []
    if frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "svg_models"):
        return []
    variables = frame.f_locals
    return [variables[name] for name in ("components", "self") if name in variables]


def _uses(candidate: Any, transformer: nn.Module) -> bool:
    if isinstance(candidate, nn.Module | type):
        return False
    parts = getattr(candidate, "__dict__", {})  # asking a stranger for attributes may run its code
    if getattr(parts.get("scheduler"), "timesteps", None) is None:
        return False
    models = (parts.get(name) for name in TRANSFORMERS)
    return any(isinstance(model, nn.Module) and unwrap(model) is transformer for model in models)
