"""Training batches cut from footage: pixels for the autoencoder, latents for the transformer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import footage
from .codec import WholeClip
from .footage import Source
from .loop import Clock

MOST_STARTS = 4
PROMPT_DROP = 0.1
LATENT = 8  # pixels of a latent


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes that are trained on.

    Attributes:
        frames: of a clip.
        full: rows and columns of latents at full size.
        half: the same of clips at half their size.
        full_batch: clips.
        half_batch: clips.
        half_until: part of the run in which only clips at half their size are seen.
        half_after: share of them in the steps after that.
        pixels: frames and side of the pieces that the autoencoder learns from.
        pixel_batch: pieces.
    """

    frames: int = 45
    full: tuple[int, int] = (24, 42)
    half: tuple[int, int] = (12, 20)
    full_batch: int = 8
    half_batch: int = 32
    half_until: float = 0.4
    half_after: float = 0.2
    pixels: tuple[tuple[int, int], ...] = ((17, 128), (17, 128), (45, 80))
    pixel_batch: int = 24

    @property
    def height(self) -> int:
        """Return pixels of a clip at full size."""
        return self.full[0] * LATENT

    @property
    def width(self) -> int:
        """Return pixels of a clip at full size."""
        return self.full[1] * LATENT


class Window(NamedTuple):
    """Frames of a source: from which, and every how many."""

    start: int
    stride: int


class Piece(NamedTuple):
    """What one step of the autoencoder trains on: `[B, 3, T, H, W]` from -1 to 1."""

    video: Tensor
    label: str


class Latents(NamedTuple):
    """What one step of the transformer trains on."""

    latents: Tensor
    ids: Tensor
    mask: Tensor
    text_length: int
    label: str


def windows(frames: int, rate: float, *, length: int) -> list[Window]:
    """Return where clips of `length` frames begin, evenly spread over a source.

    Where a source of 24 frames a second or more is long enough, every second frame makes a clip,
    too: most sources have 15 frames a second.
    """
    found = []
    for stride in (1, 2) if rate >= 24 else (1,):
        room = frames - ((length - 1) * stride + 1)
        if room < 0:
            continue
        starts = min(MOST_STARTS, room + 1)
        found += [Window(round(room * i / max(1, starts - 1)), stride) for i in range(starts)]
    return found


def prompt(number: int, *, mirrored: bool = False) -> str:
    """Return the prompt that stands for a source."""
    return f"clip {number} mirrored" if mirrored else f"clip {number}"


class Footage:
    """Hold every clip of a data file on a device, uint8 `[T, 3, H, W]`.

    Args:
        path: what `footage.py` wrote.
        device: where to.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.device = device
        self.sources: list[Source] = []
        self.frames: list[Tensor] = []
        for source, frames in footage.read(path):
            self.sources.append(source)
            self.frames.append(torch.from_numpy(frames).to(device).permute(0, 3, 1, 2))

    def chosen(self, *, held_out: bool, length: int = 0) -> list[int]:
        """Return the sources of one kind that have `length` frames."""
        return [
            index
            for index, source in enumerate(self.sources)
            if source.held_out == held_out and source.frames >= length
        ]

    def clip(self, index: int, window: Window, length: int, *, half: bool = False) -> Tensor:
        """Return a clip `[3, T, H, W]` from -1 to 1, its size a multiple of 8 pixels."""
        last = window.start + (length - 1) * window.stride + 1
        video = self.frames[index][window.start : last : window.stride]
        video = (video.float() / 127.5 - 1).transpose(0, 1)
        if half:
            video = F.avg_pool3d(video, (1, 2, 2))
        height, width = (side // LATENT * LATENT for side in video.shape[-2:])
        return video[..., :height, :width]

    def pieces(self, plan: Plan, seed: int, clock: Clock) -> Iterator[Piece]:
        """Yield batches for the autoencoder without end; a step's is a function of its number."""
        while True:
            rng = random.Random(f"pieces-{seed}-{clock.step}")
            size = rng.choice(plan.pixels)
            # Ranks take pieces of one size, so that none waits for another.
            ranks = clock.options.ranks
            own = random.Random(f"pieces-{seed}-{clock.step}-{ranks.rank}")
            yield self.draw(own, size, max(1, plan.pixel_batch // ranks.count))

    def draw(self, rng: random.Random, size: tuple[int, int], count: int) -> Piece:
        """Cut a batch of pieces of so many frames and pixels a side from what is trained on."""
        length, side = size
        long = self.chosen(held_out=False, length=length)
        video = [self._piece(rng, rng.choice(long), length, side) for _ in range(count)]
        return Piece(torch.stack(video), f"{length}x{side}")

    def _piece(self, rng: random.Random, index: int, length: int, side: int) -> Tensor:
        frames = self.frames[index]
        start = rng.randint(0, len(frames) - length)
        # A third shows twice the area at half the size.
        scale = 2 if rng.random() < 0.33 and min(frames.shape[-2:]) >= 2 * side else 1
        top = rng.randint(0, frames.shape[-2] - side * scale)
        left = rng.randint(0, frames.shape[-1] - side * scale)
        cut = frames[
            start : start + length, :, top : top + side * scale, left : left + side * scale
        ]
        video = (cut.float() / 127.5 - 1).transpose(0, 1)
        if scale > 1:
            video = F.avg_pool3d(video, (1, scale, scale))
        return video.flip(-1) if rng.random() < 0.5 else video


class LatentClips:
    """Hold the latents of every window of every source, as shown and mirrored, at two sizes.

    Cutting from them moves a clip in steps of a latent, and costs nothing.

    Args:
        clips: the footage.
        codec: the trained autoencoder.
        plan: sizes.
        held_out: which of the sources.
        mean: of each channel, `[C]`.
        std: of each channel, `[C]`.
    """

    def __init__(
        self,
        clips: Footage,
        codec: WholeClip,
        plan: Plan,
        *,
        held_out: bool,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.plan = plan
        self.numbers = clips.chosen(held_out=held_out, length=plan.frames)
        if not self.numbers:
            raise ValueError(f"no clip of the data has the {plan.frames} frames that a clip takes")
        shift, scale = (
            torch.tensor(x, device=clips.device).view(1, -1, 1, 1, 1) for x in (mean, std)
        )
        # [source][half][window, mirrored] -> [C, t, h, w]
        self.stored: list[tuple[list[Tensor], list[Tensor]]] = []
        for index in self.numbers:
            source = clips.sources[index]
            sizes: tuple[list[Tensor], list[Tensor]] = ([], [])
            for window in windows(source.frames, source.rate, length=plan.frames):
                for half, kept in enumerate(sizes):
                    video = clips.clip(index, window, plan.frames, half=bool(half))
                    both = torch.stack([video, video.flip(-1)])
                    latents = (codec.moments(both)[0].float() - shift) / scale
                    kept += list(latents.half().unbind(0))
            self.stored.append(sizes)

    def batches(self, tokenizer: Any, seed: int, clock: Clock, device: str) -> Iterator[Latents]:
        """Yield batches for the transformer without end.

        A step's batch follows from its number, and from how much of the run is done: small clips
        come first.
        """
        while True:
            rng = random.Random(f"latents-{seed}-{clock.step}")
            early = clock.progress < self.plan.half_until
            half = early or rng.random() < self.plan.half_after
            ranks = clock.options.ranks
            own = random.Random(f"latents-{seed}-{clock.step}-{ranks.rank}")
            yield self.draw(own, tokenizer, device, half=half, share=ranks.count)

    def draw(
        self, rng: random.Random, tokenizer: Any, device: str, *, half: bool, share: int = 1
    ) -> Latents:
        """Cut a batch, or the part of it that one of `share` ranks takes."""
        rows, columns = self.plan.half if half else self.plan.full
        count = max(1, (self.plan.half_batch if half else self.plan.full_batch) // share)
        cuts, texts = [], []
        for _ in range(count):
            place = rng.randrange(len(self.numbers))
            kept = self.stored[place][half]
            which = rng.randrange(len(kept))
            top = rng.randint(0, kept[which].shape[-2] - rows)
            left = rng.randint(0, kept[which].shape[-1] - columns)
            cuts.append(kept[which][..., top : top + rows, left : left + columns])
            text = prompt(self.numbers[place], mirrored=which % 2 == 1)
            texts.append("" if rng.random() < PROMPT_DROP else text)
        tokens = tokenizer(
            texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt"
        )
        latents = torch.stack(cuts).float()
        size = f"{self.plan.frames}x{rows * LATENT}x{columns * LATENT}"
        ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
        # A prompt is found more easily among fewer empty places; the pipeline has 512.
        return Latents(latents, ids, mask, 64 if half else 512, size)
