r"""Distil the embedded model into one of the same size that needs four steps and no guidance.

    python -m training.distill run --out few --work run --max-seconds 280 --workers 6
    python -m training.distill export --out few --model embedded4
    python -m training.distill show --model embedded4 --sheet sheet.jpg

or, on two GPUs, where each takes as many clips a step as one would alone,

    torchrun --standalone --nproc-per-node 2 -m training.distill run \
        --out few --work run --max-seconds 280 --workers 6

The teacher's 20 sigmas hold the student's 4: each student step is five of the teacher's. From a
state at one of the four, the teacher's ODE with guidance is followed for its five steps, and the
student learns the one velocity that leads from the same state to where they arrive. Half of the
steps begin at latents of rendered scenes with noise, half at states that the student itself reaches
from noise, so that it learns to go on from its own errors. The student starts as the teacher; text
encoder, autoencoder and tokenizer stay the teacher's.

A call stops after `--max-seconds`, its comparison included, and the learning rate is at its least
by then; with `--later` it is at its least when calls of so many seconds more have ended. The next
one goes on from `--work` or, where that folder is lost, from the weights in `--out` with a fresh
optimiser. Those are stored every minute.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from svg_models.embedded import embedded_path
from svg_models.embedded.defaults import FRAMES, GUIDANCE
from svg_models.files import atomic_folder, atomic_path

from .build import (
    VAE_FACTORS,
    assemble,
    encode_text,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    make_vae,
    save_pipeline,
)
from .card import CARD, read_card
from .clips import caption
from .codec import WholeClip
from .data import Batch, Batches, Size, choose_size, make_batch, stream
from .evaluate import contact_sheet, generate, held_out_scenes
from .loop import Clock, Log, Slice, join_logs, passed, run
from .ranks import ALONE, Ranks, join
from .render import render
from .train import TOY_SHAPE, VOCABULARY, autocast

STEPS = 4
SUBSTEPS = 5
"""Steps of the teacher to one of the student's."""
TEACHER_STEPS = STEPS * SUBSTEPS
SIZES = (
    Size(frames=FRAMES, side=128, batch=16, weight=0.7, text_length=512),
    Size(frames=FRAMES, side=256, batch=4, weight=0.3, text_length=512),
)
NAMES = {128: "default", 256: "large"}
TOY_SIZES = (Size(frames=5, side=64, batch=2, weight=1.0, text_length=512),)
# Settings of sparse methods were chosen on the held-out prompts before these.
FIRST_PROMPT, PROMPTS = 32, 16
COMPARED = {"tiny": 2, "default": 16, "large": 8}
"""Clips of a size that are compared with the teacher's."""
WEIGHTS = "student.safetensors"
NAME = "embedded4"
# Storing a run and comparing its clips, before a call has to be over.
RESERVE_SECONDS = 40.0
# A machine that is lost costs no more of the run than this.
KEEP_SECONDS = 60.0
# Below this, in units of a velocity, an error counts by its square.
ROUND = 0.03


@dataclass(frozen=True, kw_only=True)
class Options:
    """One call of the run.

    Attributes:
        out: folder of the student's weights and its card.
        work: folder of the whole checkpoint.
        teacher: pipeline folder.
        steps: that are taken at most.
        later: seconds of training that calls after this one will have.
        max_seconds: of this call, once the program's imports are done.
        lr: peak of the learning rate.
        seed: of everything random.
        device: where it runs.
        workers: processes that make batches ahead of time.
        compiled: whether blocks are compiled.
        sizes: of the clips.
        stop_at: step before which this call ends.
        ranks: the processes that share each step.
    """

    out: Path
    work: Path
    teacher: Path
    steps: int = 10**6
    later: float = 0.0
    max_seconds: float = float("inf")
    lr: float = 5e-4
    seed: int = 0
    device: str = "cpu"
    workers: int = 0
    compiled: bool = False
    sizes: tuple[Size, ...] = SIZES
    stop_at: int | None = None
    ranks: Ranks = ALONE

    @property
    def left(self) -> float:
        """Return the seconds that this call can still train."""
        return self.max_seconds - RESERVE_SECONDS - passed()


def few_step_scheduler(config: Mapping[str, Any]) -> Any:
    """Return the teacher's scheduler without memory: its sigmas, and Euler's step between two.

    A solver of first order that corrects nothing takes exactly `x + (next sigma - sigma) v`, which
    is what the student is trained for.
    """
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler.from_config(
        dict(config), solver_order=1, disable_corrector=list(range(STEPS))
    )


class Teacher:
    """A pipeline's parts as they are, and where its ODE with guidance leads.

    Args:
        folder: of the pipeline.
        device: where it runs.
        compiled: whether blocks are compiled.

    Attributes:
        sigmas: noise levels, from noise to a clip, `[TEACHER_STEPS + 1]`.
        timesteps: what the transformer is told of them, `[TEACHER_STEPS]`.
    """

    def __init__(self, folder: Path, device: str, *, compiled: bool = False) -> None:
        from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
        from transformers import UMT5EncoderModel

        scheduler = UniPCMultistepScheduler.from_pretrained(folder / "scheduler")
        scheduler.set_timesteps(TEACHER_STEPS)
        self.sigmas: Tensor = scheduler.sigmas.float().to(device)
        self.timesteps: Tensor = scheduler.timesteps.to(device)
        # It runs without gradients only. That it could have some lets it share compiled blocks.
        self.transformer = load_transformer(folder, device, compiled=compiled)
        self.text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder").float()
        self.text_encoder = self.text_encoder.to(device).requires_grad_(False)
        vae = AutoencoderKLWan.from_pretrained(folder / "vae").to(device).requires_grad_(False)
        self.codec: WholeClip = WholeClip(vae.eval(), compiled=compiled)
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(vae.config.latents_mean, device=device).view(shape)
        self._std = torch.tensor(vae.config.latents_std, device=device).view(shape)
        empty = make_tokenizer()([""], padding="max_length", max_length=64, return_tensors="pt")
        self._empty = (empty.input_ids.to(device), empty.attention_mask.to(device))

    def embed(self, ids: Tensor, mask: Tensor, *, length: int) -> tuple[Tensor, Tensor]:
        """Return prompts and, for guidance, as many empty ones: `[B, length, D]` each."""
        text = encode_text(self.text_encoder, ids, mask, length=length)
        empty = encode_text(self.text_encoder, *self._empty, length=length)
        return text, empty.expand_as(text).contiguous()

    def encode(self, video: Tensor) -> Tensor:
        """Return the latents of clips `[B, 3, T, H, W]`, fp32."""
        return (self.codec.moments(video)[0].float() - self._mean) / self._std

    def velocity(self, x: Tensor, index: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """Return the guided velocity at step `index [B]`, fp32."""
        prompted, empty = (
            self.transformer(x, self.timesteps[index], part, return_dict=False)[0].float()
            for part in text
        )
        return empty + GUIDANCE * (prompted - empty)

    def follow(self, x: Tensor, start: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """Return where the ODE leads from a student's step to the next one.

        The steps are those of two-step Adams-Bashforth in sigma, the first and the one that ends
        without noise by Euler.

        Args:
            x: states, fp32 `[B, C, t, h, w]`.
            start: number of the student's step, int64 `[B]`.
            text: of `embed`.
        """
        before = width_before = None
        for number in range(SUBSTEPS):
            index = start * SUBSTEPS + number
            width = _wide(self.sigmas[index + 1] - self.sigmas[index])
            velocity = self.velocity(x, index, text)
            step = velocity
            if before is not None and width_before is not None:
                bent = velocity + width / (2 * width_before) * (velocity - before)
                step = torch.where(_wide(index + 1) == TEACHER_STEPS, velocity, bent)
            x = x + width * step
            before, width_before = velocity, width
        return x


class Student(nn.Module):
    """The transformer that is trained.

    Args:
        transformer: as the teacher's.
        teacher: whose sigmas and timesteps it takes every `SUBSTEPS`-th of.
    """

    def __init__(self, transformer: Any, teacher: Teacher) -> None:
        super().__init__()
        self.transformer = transformer
        self._sigmas = teacher.sigmas[::SUBSTEPS]
        self._timesteps = teacher.timesteps[::SUBSTEPS]

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Return the shape of a batch's latents, `[B, C, t, h, w]`."""
        channels = self.transformer.config.in_channels
        frames, side = (size.frames - 1) // VAE_FACTORS[0] + 1, size.side // VAE_FACTORS[1]
        return (size.batch, channels, frames, side, side)

    def width(self, start: Tensor) -> Tensor:
        """Return how much sigma changes in steps `start [B]`, `[B, 1, 1, 1, 1]`."""
        return _wide(self._sigmas[start + 1] - self._sigmas[start])

    def noised(self, latents: Tensor, noise: Tensor, start: Tensor) -> Tensor:
        """Return latents with the noise that steps `start [B]` begin with."""
        level = _wide(self._sigmas[start])
        return (1 - level) * latents + level * noise

    def velocity(self, x: Tensor, start: Tensor, text: Tensor) -> Tensor:
        """Return the velocity of steps `start [B]`, fp32."""
        out: Tensor = self.transformer(x, self._timesteps[start], text, return_dict=False)[0]
        return out.float()

    def reach(self, noise: Tensor, start: Tensor, text: Tensor) -> Tensor:
        """Return the states before steps `start [B]` on the student's own way from noise."""
        x = noise
        for number in range(STEPS - 1):
            here = torch.full_like(start, number)
            after = x + self.width(here) * self.velocity(x, here, text)
            x = torch.where(_wide(start) > number, after, x)
        return x


def load_transformer(folder: Path, device: str, *, compiled: bool) -> Any:
    """Load a pipeline's transformer in fp32."""
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel.from_pretrained(folder / "transformer").float().to(device)
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    return transformer


class Scenes(Batches):
    """The batches of one rank: sizes are those of all ranks, scenes its own."""

    def __init__(self, options: Options, clock: Clock) -> None:
        super().__init__(
            first=clock.step, sizes=options.sizes, steps=options.steps, seed=options.seed,
            tokenizer=make_tokenizer(),
        )  # fmt: skip
        self.rank = options.ranks.rank

    def __getitem__(self, index: int) -> Batch:
        """Make the batch of step `first + index`."""
        step, options = self.first + index, self.options
        size = choose_size(
            options["sizes"], step=step, steps=self.steps, seed=options["seed"]
        )  # fmt: skip
        own = {"sizes": (size,), "seed": self.rank * 1000 + options["seed"]}
        return make_batch(step, **{**options, **own})


def draw(batch: Batch, *, device: str, compiled: bool) -> Tensor:
    """Return a batch's clips, `[B, 3, T, H, W]` from -1 to 1."""
    size = batch.size
    return render(
        batch.params.to(device), num_frames=size.frames, height=size.side, width=size.side,
        window=batch.window, compiled=compiled,
    )  # fmt: skip


def step_loss(
    student: Student,
    teacher: Teacher,
    batch: Batch,
    generator: torch.Generator,
    options: Options,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a batch, and its mean squared error as a velocity.

    The loss grows as the root of a clip's squared error, so that clips and steps that are hard do
    not drown the others.
    """
    device, size = options.device, batch.size
    ids, mask = batch.ids.to(device), batch.mask.to(device)
    shape = student.latent_shape(size)
    noise = torch.randn(shape, generator=generator, device=device)
    start = torch.randint(STEPS, (len(ids),), generator=generator, device=device)
    with torch.no_grad():
        with autocast(device):
            text = teacher.embed(ids, mask, length=size.text_length)
            if batch.step % 2:
                x = student.reach(noise, start, text[0])
        if not batch.step % 2:
            video = draw(batch, device=device, compiled=options.compiled)
            with autocast(device):
                x = student.noised(teacher.encode(video), noise, start)
        with autocast(device):
            target = (teacher.follow(x, start, text) - x) / student.width(start)
    # Not within one autocast: weights that it casts where there are no gradients, some versions of
    # PyTorch use again where there should be.
    with autocast(device):
        error = student.velocity(x, start, text[0]) - target
    squared = error.square().flatten(1).mean(1)
    loss = ((squared + ROUND**2).sqrt() - ROUND).mean()
    return loss, {"mse": squared.detach().mean()}


def train(options: Options) -> dict[str, Any]:
    """Train for one call, store the student, compare it with the teacher; return the card."""
    torch.manual_seed(options.seed)
    earlier = read_card(options.out)
    lost = not (options.work / f"{NAME}.pt").exists()
    teacher = Teacher(options.teacher, options.device, compiled=options.compiled)
    transformer = load_transformer(options.teacher, options.device, compiled=options.compiled)
    if earlier and lost:
        transformer.load_state_dict(load_file(options.out / WEIGHTS))
    student = Student(transformer, teacher)
    card = _conditions(options, student)
    log_before = earlier.get("log", [])

    def keep(clock: Clock, values: Sequence[Tensor], log: Log) -> None:
        names = (name for name, _ in student.transformer.named_parameters())
        state = {"step": clock.step, "seconds": round(clock.seconds, 1)}
        weights = {n: v.bfloat16().cpu().contiguous() for n, v in zip(names, values, strict=True)}
        store(options.out, weights, {**card, **state, "log": join_logs(log_before, log)})

    _set_up(student, teacher, options)
    left = options.ranks.agree(options.left)
    spent = earlier.get("seconds", 0.0)
    clock = run(
        student,
        NAME,
        Slice(
            out=options.work, steps=options.steps, lr=options.lr, seed=options.seed,
            device=options.device, seconds=spent + left + options.later, max_seconds=left,
            stop_at=options.stop_at, first=earlier.get("step", 0) if lost else 0, spent=spent,
            keep_seconds=KEEP_SECONDS, ranks=options.ranks,
        ),
        lambda clock: stream(Scenes(options, clock), workers=options.workers),
        lambda batch, generator: step_loss(student, teacher, batch, generator, options),
        decay=0.99,
        keep=keep,
    )  # fmt: skip
    if options.ranks.first:
        log = json.loads((options.work / f"{NAME}_log.json").read_text("utf-8"))
        keep(clock, [value.detach() for value in student.parameters()], log)
        card = read_card(options.out)
        card["psnr"] = compare(options.out, options.teacher, card, options.device)
        with atomic_path(options.out / CARD) as temporary:
            temporary.write_text(json.dumps(card), "utf-8")
        print(f"{passed():.0f} s: {json.dumps(card['psnr'])}", flush=True)
    return card


def _set_up(student: Student, teacher: Teacher, options: Options) -> None:
    """Take a first step of each kind and size, which compiles what the run needs, and undo it."""
    if not options.compiled:
        return
    tokenizer = make_tokenizer()
    for size in options.sizes:
        for step in (0, 1):
            batch = make_batch(step, sizes=(size,), steps=2, seed=0, tokenizer=tokenizer)
            generator = torch.Generator(options.device).manual_seed(0)
            step_loss(student, teacher, batch, generator, options)[0].backward()
        student.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        print(f"{passed():.0f} s: first steps of {size.frames}x{size.side}", flush=True)


def _conditions(options: Options, student: Student) -> dict[str, Any]:
    """Return what whoever samples from the model must know, and how it came to be."""
    scenes = held_out_scenes(FIRST_PROMPT + PROMPTS)[FIRST_PROMPT:]
    device = options.device.startswith("cuda")
    return {
        "name": NAME,
        "sizes": {NAMES.get(size.side, "tiny"): [size.side, size.side] for size in options.sizes},
        "frames": options.sizes[0].frames,
        "steps": STEPS,
        "guidance": 1.0,
        "prompts": [caption(scene) for scene in scenes],
        "parameters": sum(value.numel() for value in student.parameters()),
        "gpus": options.ranks.count if device else 0,
        "gpu": torch.cuda.get_device_name() if device else "CPU",
        "torch": torch.__version__,
        "lr": options.lr,
        "seed": options.seed,
    }


def store(out: Path, weights: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write weights and card into a folder, both or neither."""
    with atomic_folder(out) as folder:
        (folder / WEIGHTS).write_bytes(save(dict(weights)))
        (folder / CARD).write_text(json.dumps(card), "utf-8")


def check(stage: str, args: argparse.Namespace, teacher: Path) -> None:
    """Refuse what a stage cannot read, before anything else.

    Raises:
        ValueError: if there is no teacher, no trained student or no model.
    """
    if not (args.toy or (teacher / "model_index.json").exists()):
        raise ValueError(f"{teacher} holds no pipeline; give a folder in diffusers' format")
    if stage == "export" and not (args.out / WEIGHTS).exists():
        raise ValueError(f"{args.out} holds no trained student; give the --out of a run")
    if stage == "show" and not read_card(args.model):
        raise ValueError(f"{args.model} has no {CARD}; give the --model that `export` wrote")


def student_pipeline(out: Path, teacher: Path) -> Any:
    """Return the teacher's pipeline with the stored student and its scheduler."""
    pipe = _pipeline(teacher)
    pipe.transformer.load_state_dict(load_file(out / WEIGHTS))
    pipe.scheduler = few_step_scheduler(pipe.scheduler.config)
    return pipe


def export(out: Path, target: Path, teacher: Path) -> int:
    """Write the stored student as a bf16 pipeline folder with its card; return its bytes."""
    size = save_pipeline(student_pipeline(out, teacher), target)
    with atomic_path(target / CARD) as temporary:
        temporary.write_text((out / CARD).read_text("utf-8"), "utf-8")
    return size


def _pipeline(folder: Path) -> Any:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


Clips = dict[str, "np.ndarray[Any, np.dtype[np.float32]]"]


def _three(
    teacher: Any, student: Any, card: Mapping[str, Any], size: str, *, count: int, device: str
) -> Clips:
    """Return clips of the teacher in all and in few steps, and of the student, by their names."""
    side = card["sizes"][size][0]
    found: Clips = {}
    for name, pipe, steps, guidance in (
        (f"teacher {TEACHER_STEPS}", teacher, TEACHER_STEPS, GUIDANCE),
        (f"teacher {STEPS}", teacher, STEPS, GUIDANCE),
        (f"student {STEPS}", student, STEPS, card["guidance"]),
    ):
        with autocast(device):
            found[name] = generate(
                pipe.to(device), card["prompts"][:count], frames=card["frames"], side=side,
                steps=steps, guidance=guidance, batch=max(1, 16 * 128**2 // side**2), seed=2000,
            )  # fmt: skip
    return found


def compare(
    out: Path, teacher: Path, card: Mapping[str, Any], device: str
) -> dict[str, dict[str, Any]]:
    """Return, per size, PSNR in dB to the teacher's clips from the same noise, and their means."""
    pipes = (_pipeline(teacher), student_pipeline(out, teacher))
    found: dict[str, dict[str, Any]] = {}
    for size in card["sizes"]:
        clips = _three(*pipes, card, size, count=COMPARED[size], device=device)
        whole = clips.pop(f"teacher {TEACHER_STEPS}")
        found[size] = {}
        for name, some in clips.items():
            mse = np.square(some.clip(0, 1) - whole.clip(0, 1)).mean((1, 2, 3, 4))
            psnr = -10 * np.log10(np.maximum(mse, 1e-10))
            found[size][name] = {
                "mean": round(float(psnr.mean()), 2),
                "per clip": [round(float(value), 2) for value in psnr],
            }
    return found


def show(model: Path, sheet: Path, teacher: Path, *, device: str, clips: int = 8) -> None:
    """Write a sheet of the first size: the teacher in 20 and in 4 steps, the student in 4."""
    card = read_card(model)
    size = next(iter(card["sizes"]))
    rows = _three(_pipeline(teacher), _pipeline(model), card, size, count=clips, device=device)
    picture = contact_sheet(rows, card["prompts"][:clips])
    with atomic_path(sheet) as temporary:
        picture.save(temporary, "JPEG", quality=88)
    print(f"{passed():.0f} s: {sheet}", flush=True)


def write_toy_teacher(folder: Path) -> None:
    """Write an untrained pipeline, to try the script with."""
    torch.manual_seed(0)
    pipe = assemble(
        make_transformer(TOY_SHAPE), make_vae(TOY_SHAPE),
        make_text_encoder(TOY_SHAPE, vocab_size=VOCABULARY), make_tokenizer(),
    )  # fmt: skip
    save_pipeline(pipe, folder)


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1, 1)


def main(argv: list[str] | None = None) -> None:
    """Run one stage from the command line."""
    parser = argparse.ArgumentParser(description="Distil the embedded model into four steps.")
    parser.add_argument("stage", choices=("run", "export", "show"))
    parser.add_argument("--out", type=Path, help="the student's weights and card")
    parser.add_argument("--work", type=Path, help="whole checkpoints, not worth keeping")
    parser.add_argument("--model", type=Path, help="folder in diffusers' format")
    parser.add_argument("--sheet", type=Path, help="picture of generated clips")
    parser.add_argument("--teacher", type=Path, help="pipeline folder: the embedded model if none")
    parser.add_argument("--max-seconds", type=float, default=280.0, help="of this call")
    parser.add_argument(
        "--later", type=float, default=0.0, help="seconds that calls after this one will train"
    )
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--toy", action="store_true", help="a tiny network on tiny clips")
    args = parser.parse_args(argv)
    needed = {"run": ("out", "work"), "export": ("out", "model"), "show": ("model", "sheet")}
    for name in needed[args.stage]:
        if getattr(args, name) is None:
            parser.error(f"{args.stage} needs --{name}")
    teacher = args.teacher or embedded_path()
    try:
        check(args.stage, args, teacher)
    except ValueError as error:
        parser.error(str(error))
    if args.stage == "export":
        print(f"{export(args.out, args.model, teacher) / 1e6:.1f} MB in {args.model}")
        return
    if args.stage == "show":
        show(args.model, args.sheet, teacher, device=args.device)
        return
    ranks, device = join(args.device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    toy: dict[str, Any] = {}
    if args.toy:
        teacher = args.work / "teacher"
        if ranks.first:
            write_toy_teacher(teacher)
        ranks.wait()
        toy = {"steps": 6, "sizes": TOY_SIZES}
    train(
        Options(
            out=args.out, work=args.work, teacher=teacher, later=args.later,
            max_seconds=args.max_seconds, lr=args.lr, seed=args.seed, device=device,
            workers=args.workers, compiled=device != "cpu" and not args.no_compile,
            ranks=ranks, **toy,
        )
    )  # fmt: skip
    ranks.leave()


if __name__ == "__main__":
    main()
