"""Train the second judge: a Wan pipeline of 8 layers and 6 heads of 128, on real footage.

    python -m training.footage prepare *.whl --out footage.zip
    python -m training.train_footage run --data footage.zip --out judge --work run
    python -m training.train_footage export --out judge --model model
    python -m training.train_footage show --model model --data footage.zip --sheet sheet.jpg

`run` fine-tunes the autoencoder of the embedded model, then trains transformer and text encoder on
its latents, for `--seconds` in all. It stops after `--max-seconds` and goes on from `--work` when
it is called again, or, where that folder is lost, from the compact weights in `--out`, with a fresh
optimiser. Those weights are stored every two minutes, too, so that a machine may be lost. They are
the model: `export` unfolds them into a folder in diffusers' format. `torchrun` shares the steps
among several GPUs.

A prompt is the number of a source, `clip 12` or `clip 12 mirrored`. Cross-attention has the
identity for its four projections and is not trained: a number is all that it must carry.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg_models.embedded import embedded_path
from svg_models.files import atomic_folder, atomic_path

from .build import (
    Shape,
    assemble,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    make_vae,
    save_pipeline,
)
from .card import CARD, read_card
from .codec import WholeClip
from .compact import pack, unpack
from .footage import make_source, read_index, write
from .loop import Clock, Log, Slice, join_logs, passed, run
from .ranks import ALONE, Ranks, join
from .train import TOY_SHAPE, VOCABULARY, Denoiser, Vae, autocast
from .train import Options as DenoiserOptions
from .windows import Footage, LatentClips, Latents, Piece, Plan, Window, prompt, windows

SHAPE = Shape(heads=6, head_dim=128, layers=8, ffn_dim=768)
PLAN = Plan()
GUIDANCE = 3.0
PROMPTS = 16
# Storing a run and measuring it, before a slice has to be over.
RESERVE_SECONDS = 15.0
LEVELS = (0.2, 0.4, 0.6, 0.8)
TOY_PLAN = Plan(
    frames=5, full=(4, 6), half=(2, 3), full_batch=2, half_batch=3, pixels=((5, 16),),
    pixel_batch=2,
)  # fmt: skip
# A machine that is lost costs no more of the run than this.
KEEP_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """One slice of the run.

    Attributes:
        data: what `footage.py` wrote.
        out: folder of the compact weights and the card.
        work: folder of the whole checkpoints.
        vae_seconds: for the autoencoder.
        seconds: for the transformer, over all slices.
        later: seconds that slices after this one will have for it; where they are given, they take
            the place of `seconds`, and the rate is at its least when the last slice ends.
        max_seconds: of this slice, once the program's imports are done.
        vae_steps: that the autoencoder takes at most.
        steps: that the transformer takes at most.
        vae_lr: peak of the autoencoder's learning rate.
        lr: peak of the transformer's.
        seed: of everything random.
        device: where it runs.
        compiled: whether blocks are compiled.
        shape: of the networks.
        plan: of the clips.
        stop_at: step of the transformer before which this slice ends.
        ranks: the processes that share each step.
    """

    data: Path
    out: Path
    work: Path
    vae_seconds: float = float("inf")
    seconds: float = float("inf")
    later: float | None = None
    max_seconds: float = float("inf")
    vae_steps: int = 10**6
    steps: int = 10**6
    vae_lr: float = 1e-3
    lr: float = 8e-4
    seed: int = 0
    device: str = "cpu"
    compiled: bool = False
    shape: Shape = SHAPE
    plan: Plan = PLAN
    stop_at: int | None = None
    ranks: Ranks = ALONE

    @property
    def left(self) -> float:
        """Return the seconds that this slice can still train."""
        return self.max_seconds - RESERVE_SECONDS - passed()


def fix_cross_attention(transformer: Any) -> None:
    """Make the four projections of every cross-attention the identity, and keep them so."""
    for block in transformer.blocks:
        attention = block.attn2
        for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
            layer.requires_grad_(False)


def train(options: Options) -> dict[str, Any]:
    """Train one slice and store it; return the card."""
    torch.manual_seed(options.seed)
    card = read_card(options.out)
    stored = unpack(options.out) if card else {}
    clips = Footage(options.data, options.device)
    print(f"{passed():.0f} s: {len(clips.sources)} clips decoded", flush=True)
    vae, card["autoencoder"] = _autoencoder(clips, options, stored, card)
    codec = WholeClip(vae.eval().requires_grad_(False), compiled=options.compiled)
    statistics = {"mean": vae.config.latents_mean, "std": vae.config.latents_std}
    with torch.no_grad(), autocast(options.device):
        seen, unseen = (
            LatentClips(clips, codec, options.plan, held_out=held_out, **statistics)
            for held_out in (False, True)
        )
    print(f"{passed():.0f} s: latents of {sum(len(s[0]) for s in seen.stored)} windows", flush=True)
    model = Denoiser(
        DenoiserOptions(
            out=options.work, steps=options.steps, lr=options.lr, shape=options.shape,
            compiled=options.compiled,
        )
    )  # fmt: skip
    fix_cross_attention(model.transformer)
    # Its scores have a learned bias, which fast kernels may give no gradient for; it is tiny.
    model.text_encoder.set_attn_implementation("eager")
    earlier = card.get("transformer", {})
    lost = not (options.work / "transformer.pt").exists()
    if earlier and lost:
        for name, part in (("transformer", model.transformer), ("text", model.text_encoder)):
            _load(part, stored, name)
    model = model.to(options.device)
    tokenizer = make_tokenizer()
    card |= _conditions(options, seen)
    store = Store(options.out)
    if options.ranks.first and (lost or not earlier):
        store.begin(_weights(vae) | (_weights(model) if earlier else {}), card)

    def keep(clock: Clock, values: Sequence[Tensor], log: Log) -> None:
        joined = join_logs(earlier.get("log", []), log)
        state = {"step": clock.step, "seconds": round(clock.seconds, 1), "log": joined}
        store.begin(_weights(vae) | _weights(model, values), {**card, "transformer": state})

    with _attention(model, seen, tokenizer, options):
        spent = earlier.get("seconds", 0.0)
        left = options.ranks.agree(options.left)
        whole = options.seconds if options.later is None else spent + left + options.later
        clock = run(
            model,
            "transformer",
            Slice(
                out=options.work, steps=options.steps, lr=options.lr, seed=options.seed,
                device=options.device, seconds=whole, max_seconds=left,
                stop_at=options.stop_at, first=earlier.get("step", 0) if lost else 0,
                spent=spent, keep_seconds=KEEP_SECONDS, ranks=options.ranks,
            ),
            lambda clock: seen.batches(tokenizer, options.seed, clock, options.device),
            lambda batch, generator: (_loss(model, batch, generator, options), {}),
            decay=0.998,
            keep=keep,
        )  # fmt: skip
        if options.ranks.first:
            log = json.loads((options.work / "transformer_log.json").read_text("utf-8"))
            values = [value.detach() for value in model.parameters()]
            store.finish()
            keep(clock, values, log)
            card["transformer"] = {
                "step": clock.step,
                "seconds": round(clock.seconds, 1),
                "loss": {
                    "seen": held_out_loss(model, seen, tokenizer, options),
                    "held out": held_out_loss(model, unseen, tokenizer, options),
                },
                "log": join_logs(earlier.get("log", []), log),
            }
            store.finish()
            store.begin(_weights(vae) | _weights(model, values), card)
            print(json.dumps(card["transformer"]["loss"]), flush=True)
    store.finish()
    return card


def _autoencoder(
    clips: Footage, options: Options, stored: Mapping[str, Tensor], card: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the trained autoencoder and what its card says: stored, or fine-tuned now."""
    from diffusers import AutoencoderKLWan

    toy = options.shape == TOY_SHAPE
    # Neither compiled nor tuned: both took longer than the minute that it is trained for.
    model = Vae(
        DenoiserOptions(
            out=options.work, steps=options.vae_steps, lr=options.vae_lr, shape=options.shape
        )
    )
    if "autoencoder" in card:
        model.codec.restore()
        _load(model.vae, stored, "vae")
        return _with_statistics(model.vae, card["autoencoder"]).to(options.device), card[
            "autoencoder"
        ]
    if not toy:
        embedded = AutoencoderKLWan.from_pretrained(embedded_path() / "vae")
        model.vae.load_state_dict(embedded.state_dict())
    model = model.to(options.device)

    def compute(batch: Piece, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(options.device):
            return model.loss(batch.video, generator)

    # What a first step has to set up is no part of the seconds that it trains.
    count = max(1, options.plan.pixel_batch // options.ranks.count)
    for size in dict.fromkeys(options.plan.pixels):
        generator = torch.Generator(options.device).manual_seed(0)
        compute(clips.draw(random.Random(0), size, count), generator)[0].backward()
        options.ranks.average(
            [value.grad for value in model.parameters() if value.grad is not None]
        )
        model.zero_grad(set_to_none=True)
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        print(f"{passed():.0f} s: a first step of {size[0]}x{size[1]}", flush=True)
    clock = run(
        model,
        "vae",
        Slice(
            out=options.work, steps=options.vae_steps, lr=options.vae_lr, seed=options.seed,
            device=options.device, seconds=options.vae_seconds,
            max_seconds=options.ranks.agree(options.left), ranks=options.ranks,
        ),
        lambda clock: clips.pieces(options.plan, options.seed, clock),
        compute,
        decay=0.998,
    )  # fmt: skip
    with torch.no_grad(), autocast(options.device):
        for value in model.vae.parameters():
            value.copy_(value.half())  # as it will be stored
        found = {
            "step": clock.step,
            "seconds": round(clock.seconds, 1),
            **_measure_latents(model.codec, clips, options),
            "psnr_held_out": _reconstruction(model.codec, clips, options),
            "log": json.loads((options.work / "vae_log.json").read_text()),
        }
    print(
        f"{passed():.0f} s: reconstruction of clips held out {found['psnr_held_out']}", flush=True
    )
    model.codec.restore()
    return _with_statistics(model.vae, found), found


def _with_statistics(vae: Any, found: Mapping[str, Any]) -> Any:
    vae.register_to_config(latents_mean=found["mean"], latents_std=found["std"])
    return vae


def _measure_latents(codec: WholeClip, clips: Footage, options: Options) -> dict[str, list[float]]:
    """Return mean and deviation of each latent channel over the clips that are trained on."""
    latents = []
    for index in clips.chosen(held_out=False, length=options.plan.frames):
        video = clips.clip(index, Window(0, 1), options.plan.frames)
        latents.append(codec.moments(video[None])[0].float()[0].flatten(1))
    flat = torch.cat(latents, dim=1)
    return {"mean": flat.mean(1).tolist(), "std": flat.std(1).clamp_min(1e-3).tolist()}


def _reconstruction(codec: WholeClip, clips: Footage, options: Options) -> dict[str, float]:
    """Return PSNR in dB of the clips held out, encoded and decoded."""
    found = {}
    for index in clips.chosen(held_out=True, length=options.plan.frames):
        video = clips.clip(index, Window(0, 1), options.plan.frames)[None]
        video = video[..., : options.plan.height, : options.plan.width]
        out = codec.decode(codec.moments(video)[0].float()).float().clamp(-1, 1)
        mse = ((out - video) / 2).square().mean()
        found[clips.sources[index].name] = round(-10 * mse.log10().item(), 2)
    return found


def _loss(model: Denoiser, batch: Latents, generator: torch.Generator, options: Options) -> Tensor:
    with autocast(options.device):
        return model.loss(
            batch.latents, batch.ids, batch.mask, text_length=batch.text_length, generator=generator
        )


def held_out_loss(
    model: Denoiser, clips: LatentClips, tokenizer: Any, options: Options
) -> dict[str, float]:
    """Return the loss of full clips without a prompt at four noise levels, the same at each call.

    Gradients are left on: without, compiled blocks would be compiled once more.
    """
    rng = random.Random("held-out loss")
    # Of the size that is trained with: no other was compiled for.
    share = options.ranks.count
    batches = [
        clips.draw(rng, tokenizer, options.device, half=False, share=share)
        for _ in range(2 * share)
    ]
    empty = tokenizer([""], padding="max_length", max_length=64, return_tensors="pt")
    found = {}
    for level in LEVELS:
        total = 0.0
        for number, batch in enumerate(batches):
            generator = torch.Generator(options.device).manual_seed(number)
            noise = torch.randn(
                batch.latents.shape, generator=generator, device=batch.latents.device
            )
            count = len(noise)
            with autocast(options.device):
                flow = model.predict(
                    (1 - level) * batch.latents + level * noise,
                    torch.full((count,), level, device=noise.device),
                    empty.input_ids.expand(count, -1).to(options.device),
                    empty.attention_mask.expand(count, -1).to(options.device),
                    text_length=batch.text_length,
                )
            total += F.mse_loss(flow.float(), noise - batch.latents).item() / len(batches)
        found[f"{level:g}"] = round(total, 4)
    return found


def _attention(
    model: Denoiser, clips: LatentClips, tokenizer: Any, options: Options
) -> AbstractContextManager[None]:
    """Return what makes attention fast, after a step that shows that it runs.

    cuDNN's attention comes first if it is faster than FlashAttention on this GPU and agrees with
    it. Where a compiled step fails, the run goes on without.
    """
    if not options.device.startswith("cuda"):
        return nullcontext()
    orders = [
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    ]
    if _cudnn_is_faster(clips, options):
        orders.insert(0, [SDPBackend.CUDNN_ATTENTION, *orders[0]])
    for order in orders:
        try:
            with sdpa_kernel(order, set_priority=True):
                _try_a_step(model, clips, tokenizer, options)
        except RuntimeError as error:
            print(f"{order[0].name} failed: {str(error)[:300]}", flush=True)
            torch.compiler.reset()  # a compiled block holds on to the kernel that it was made with
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        else:
            print(f"{passed():.0f} s: attention by {order[0].name}", flush=True)
            return sdpa_kernel(order, set_priority=True)
    torch.compiler.set_stance("force_eager")
    return nullcontext()


def _try_a_step(model: Denoiser, clips: LatentClips, tokenizer: Any, options: Options) -> None:
    for half in (True, False):
        share = options.ranks.count
        batch = clips.draw(random.Random(0), tokenizer, options.device, half=half, share=share)
        generator = torch.Generator(options.device).manual_seed(0)
        _loss(model, batch, generator, options).backward()
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()


def _cudnn_is_faster(clips: LatentClips, options: Options) -> bool:
    rows, columns = options.plan.full
    tokens = clips.stored[0][0][0].shape[1] * rows * columns
    generator = torch.Generator(options.device).manual_seed(0)
    shape = (2, options.shape.heads, tokens, options.shape.head_dim)
    q, k, v = (
        torch.randn(
            shape, generator=generator, device=options.device, dtype=torch.bfloat16,
        ).requires_grad_()
        for _ in range(3)
    )  # fmt: skip
    seconds, gradients = {}, {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                for _ in range(3):
                    torch.cuda.synchronize()
                    started = time.perf_counter()
                    out = F.scaled_dot_product_attention(q, k, v)
                    gradients[backend] = torch.autograd.grad(out.float().square().sum(), (q, k, v))
                    torch.cuda.synchronize()
                    seconds[backend] = time.perf_counter() - started
        except RuntimeError as error:
            print(f"{backend.name} failed: {str(error)[:200]}", flush=True)
            return False
    flash, cudnn = gradients.values()
    agree = all(
        (a.float() - b.float()).norm() <= 0.03 * b.float().norm()
        for a, b in zip(cudnn, flash, strict=True)
    )
    text = ", ".join(f"{backend.name} {1e3 * s:.1f} ms" for backend, s in seconds.items())
    print(f"attention of 2 clips, forward and backward: {text}; agree: {agree}", flush=True)
    return agree and seconds[SDPBackend.CUDNN_ATTENTION] < seconds[SDPBackend.FLASH_ATTENTION]


def _conditions(options: Options, clips: LatentClips) -> dict[str, Any]:
    """Return what whoever samples from the model must know."""
    plan = options.plan
    step = max(1, len(clips.numbers) // PROMPTS)
    device = options.device.startswith("cuda")
    return {
        "name": "footage",
        "frames": plan.frames,
        "height": plan.height,
        "width": plan.width,
        "guidance": GUIDANCE,
        "prompts": [prompt(number) for number in clips.numbers[::step][:PROMPTS]],
        "shape": options.shape.to_dict(),
        "gpu": torch.cuda.get_device_name() if device else "CPU",
        "torch": torch.__version__,
        "seed": options.seed,
    }


def _weights(part: nn.Module, values: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """Return what is stored of the autoencoder, or of a `Denoiser` with other `values`."""
    named = dict(part.named_parameters())
    if not isinstance(part, Denoiser):
        # It is frozen by now, and is kept whole.
        return {f"vae/{name}": value.detach() for name, value in named.items()}
    found = zip(named.items(), values or named.values(), strict=True)
    # What is fixed follows from the code.
    return {
        name.replace("text_encoder.", "text/", 1).replace("transformer.", "transformer/", 1): value
        for (name, parameter), value in found
        if parameter.requires_grad
    }


class Store:
    """Write weights and card into a folder, both or neither, while the run goes on.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def begin(self, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
        """Copy the tensors to the host and begin to write; not while an earlier call still writes.

        Raises:
            OSError: if the earlier call could not write.
        """
        if self._writing is not None and not self._writing.done():
            return
        self.finish()
        copies = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
        self._writing = self._pool.submit(self._write, copies, json.dumps(card))

    def finish(self) -> None:
        """Wait for what is being written."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, tensors: Mapping[str, Tensor], card: str) -> None:
        with atomic_folder(self.out) as folder:
            paths = pack(tensors, folder)
            size = sum(path.stat().st_size for path in paths)
            (folder / CARD).write_text(card, "utf-8")
        for path in self.out.glob("weights-*.npz"):
            if path.name not in {kept.name for kept in paths}:
                path.unlink()
        print(
            f"{passed():.0f} s: {size / 1e6:.1f} MB in {len(paths)} files of {self.out}",
            flush=True,
        )


def _load(part: nn.Module, stored: Mapping[str, Tensor], prefix: str) -> None:
    found = {
        name.removeprefix(f"{prefix}/"): value
        for name, value in stored.items()
        if name.startswith(f"{prefix}/")
    }
    result = part.load_state_dict(found, strict=False)
    trained = {name for name, value in part.named_parameters() if value.requires_grad}
    missing = trained & set(result.missing_keys)
    if missing or result.unexpected_keys:
        raise ValueError(
            f"the stored {prefix} is of another shape: {len(missing)} tensors are missing, "
            f"{len(result.unexpected_keys)} are unknown; give the --out of a run of this version"
        )


def check(stage: str, args: argparse.Namespace) -> None:
    """Refuse what a stage cannot read, before anything else.

    Raises:
        ValueError: if there is no data, no trained run or no model.
    """
    if stage == "export" and "transformer" not in read_card(args.out):
        raise ValueError(f"{args.out} holds no trained transformer; give the --out of a run")
    if stage == "show" and not read_card(args.model):
        raise ValueError(f"{args.model} has no {CARD}; give the --model that `export` wrote")
    if stage == "show" or (stage == "run" and not args.toy):
        read_index(args.data)


def export(out: Path, target: Path) -> int:
    """Unfold compact weights into one bf16 pipeline folder with its card; return its bytes."""
    card, stored = read_card(out), unpack(out)
    shape = Shape(**{**card["shape"], "dim_mult": tuple(card["shape"]["dim_mult"])})
    vae, transformer = make_vae(shape), make_transformer(shape)
    text_encoder = make_text_encoder(shape, vocab_size=VOCABULARY)
    fix_cross_attention(transformer)
    for name, part in (("vae", vae), ("transformer", transformer), ("text", text_encoder)):
        _load(part, stored, name)
    _with_statistics(vae, card["autoencoder"])
    pipe = assemble(transformer, vae, text_encoder, make_tokenizer())
    size = save_pipeline(pipe, target)
    with atomic_path(target / CARD) as temporary:
        temporary.write_text(json.dumps(card))
    return size


def show(
    model: Path, sheet: Path, data: Path, *, device: str, clips: int = 8, steps: int = 20
) -> None:
    """Write a sheet, six frames a row: what was seen and what is generated for its prompt in turn.

    Below are the clips held out, as they are and decoded from their latents.
    """
    from PIL import Image

    from svg_models.loading import load_pipeline

    card, footage = read_card(model), Footage(data, device)
    pipe = load_pipeline(model, device=device).pipe
    size = (card["frames"], card["height"], card["width"])
    rows = []
    for number, text in enumerate(card["prompts"][:clips]):
        rows.append(_row(_middle(footage, int(text.split()[1]), size)))
        frames = pipe(
            text,
            height=card["height"],
            width=card["width"],
            num_frames=card["frames"],
            num_inference_steps=steps,
            guidance_scale=card["guidance"],
            generator=torch.Generator("cpu").manual_seed(number),
            output_type="pt",
        ).frames[0]
        rows.append(_row(frames.float() * 2 - 1))
    codec = WholeClip(pipe.vae)
    for index in footage.chosen(held_out=True, length=card["frames"]):
        video = _middle(footage, index, size)
        batch = video.transpose(0, 1)[None].to(pipe.vae.dtype)
        with torch.no_grad():
            decoded = codec.decode(codec.moments(batch)[0])[0].transpose(0, 1).float()
        rows += [_row(video), _row(decoded)]
    with atomic_path(sheet) as temporary:
        Image.fromarray(torch.cat(rows).cpu().numpy()).save(temporary, "JPEG", quality=88)
    print(f"{passed():.0f} s: {sheet}", flush=True)


def _middle(footage: Footage, index: int, size: tuple[int, int, int]) -> Tensor:
    """Return the middle of the first window of a source, `[T, 3, H, W]` from -1 to 1."""
    source, (frames, height, width) = footage.sources[index], size
    window = windows(source.frames, source.rate, length=frames)[0]
    video = footage.clip(index, window, frames).transpose(0, 1)
    top, left = (video.shape[-2] - height) // 2, (video.shape[-1] - width) // 2
    return video[..., top : top + height, left : left + width]


def _row(video: Tensor) -> Tensor:
    """Return six frames of `[T, 3, H, W]` side by side, uint8 `[H, 6 W, 3]`."""
    chosen = torch.linspace(0, len(video) - 1, 6).round().long()
    pixels = ((video[chosen.to(video.device)].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(2, 0, 3, 1).flatten(1, 2)


def write_toy(path: Path) -> None:
    """Write a data file of three drifting textures, one of them held out."""
    clips = {}
    for number in range(3):
        rng = np.random.default_rng(number)
        texture = np.kron(rng.integers(0, 256, (16, 24, 3)), np.ones((4, 4, 1))).astype(np.uint8)
        frames = np.stack([np.roll(texture, 2 * t, axis=1)[:48, :64] for t in range(9)])
        name = f"toy-{number}"
        clips[name] = make_source(name, frames, 15.0, held_out=number == 2)
    write(path, clips)


def main(argv: list[str] | None = None) -> None:
    """Run one stage from the command line."""
    parser = argparse.ArgumentParser(description="Train the judge of real footage.")
    parser.add_argument("stage", choices=("run", "export", "show"))
    parser.add_argument("--data", type=Path, help="what `training.footage prepare` wrote")
    parser.add_argument("--out", type=Path, help="compact weights and card")
    parser.add_argument("--work", type=Path, help="whole checkpoints, not worth keeping")
    parser.add_argument("--model", type=Path, help="folder in diffusers' format")
    parser.add_argument("--sheet", type=Path, help="picture of generated clips")
    parser.add_argument("--vae-seconds", type=float, default=75.0)
    parser.add_argument("--seconds", type=float, default=600.0, help="of the transformer, in all")
    parser.add_argument(
        "--later", type=float, help="in place of --seconds: what slices after this one will have"
    )
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="of this slice")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--toy", action="store_true", help="a tiny network on drawn clips")
    args = parser.parse_args(argv)
    needed = {
        "run": ("out", "work") if args.toy else ("data", "out", "work"),
        "export": ("out", "model"),
        "show": ("model", "data", "sheet"),
    }
    for name in needed[args.stage]:
        if getattr(args, name) is None:
            parser.error(f"{args.stage} needs --{name}")
    try:
        check(args.stage, args)
    except ValueError as error:
        parser.error(str(error))
    if args.stage == "export":
        print(f"{export(args.out, args.model) / 1e6:.1f} MB in {args.model}")
        return
    if args.stage == "show":
        show(args.model, args.sheet, args.data, device=args.device)
        return
    ranks, device = join(args.device)
    torch.set_float32_matmul_precision("high")
    toy: dict[str, Any] = {}
    if args.toy:
        args.work.mkdir(parents=True, exist_ok=True)
        args.data = args.work / "toy.zip"
        if ranks.first:
            write_toy(args.data)
        ranks.wait()
        toy = {"shape": TOY_SHAPE, "plan": TOY_PLAN, "vae_steps": 4, "steps": 6}
    train(
        Options(
            data=args.data, out=args.out, work=args.work, vae_seconds=args.vae_seconds,
            seconds=args.seconds, later=args.later, max_seconds=args.max_seconds, lr=args.lr,
            seed=args.seed, device=device, compiled=device != "cpu" and not args.no_compile,
            ranks=ranks, **toy,
        )
    )  # fmt: skip
    ranks.leave()


if __name__ == "__main__":
    main()
