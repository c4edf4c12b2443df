"""`svg generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from svg_models.cli.options import (
    HOW,
    WHERE,
    Backend,
    Device,
    Dtype,
    Fps,
    Guidance,
    Image,
    Loras,
    Model,
    Negative,
    NumFrames,
    Offload,
    Prompt,
    Seed,
    Size,
    Steps,
    Strength,
    Video,
    read_size,
)
from svg_models.cli.output import err, escaped, out, spoken_errors
from svg_models.cli.progress import progress_bars

if TYPE_CHECKING:
    from svg_models.generation.clip import Clip

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "svg generate\n\n"
    'svg generate "a large red star moving right" --seed 3 -o star.mp4\n\n'
    "svg generate --method svg2-error --density 0.2\n\n"
    'svg generate "a blue circle moving up" --video star.mp4 --strength 0.6\n\n'
    'svg generate "a fox in the snow" -m Wan-AI/Wan2.1-T2V-14B-Diffusers --size 1280x720'
)


def generate(
    prompt: Prompt = None,
    model: Model = None,
    negative_prompt: Negative = None,
    image: Image = None,
    video: Video = None,
    strength: Strength = None,
    lora: Loras = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    frames: NumFrames = None,
    fps: Fps = None,
    seed: Seed = 0,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="auto (the model's recipe), svg2, svg2-comp, svg2-error, svg1, random or dense.",
            rich_help_panel=HOW,
        ),
    ] = "auto",
    density: Annotated[
        float | None,
        typer.Option(
            "--density",
            help="Share of query-key pairs to compute on sparse calls, 0 to 1.",
            rich_help_panel=HOW,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            help="Attention mass that SVG2 keeps, 0 to 1, in place of a density.",
            rich_help_panel=HOW,
        ),
    ] = None,
    compensate: Annotated[
        bool,
        typer.Option(
            "--compensate",
            help="Count what is left out through its centroids: auto and svg2 become svg2-comp.",
            rich_help_panel=HOW,
        ),
    ] = False,
    backend: Backend = "auto",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the transformer: its first step takes longer, the others less.",
            rich_help_panel=HOW,
        ),
    ] = False,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="The mp4 to write, replaced if there.", rich_help_panel=WHERE
        ),
    ] = "video.mp4",
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = "none",
) -> None:
    """Generate one clip with sparse attention and write it as an mp4."""
    with spoken_errors():
        from svg_models.generation.method_names import MethodSpec
        from svg_models.generation.sample import generate as run
        from svg_models.generation.settings import check_numbers
        from svg_models.video import check_suffix, writable_path

        check_suffix(output)
        path = writable_path(output)
        spec = MethodSpec.parse(method, density=density, top_p=top_p)
        if compensate:
            spec = spec.compensated()
        settings = read_size(size) | {"frames": frames, "fps": fps, "strength": strength}
        settings |= {"steps": steps, "guidance": guidance, "seed": seed}
        check_numbers(**settings)
        with progress_bars() as progress:
            clip = run(
                prompt,
                model=model,
                image=image,
                video=video,
                loras=lora or (),
                method=spec,
                backend=backend,
                device=device,
                dtype=dtype,
                offload=offload,
                compiled=compiled,
                negative_prompt=negative_prompt,
                progress=progress,
                **settings,
            )
            progress("writing", 0, 0)
            clip.save(path)
            progress.end()
        _tell_clip(clip, str(path))


def _tell_clip(clip: Clip, path: str) -> None:
    settings = clip.settings
    text = (
        f"{len(clip.frames)} frames of {settings.width} x {settings.height} in "
        f"{clip.seconds:.1f} s with {clip.method.label}"
    )
    if clip.stats.sparse_records:
        text += f", density {clip.stats.mean_density:.0%} on sparse calls"
    err().print(escaped(text), highlight=False)
    if clip.method.name == "dense" and clip.config["note"]:
        err().print(escaped(clip.config["note"]), highlight=False)
    out().print(path, soft_wrap=True, highlight=False, markup=False)
