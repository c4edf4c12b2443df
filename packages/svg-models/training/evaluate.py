"""Measure the embedded model: prompt agreement, reconstruction, how peaked its attention is.

    cd packages/svg-models; python -m training.evaluate --out report --prompts 64

The same code runs on a CPU and on a GPU; a clip depends on its own seed, never on its batch.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from svg_models.embedded import embedded_path
from svg_models.embedded.defaults import FRAMES, GUIDANCE, SHEET_PROMPTS, STEPS
from svg_models.files import atomic_path

from .checker import check_group
from .clips import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    PATTERNS,
    SHAPES,
    TEXTURES,
    Group,
    Scene,
    caption,
    scene_of,
)
from .render import parameters, render


def held_out_scenes(count: int, *, seed: int = 0) -> list[Scene]:
    """Make scenes whose colour, shape and direction never came together in training.

    Of every 16: ten show one shape, three a pair or a trio, three two different shapes.
    """
    rng = random.Random(f"held-out-{seed}")

    def pick(number: int, besides: str = "") -> Group:
        while True:
            group = Group(
                count=number,
                size=rng.choice(("", "large")) if number == 1 and not besides else "",
                texture=rng.choice(("plain", *TEXTURES)),
                colour=rng.choice(list(COLOURS)),
                shape=rng.choice(SHAPES),
                direction=rng.choice(list(DIRECTIONS)),
            )
            if group.held_out and group.colour != besides:
                return group

    scenes = []
    for i in range(count):
        kind = i % 16
        if kind < 10:
            groups: tuple[Group, ...] = (pick(1),)
        elif kind < 13:
            groups = (pick(2 + i % 2),)
        else:
            first = pick(1, besides="none")
            groups = (first, pick(1, besides=first.colour))
        scenes.append(
            scene_of(
                groups,
                background=rng.choice(list(BACKGROUNDS)),
                pattern=rng.choice(PATTERNS),
                seed=rng.getrandbits(40),
            )
        )
    return scenes


def draw(scenes: Sequence[Scene], *, frames: int, side: int) -> NDArray[np.float32]:
    """Draw scenes as `[N, T, side, side, 3]` in [0, 1]: what a perfect model would show."""
    video = render(parameters(scenes), num_frames=frames, height=side, width=side)
    return ((video + 1) / 2).permute(0, 2, 3, 4, 1).numpy()


def generate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    frames: int = FRAMES,
    side: int = 128,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    text_length: int = 512,
    seed: int = 0,
    batch: int = 1,
) -> NDArray[np.float32]:
    """Generate a clip per prompt, `[N, T, side, side, 3]` in [0, 1]; clip i has seed `seed + i`."""
    clips = []
    for start in range(0, len(prompts), batch):
        chunk = list(prompts[start : start + batch])
        generators = [
            torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(chunk))
        ]
        clips.append(
            pipe(
                chunk,
                height=side,
                width=side,
                num_frames=frames,
                num_inference_steps=steps,
                guidance_scale=guidance,
                max_sequence_length=text_length,
                generator=generators,
                output_type="np",
            ).frames
        )
    return np.concatenate(clips).astype(np.float32)


def agreement(clips: NDArray[np.float32], scenes: Sequence[Scene]) -> dict[str, float]:
    """Return the fractions of groups whose colour, direction, count and shape the pixels confirm.

    `clip` is the fraction of clips in which colour and direction of every group are right.
    """
    verdicts, whole = [], []
    for frames, scene in zip(clips, scenes, strict=True):
        own = [
            check_group(
                frames, group, others=tuple(g.colour for g in scene.groups if g is not group)
            )
            for group in scene.groups
        ]
        verdicts += own
        whole.append(all(v.colour and v.direction for v in own))
    names = ("colour", "direction", "count", "shape", "all")
    result = {name: float(np.mean([getattr(v, name) for v in verdicts])) for name in names}
    return {"clip": float(np.mean(whole)), **result, "groups": len(verdicts), "clips": len(whole)}


@torch.no_grad()
def reconstruction(vae: Any, *, frames: int, side: int, count: int, seed: int = 0) -> list[float]:
    """PSNR in dB of encoding and decoding `count` held-out clips, one figure per clip."""
    scenes = held_out_scenes(count, seed=seed)
    result = []
    for scene in scenes:
        video = render(parameters([scene]), num_frames=frames, height=side, width=side)
        video = video.to(vae.device, vae.dtype)
        again = vae.decode(vae.encode(video).latent_dist.mode()).sample
        mse = (again.float() - video.float()).square().mean().item() / 4
        result.append(-10 * float(np.log10(mse)))
    return result


def coverage(query: Tensor, key: Tensor, *, mass: float = 0.9, rows: int = 128) -> Tensor:
    """Return the mean fraction of keys that holds `mass` of a row's attention: `[H]`.

    Args:
        query: `[B, S, H, D]`; `rows` evenly spaced rows are looked at.
        key: `[B, S, H, D]`.
        mass: the part of the attention to cover.
        rows: rows per head.
    """
    picked = torch.linspace(0, query.shape[1] - 1, min(rows, query.shape[1])).long()
    q = query[:, picked.to(query.device)].transpose(1, 2).float()
    k = key.transpose(1, 2).float()
    weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
    reached = weights.sort(dim=-1, descending=True).values.cumsum(-1) < mass
    return (reached.sum(-1) + 1).float().mean((0, 2)) / k.shape[2]


@contextmanager
def _watch_attention(found: list[Tensor]) -> Iterator[None]:
    from diffusers.models.transformers import transformer_wan

    stock = transformer_wan.dispatch_attention_fn

    def watch(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if query.shape[1] == key.shape[1]:
            found.append(coverage(query, key).cpu())
        return stock(query, key, value, **options)

    with mock.patch.object(transformer_wan, "dispatch_attention_fn", watch):
        yield


def attention_coverage(
    pipe: Any, prompts: Sequence[str], *, side: int, steps: int = 8
) -> list[list[float]]:
    """Return per layer and head the density that 90 % of the attention needs, over all steps."""
    found: list[Tensor] = []
    with _watch_attention(found):
        generate(pipe, prompts, side=side, steps=steps, batch=len(prompts))
    layers = len(pipe.transformer.blocks)
    table = torch.stack(found).view(-1, layers, found[0].shape[0]).mean(0)
    return [[round(value, 4) for value in row] for row in table.tolist()]


def contact_sheet(
    methods: Mapping[str, NDArray[np.float32]],
    titles: Sequence[str],
    *,
    shown: int = 6,
    columns: int = 2,
    pixels: int = 128,
) -> Image.Image:
    """Lay out `shown` frames of every clip under its title, one strip per method.

    Args:
        methods: clips `[N, T, side, side, 3]` in [0, 1] by the name of what made them.
        titles: one per clip.
        shown: frames of a strip, evenly spaced.
        columns: clips side by side.
        pixels: side of a frame on the sheet.

    Returns:
        The sheet.
    """
    rows = -(-len(titles) // columns)
    gap, band, margin = 8, 16, 40
    cell_w = margin + shown * pixels + gap
    cell_h = band + len(methods) * (pixels + 2) + gap
    sheet = Image.new("RGB", (columns * cell_w + gap, rows * cell_h + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        x, y = gap + (i // rows) * cell_w, gap + (i % rows) * cell_h
        pen.text((x, y), title, fill="black")
        for j, (name, clips) in enumerate(methods.items()):
            top = y + band + j * (pixels + 2)
            pen.text((x, top + pixels // 2 - 6), name, fill="black")
            sheet.paste(_strip(clips[i], shown, pixels), (x + margin, top))
    return sheet


def _strip(clip: NDArray[np.float32], shown: int, pixels: int) -> Image.Image:
    picked = np.linspace(0, len(clip) - 1, shown).round().astype(int)
    frames = np.concatenate(list(clip[picked]), axis=1)
    image = Image.fromarray((frames.clip(0, 1) * 255).round().astype(np.uint8))
    return image.resize((shown * pixels, pixels), Image.Resampling.BOX)


def main(argv: list[str] | None = None) -> None:
    """Evaluate a pipeline folder from the command line."""
    from diffusers import WanPipeline

    parser = argparse.ArgumentParser(description="Evaluate the embedded model.")
    parser.add_argument("--model", type=Path, default=None, help="pipeline folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only-sheet", action="store_true", help="draw the contact sheets alone")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = WanPipeline.from_pretrained(str(args.model or embedded_path())).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    options = {"steps": args.steps, "guidance": args.guidance}
    results: dict[str, Any] = dict(options)
    scenes = held_out_scenes(args.prompts)
    kind = args.device.split(":")[0]
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind != "cpu"):
        for side in args.sides:
            batch = max(1, args.batch * 128**2 // side**2)
            sheet = _draw_sheet(pipe, side=side, batch=batch, options=options)
            with atomic_path(args.out / f"sheet_{side}.jpg") as temporary:
                sheet.save(temporary, "JPEG", quality=88)
            if args.only_sheet:
                continue
            results[str(side)] = _evaluate_size(
                pipe, scenes, side=side, batch=batch, options=options
            )
            print(side, json.dumps(results[str(side)]), flush=True)
            with atomic_path(args.out / "evaluation.json") as temporary:
                temporary.write_text(json.dumps(results, indent=1))


def _evaluate_size(
    pipe: Any, scenes: Sequence[Scene], *, side: int, batch: int, options: dict[str, Any]
) -> dict[str, Any]:
    prompts = [caption(scene) for scene in scenes]
    clips = generate(pipe, prompts, side=side, batch=batch, seed=100, **options)
    step = max(1, side // 128)  # judge every size at 128 pixels
    psnr = reconstruction(pipe.vae, frames=FRAMES, side=side, count=4)
    return {
        "agreement": agreement(clips[:, :, step // 2 :: step, step // 2 :: step], scenes),
        "reconstruction_psnr": [round(value, 2) for value in psnr],
        "attention_coverage_90": attention_coverage(pipe, SHEET_PROMPTS[:2], side=side),
    }


def _draw_sheet(pipe: Any, *, side: int, batch: int, options: dict[str, Any]) -> Image.Image:
    from svg_models import recipe_for, sparsify
    from svg_models.loading import Geometry
    from svg_models.method_names import MethodSpec

    tokens = Geometry.of(pipe).tokens(height=side, width=side, frames=FRAMES)
    recipe = recipe_for(pipe, tokens)
    method = MethodSpec.parse("svg2-error").build(recipe.method)
    dense = generate(pipe, SHEET_PROMPTS, side=side, batch=batch, **options)
    with sparsify(pipe, method, recipe.schedule) as run:
        sparse = generate(pipe, SHEET_PROMPTS, side=side, batch=batch, **options)
        print(f"SVG2 on the sheet of {side} pixels: density {run.stats().mean_density:.3f}")
    return contact_sheet({"dense": dense, "SVG2": sparse}, SHEET_PROMPTS)


if __name__ == "__main__":
    main()
