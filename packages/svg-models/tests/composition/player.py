"""A pipeline reduced to the calls that its transformer gets."""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import zoo
from torch import Tensor

from svg_models.families import transformers_of

STEPS = 6
CASES = {
    "Wan": "wan t2v",
    "HunyuanVideo": "hunyuan_video t2v",
    "HunyuanVideo 1.5": "hunyuan_video15 t2v",
    "Cosmos": "cosmos predict2 v2w",
    "CogVideoX": "cogvideox 1.5 t2v",
    "LTX-Video": "ltx t2v",
    "LTX-2": "ltx2 gated t2v",
    "Mochi": "mochi t2v",
    "Allegro": "allegro t2v",
    "EasyAnimate": "easyanimate t2v",
}
"""One case of the zoo for each family whose processor differs from the others'."""


class Player:
    """A pipeline reduced to its denoising loop: a transformer, and the calls it gets.

    Attributes:
        transformer: the model; a copy may be put in its place.
        steps: how many of the recorded steps to play.
        calls: what the transformer is given in each of them.
    """

    def __init__(self, transformer: Any, calls: list[dict[str, Any]], branch: str) -> None:
        self.transformer = transformer
        self.steps = len(calls)
        self.calls, self._branch = calls, branch
        self._current_timestep: float | None = None
        self.scheduler = SimpleNamespace(timesteps=[900.0 - 100.0 * n for n in range(len(calls))])

    @property
    def _num_timesteps(self) -> int:
        return self.steps

    @property
    def current_timestep(self) -> float | None:
        """Return the timestep as PAB wants to know it."""
        return self._current_timestep

    def fresh(self, steps: int) -> Player:
        """Return a player with a model of its own."""
        return Player(copy.deepcopy(self.transformer), self.calls[:steps], self._branch)

    def play(self) -> Tensor:
        """Return what the model answers to each call, stacked."""
        outputs = []
        for step, call in enumerate(self.calls):
            self._current_timestep = self.scheduler.timesteps[step]
            with torch.no_grad(), self._announce(step):
                outputs.append(self.transformer(**call)[0])
        return torch.stack(outputs)

    def _announce(self, step: int) -> Any:
        if not hasattr(self.transformer, "cache_context"):
            return nullcontext()
        return self.transformer.cache_context(
            self._branch, step_index=step, num_inference_steps=self.steps
        )


@cache
def recorded(family: str) -> Player:
    """Record the first guidance branch of a pipeline of the zoo, once for each family."""
    return record(zoo.case(CASES[family]), STEPS)


def record(case: zoo.Case, steps: int) -> Player:
    """Record the first guidance branch of a case, over so many steps."""
    pipe = case.build()
    calls: list[dict[str, Any]] = []
    transformer = transformers_of(pipe)["transformer"]

    def keep(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        names = list(inspect.signature(module.forward).parameters)
        calls.append(dict(zip(names, arguments, strict=False)) | named)

    hook = transformer.register_forward_pre_hook(keep, with_kwargs=True)
    case.run(pipe, num_inference_steps=steps)
    hook.remove()
    return Player(transformer, calls[:: len(case.branches)], case.branches[0])
