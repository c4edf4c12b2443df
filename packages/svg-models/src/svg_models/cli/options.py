"""The options that commands share."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

WHAT, HOW, WHERE = "What to generate", "Attention", "Machine and output"

Prompt = Annotated[
    str | None,
    typer.Argument(help="What the clip shows. [dim]Default: an example of the model.[/]"),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A folder in diffusers' format or a hub id, such as "
        "Wan-AI/Wan2.1-T2V-14B-Diffusers. [dim]Default: the embedded model.[/]",
        rich_help_panel=WHAT,
    ),
]
Negative = Annotated[
    str | None,
    typer.Option("--negative-prompt", help="What to steer away from.", rich_help_panel=WHAT),
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps.", rich_help_panel=WHAT)
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", help="Strength of classifier-free guidance.", rich_help_panel=WHAT),
]
Size = Annotated[
    str | None,
    typer.Option("--size", metavar="WxH", help="Pixels, as in 832x480.", rich_help_panel=WHAT),
]
NumFrames = Annotated[
    int | None,
    typer.Option(
        "--frames",
        help="Video frames, for most models a multiple of 4 plus 1.",
        rich_help_panel=WHAT,
    ),
]
Fps = Annotated[float | None, typer.Option("--fps", help="Frames a second.", rich_help_panel=WHAT)]
Seed = Annotated[
    int,
    typer.Option("--seed", help="Start of the noise; one seed, one clip.", rich_help_panel=WHAT),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend", help="Kernel of sparse attention, see svg doctor.", rich_help_panel=HOW
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=WHERE),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16 or float16.",
        rich_help_panel=WHERE,
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        "--offload",
        help="What waits in memory until the GPU needs it: none, model (components), group or "
        "sequential (layers).",
        rich_help_panel=WHERE,
    ),
]
Image = Annotated[
    str | None,
    typer.Option(
        "--image",
        metavar="PATH",
        help="A picture to start from, for image-to-video models.",
        rich_help_panel=WHAT,
    ),
]
Video = Annotated[
    str | None,
    typer.Option(
        "--video",
        metavar="PATH",
        help="A video to start from: redrawn, followed or continued, as the model does.",
        rich_help_panel=WHAT,
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--strength",
        help="How much of the video is redrawn, above 0 and up to 1.",
        rich_help_panel=WHAT,
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="PATH[:WEIGHT]",
        help="A LoRA, by path or hub id; repeat for more.",
        rich_help_panel=WHAT,
    ),
]


def read_size(text: str | None) -> dict[str, Any]:
    """Read WIDTHxHEIGHT.

    Returns:
        Height and width; nothing if nothing was typed.

    Raises:
        SettingError: if it is no size.
    """
    from svg_models.errors import SettingError

    if text is None:
        return {}
    match = re.fullmatch(r"\s*(\d+)\s*[x×X]\s*(\d+)\s*", text)
    if match is None:
        raise SettingError(f"size is WIDTHxHEIGHT in pixels, such as 832x480, got '{text}'")
    return {"width": int(match[1]), "height": int(match[2])}
