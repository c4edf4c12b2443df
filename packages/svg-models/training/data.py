"""Training batches as a function of the step number alone, so that a run can stop and go on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .clips import caption, sample_scene
from .render import Params, parameters

PROMPT_DROP = 0.1


@dataclass(frozen=True, kw_only=True)
class Size:
    """One clip size of the mixture.

    `start` and `stop` are fractions of the run between which it is drawn, with `weight`; `window`
    is the side of the visible part of the frame (1 = all of it).
    """

    frames: int
    side: int
    batch: int
    weight: float
    text_length: int = 64
    window: float = 1.0
    start: float = 0.0
    stop: float = 1.0


class Batch(NamedTuple):
    """What one step trains on, before it is drawn."""

    step: int
    size: Size
    window: tuple[float, float, float]
    params: Params
    ids: Tensor
    mask: Tensor

    @property
    def label(self) -> str:
        """Name the size in a log."""
        return f"{self.size.frames}x{self.size.side}"


def choose_size(sizes: tuple[Size, ...], *, step: int, steps: int, seed: int) -> Size:
    """Draw the clip size of a step among those active at this point of the run."""
    done = step / max(1, steps)
    active = [size for size in sizes if size.start <= done < size.stop]
    rng = random.Random(f"size-{seed}-{step}")
    return rng.choices(active, weights=[size.weight for size in active])[0]


def write_caption(scene_seed: int, rng: random.Random) -> str:
    """Caption a training scene in varied wording; empty for one in ten (guidance needs it)."""
    if rng.random() < PROMPT_DROP:
        return ""
    text = caption(sample_scene(scene_seed), say=rng)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 else text


def make_batch(
    step: int, *, sizes: tuple[Size, ...], steps: int, seed: int, tokenizer: Any
) -> Batch:
    """Make the batch of one step; the same arguments give the same batch."""
    size = choose_size(sizes, step=step, steps=steps, seed=seed)
    rng = random.Random(f"batch-{seed}-{step}")
    seeds = [rng.getrandbits(48) for _ in range(size.batch)]
    texts = [write_caption(scene_seed, rng) for scene_seed in seeds]
    tokens = tokenizer(
        texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt"
    )
    slack = 1.0 - size.window
    window = (rng.uniform(0, slack), rng.uniform(0, slack), size.window)
    params = parameters([sample_scene(scene_seed) for scene_seed in seeds])
    return Batch(step, size, window, params, tokens.input_ids, tokens.attention_mask)


class Batches(torch.utils.data.Dataset):
    """The batches from `first` to `steps`, indexed from zero."""

    def __init__(
        self, *, first: int, sizes: tuple[Size, ...], steps: int, seed: int, tokenizer: Any
    ) -> None:
        """Remember what `make_batch` needs."""
        self.first = first
        self.steps = steps
        self.options = {"sizes": sizes, "steps": steps, "seed": seed, "tokenizer": tokenizer}

    def __len__(self) -> int:
        """Return how many steps are left."""
        return max(0, self.steps - self.first)

    def __getitem__(self, index: int) -> Batch:
        """Make the batch of step `first + index`."""
        return make_batch(self.first + index, **self.options)


def _limit_threads(_: int) -> None:
    torch.set_num_threads(1)


def stream(batches: Batches, *, workers: int) -> Iterator[Batch]:
    """Yield batches in order, made ahead of time by `workers` processes (0: in this one)."""
    if workers == 0:
        return (batches[i] for i in range(len(batches)))
    return iter(
        torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4,
            worker_init_fn=_limit_threads,
        )
    )
