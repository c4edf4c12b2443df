"""Train the embedded model: first the autoencoder, then the transformer with its text encoder.

    python -m training.train vae --out run --steps 3000
    python -m training.train transformer --out run --steps 3000
    python -m training.train export --out run

Every step is a function of the seed and its number, so a run that was stopped (`--max-seconds`, or
a lost machine) goes on from its checkpoint as if nothing had happened.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .build import (
    FLOW_SHIFT,
    Shape,
    assemble,
    encode_text,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    make_vae,
    save_pipeline,
)
from .codec import WholeClip
from .data import Batch, Batches, Size, stream
from .loop import Clock, Slice, run
from .render import render

VAE_SIZES = (
    Size(frames=17, side=128, batch=24, weight=0.35),
    Size(frames=17, side=128, batch=24, weight=0.30, window=0.5),
    Size(frames=49, side=64, batch=32, weight=0.35),
)
CLIP_SIZES = (
    Size(frames=49, side=64, batch=256, weight=1.0, stop=0.25),
    Size(frames=49, side=64, batch=256, weight=0.08, start=0.25, stop=0.8),
    Size(frames=49, side=128, batch=64, weight=0.40, start=0.25, text_length=512),
    Size(frames=49, side=128, batch=64, weight=0.22, start=0.25, text_length=64),
    Size(frames=17, side=128, batch=160, weight=0.08, start=0.25, stop=0.8),
    Size(frames=49, side=256, batch=16, weight=0.22, start=0.25, text_length=512),
)
FULL_SHAPE = Shape()
VOCABULARY = 192
"""Rows of the text encoder's table, more than the tokenizer has pieces."""
TOY_SIZES = (Size(frames=5, side=32, batch=2, weight=1.0),)
TOY_SHAPE = Shape(
    heads=2, head_dim=12, layers=2, ffn_dim=32, text_dim=16, text_layers=1,
    latent_channels=4, encoder_dim=4, decoder_dim=4,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(Slice):
    """One slice of a run."""

    workers: int = 0
    compiled: bool = False
    shape: Shape = FULL_SHAPE
    sizes: tuple[Size, ...] = CLIP_SIZES
    init: Path | None = None


class Vae(nn.Module):
    """The autoencoder with its training loss."""

    kl_weight = 1e-3

    def __init__(self, options: Options) -> None:
        """Make the network; whole clips in one pass."""
        super().__init__()
        self.vae = make_vae(options.shape)
        self.codec: WholeClip = WholeClip(self.vae, compiled=options.compiled)

    def loss(self, video: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """L1, squared error, edges at two scales, and a small KL term."""
        mean, logvar = (value.float() for value in self.codec.moments(video))
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        out = self.codec.decode(mean + noise * torch.exp(0.5 * logvar)).float()
        error = out - video
        mse = error.square().mean()
        half = F.avg_pool3d(error, (1, 2, 2))
        edges = sum(
            diff.abs().mean() for e in (error, half) for diff in (e.diff(dim=-1), e.diff(dim=-2))
        )
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = error.abs().mean() + mse + 0.5 * edges + self.kl_weight * kl
        return loss, {"mse": mse.detach(), "kl": kl.detach()}


class Denoiser(nn.Module):
    """The transformer and its text encoder with the flow matching loss."""

    def __init__(self, options: Options) -> None:
        """Make both networks."""
        super().__init__()
        self.transformer = make_transformer(options.shape)
        self.text_encoder = make_text_encoder(options.shape, vocab_size=VOCABULARY)
        if options.compiled:
            torch._dynamo.config.recompile_limit = 64
            self.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def loss(
        self, latents: Tensor, ids: Tensor, mask: Tensor, *, text_length: int, generator: Any
    ) -> Tensor:
        """Predict `noise - latents` at a noise level drawn as the scheduler will space it."""
        device = latents.device
        draw = torch.randn(len(latents), generator=generator, device=device)
        level = torch.sigmoid(draw)
        level = FLOW_SHIFT * level / (1 + (FLOW_SHIFT - 1) * level)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        wide = level.view(-1, 1, 1, 1, 1)
        noisy = (1 - wide) * latents + wide * noise
        flow = self.predict(noisy, level, ids, mask, text_length=text_length)
        return F.mse_loss(flow.float(), noise - latents)

    def predict(
        self, noisy: Tensor, level: Tensor, ids: Tensor, mask: Tensor, *, text_length: int
    ) -> Tensor:
        """Return the flow of noisy latents at noise levels `[B]` in [0, 1]."""
        text = encode_text(self.text_encoder, ids, mask, length=text_length)
        flow: Tensor = self.transformer(noisy, level * 1000, text, return_dict=False)[0]
        return flow


def autocast(device: str) -> torch.autocast:
    """Return bf16 autocast on a GPU, nothing elsewhere."""
    kind = device.split(":")[0]
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda")


def _draw(batch: Batch, options: Options) -> Tensor:
    return render(
        batch.params.to(options.device),
        num_frames=batch.size.frames,
        height=batch.size.side,
        width=batch.size.side,
        window=batch.window,
        compiled=options.compiled,
    )


def _batches(options: Options) -> Callable[[Clock], Iterator[Batch]]:
    def make(clock: Clock) -> Iterator[Batch]:
        batches = Batches(
            first=clock.step, sizes=options.sizes, steps=options.steps, seed=options.seed,
            tokenizer=make_tokenizer(),
        )  # fmt: skip
        return stream(batches, workers=options.workers)

    return make


def train_vae(options: Options) -> None:
    """Train the autoencoder, then measure the latents and write `vae/` in diffusers' format."""
    torch.manual_seed(options.seed)
    model = Vae(options).to(options.device)

    def compute(batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        video = _draw(batch, options)
        with autocast(options.device):
            return model.loss(video, generator)

    run(model, "vae", options, _batches(options), compute, decay=0.998)
    mean, std = _measure_latents(model.codec, options)
    model.codec.restore()
    model.vae.register_to_config(latents_mean=mean, latents_std=std)
    model.vae.save_pretrained(options.out / "vae")


@torch.no_grad()
def _measure_latents(codec: WholeClip, options: Options) -> tuple[list[float], list[float]]:
    """Mean and deviation of each latent channel over fresh clips."""
    total, latents = 6, []
    tokenizer = make_tokenizer()
    batches = Batches(
        first=0, sizes=options.sizes, steps=total, seed=options.seed + 1, tokenizer=tokenizer
    )
    for batch in stream(batches, workers=0):
        with autocast(options.device):
            mean = codec.moments(_draw(batch, options))[0].float()
        latents.append(mean.transpose(0, 1).flatten(1))
    flat = torch.cat(latents, dim=1)
    return flat.mean(1).tolist(), flat.std(1).clamp_min(1e-3).tolist()


def train_transformer(options: Options) -> None:
    """Train transformer and text encoder on latents of fresh clips."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(options.seed)
    vae = AutoencoderKLWan.from_pretrained(options.out / "vae").to(options.device)
    codec = WholeClip(vae.eval().requires_grad_(False), compiled=options.compiled)
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=options.device).view(shape)
    std = torch.tensor(vae.config.latents_std, device=options.device).view(shape)
    model = Denoiser(options).to(options.device)
    if options.init is not None:
        _load_exported(model, options.init)

    def compute(batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(options.device):
            with torch.no_grad():
                latents = (codec.moments(_draw(batch, options))[0].float() - mean) / std
            ids, mask = batch.ids.to(options.device), batch.mask.to(options.device)
            loss = model.loss(
                latents, ids, mask, text_length=batch.size.text_length, generator=generator
            )
        return loss, {}

    run(model, "transformer", options, _batches(options), compute, decay=0.999)
    model.transformer.save_pretrained(options.out / "transformer")
    model.text_encoder.save_pretrained(options.out / "text_encoder")


def _load_exported(model: Denoiser, folder: Path) -> None:
    from diffusers import WanTransformer3DModel
    from transformers import UMT5EncoderModel

    transformer = WanTransformer3DModel.from_pretrained(folder / "transformer")
    text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    model.transformer.load_state_dict(transformer.state_dict())
    model.text_encoder.load_state_dict(text_encoder.state_dict())


def export(out: Path, target: Path) -> int:
    """Assemble the trained parts into one bf16 pipeline folder; return its bytes."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    pipe = assemble(
        WanTransformer3DModel.from_pretrained(out / "transformer"),
        AutoencoderKLWan.from_pretrained(out / "vae"),
        UMT5EncoderModel.from_pretrained(out / "text_encoder"),
        make_tokenizer(),
    )
    return save_pipeline(pipe, target)


def main(argv: list[str] | None = None) -> None:
    """Run one stage from the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("stage", choices=("vae", "transformer", "export"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument(
        "--init", type=Path, help="exported pipeline to go on from when the checkpoint is lost"
    )
    parser.add_argument("--first", type=int, default=0, help="the step that --init was saved at")
    parser.add_argument("--toy", action="store_true", help="a tiny network on tiny clips")
    args = parser.parse_args(argv)
    if args.stage == "export":
        print(f"{export(args.out, args.out / 'model') / 1e6:.2f} MB in {args.out / 'model'}")
        return
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    sizes = TOY_SIZES if args.toy else VAE_SIZES if args.stage == "vae" else CLIP_SIZES
    options = Options(
        out=args.out,
        steps=args.steps,
        lr=args.lr,
        seed=args.seed,
        device=args.device,
        max_seconds=args.max_seconds,
        workers=args.workers,
        compiled=args.device != "cpu",
        shape=TOY_SHAPE if args.toy else Shape(),
        sizes=sizes,
        init=args.init,
        first=args.first,
    )
    (train_vae if args.stage == "vae" else train_transformer)(options)


if __name__ == "__main__":
    main()
