"""`svg compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from svg_models.cli.config import used, write_config
from svg_models.cli.options import AsJson, Quiet, SaveConfig, has_options_of
from svg_models.cli.output import escaped, out, say_json, say_path, show_note
from svg_models.cli.progress import progress_bars
from svg_models.errors import shortened
from svg_models.generation.request import CompareRequest
from svg_models.generation.settings import WHERE
from svg_models.interrupts import unwinding

if TYPE_CHECKING:
    from svg_models.comparison.result import Comparison

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "svg compare\n\n"
    'svg compare "a blue circle moving up" --density 0.3 -o blue\n\n'
    "svg compare --method svg2@0.2 --method svg2@0.4 --method random@0.4"
)


@has_options_of(CompareRequest)
def compare(
    request: CompareRequest,
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="Output folder.", rich_help_panel=WHERE),
    ] = "svg-compare",
    opens: Annotated[
        bool,
        typer.Option("--open", help="Open the page in a browser.", rich_help_panel=WHERE),
    ] = False,
    save_config: SaveConfig = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Generate one clip dense and sparse, measure the difference, and write a page about it."""
    from svg_models.files import check_folder, check_output
    from svg_models.video import check_encoder

    folder = check_folder(output)
    check_encoder()
    if save_config is not None:
        check_output(save_config)
    with progress_bars(silent=quiet, as_json=as_json) as progress:
        from svg_models.comparison.result import PAGE
        from svg_models.comparison.run import compare as run

        with unwinding(folder / PAGE):
            comparison = run(**vars(request.replace(progress=progress)))
            progress("writing the page", 0, 0)
            page = comparison.save(folder)
            progress.end()
    if save_config is not None:
        write_config(used(request, comparison.dense.settings), save_config)
    if as_json:
        say_json(comparison.to_dict() | {"page": str(page.resolve())})
    else:
        if not quiet:
            out().print(_comparison_table(comparison))
            if comparison.no_speed:
                show_note(f"no speed is shown, because {comparison.no_speed}")
            elif comparison.gains_from:
                show_note(comparison.gains_from)
        say_path(page.resolve(), "" if quiet else "page: ")
    if opens:
        show_page(page)


def show_page(page: Path) -> None:
    """Open a page in a browser, or say that there is none."""
    import webbrowser

    if not webbrowser.open(page.resolve().as_uri()):
        show_note("no browser was found; open the page by its path")


def _comparison_table(comparison: Comparison) -> Table:
    from svg_models.report.render import decibels

    timed = [c for c in comparison.candidates if c.speed is not None]
    table = Table(
        title=escaped(shortened(comparison.dense.settings.prompt, 100)), title_justify="left"
    )
    table.add_column("method")
    for name in ("density", "PSNR", "SSIM", *(("step", "speed-up") if timed else ())):
        table.add_column(name, justify="right")
    dense = min((c.speed.dense_step for c in timed if c.speed), default=0.0)
    times = (f"{dense:.2f} s", "1.00x") if timed else ()
    table.add_row("Dense attention", "100%", "-", "-", *times)
    for candidate in comparison.candidates:
        clip, close, speed = candidate.clip, candidate.similarity, candidate.speed
        if timed:
            times = (
                ("-", "-") if speed is None else (f"{speed.step:.2f} s", f"{speed.speedup:.2f}x")
            )
        table.add_row(
            clip.method.title,
            f"{clip.stats.mean_density:.0%}",
            decibels(close.mean_psnr),
            f"{close.mean_ssim:.3f}",
            *times,
        )
    return table
