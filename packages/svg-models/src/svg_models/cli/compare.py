"""`svg compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

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
from svg_models.cli.output import escaped, out, spoken_errors
from svg_models.cli.progress import progress_bars

if TYPE_CHECKING:
    from svg_models.comparison.result import Comparison

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "svg compare\n\n"
    'svg compare "a blue circle moving up" --density 0.3 -o blue\n\n'
    "svg compare --method svg2@0.2 --method svg2@0.4 --method random@0.4"
)


def compare(
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
        list[str] | None,
        typer.Option(
            "--method",
            help="A method to set beside dense; repeat for more. svg2, svg2-comp, svg2-error, svg1 "
            "or random, each with @DENSITY if you like. "
            "[dim]Default: svg2, svg2-comp, svg2-error, svg1.[/]",
            rich_help_panel=HOW,
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            "--density",
            help="Budget of every method that names none, 0 to 1.",
            rich_help_panel=HOW,
        ),
    ] = None,
    backend: Backend = "auto",
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="The folder to write into.", rich_help_panel=WHERE),
    ] = "svg-compare",
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = "none",
) -> None:
    """Generate one clip dense and sparse, measure the difference, and make a page of it."""
    with spoken_errors():
        from svg_models.comparison.run import compare as run
        from svg_models.comparison.run import parse_methods
        from svg_models.generation.settings import check_numbers
        from svg_models.video import writable_folder

        specs = parse_methods(method, density=density)
        settings = read_size(size) | {"frames": frames, "fps": fps, "strength": strength}
        settings |= {"steps": steps, "guidance": guidance, "seed": seed}
        check_numbers(**settings)
        folder = writable_folder(output)
        with progress_bars() as progress:
            comparison = run(
                prompt,
                methods=specs,
                model=model,
                image=image,
                video=video,
                loras=lora or (),
                backend=backend,
                device=device,
                dtype=dtype,
                offload=offload,
                negative_prompt=negative_prompt,
                progress=progress,
                **settings,
            )
            progress("writing the page", 0, 0)
            page = comparison.save(folder)
            progress.end()
        out().print(_comparison_table(comparison))
        out().print(f"page: {page.resolve()}", soft_wrap=True, highlight=False, markup=False)


def _comparison_table(comparison: Comparison) -> Table:
    from svg_models.report.render import decibels

    table = Table(title=escaped(comparison.dense.settings.prompt), title_justify="left")
    table.add_column("method")
    for name in ("density", "PSNR", "SSIM", "seconds", "speed-up"):
        table.add_column(name, justify="right")
    table.add_row("Dense attention", "100%", "-", "-", f"{comparison.dense.seconds:.1f}", "1.00x")
    for candidate in comparison.candidates:
        clip, close = candidate.clip, candidate.similarity
        table.add_row(
            clip.method.label,
            f"{clip.stats.mean_density:.0%}",
            decibels(close.mean_psnr),
            f"{close.mean_ssim:.3f}",
            f"{clip.seconds:.1f}",
            f"{candidate.speedup:.2f}x",
        )
    return table
