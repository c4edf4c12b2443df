"""`svg tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from svg_models.cli.options import AsJson, Quiet, has_options_of
from svg_models.cli.output import err, escaped, out, say_json, say_path, show_note
from svg_models.cli.progress import progress_bars
from svg_models.errors import SettingError
from svg_models.generation.batch import read_lines
from svg_models.generation.settings import WHERE
from svg_models.interrupts import unwinding
from svg_models.tuning.request import TuneRequest

if TYPE_CHECKING:
    from svg_models.tuning.result import Tuned

EXAMPLES = (
    "[bold]What happens[/]\n\n"
    "Each trial generates a clip with different settings and compares it with the dense clip from "
    "the same noise. The best settings within the budget become a recipe for svg generate "
    "--recipe and sparsify(pipe, recipe=...). A page that plots quality against time and a "
    "journal are written beside it. If interrupted, the same command resumes from the journal; "
    "so does a command with another budget.\n\n"
    "[bold]Examples[/]\n\n"
    "svg tune --psnr 32\n\n"
    "svg tune prompts.txt --speedup 2.5 --budget-minutes 60 -o wan.json "
    "-m Wan-AI/Wan2.1-T2V-1.3B-Diffusers\n\n"
    "svg tune --psnr 34 --steps 8 --time-by density\n\n"
    "svg generate --recipe recipe.json"
)


@has_options_of(TuneRequest, without=("prompt",))
def tune(
    request: TuneRequest,
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="File with one prompt per line, beside --prompt."),
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="Recipe to write; its page and journal are written beside it.",
            rich_help_panel=WHERE,
        ),
    ] = "recipe.json",
    opens: Annotated[
        bool,
        typer.Option("--open", help="Open the page in a browser.", rich_help_panel=WHERE),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Search for settings that meet a budget of quality or time, and write them as a recipe."""
    from svg_models.files import check_output

    if not output.lower().endswith(".json"):
        raise SettingError(f"recipes are written as json, got '{output}'; name it {output}.json")
    path = check_output(output)
    page, journal = path.with_suffix(".html"), path.with_suffix(".journal.json")
    for beside in (page, journal):
        check_output(beside)
    request = request.replace(prompts=(*request.prompts, *_prompts(file)), journal=journal)
    with progress_bars(silent=quiet, as_json=as_json) as progress:
        from svg_models.tuning.page import write_tune_page
        from svg_models.tuning.run import tune as run

        with unwinding(path) as interrupts:
            trials = 0

            def tell(sentence: str) -> None:
                nonlocal trials
                trials += 1
                interrupts.says = (
                    f"measurements are in {escaped(str(journal))}; the same command resumes "
                    "from there"
                )
                if not quiet:
                    err().print(escaped(sentence), highlight=False, soft_wrap=True)

            tuned = run(**vars(request.replace(progress=progress, tell=tell)))
            progress("writing", 0, 0)
            write_tune_page(tuned, page)
            if tuned.recipe is not None:
                tuned.recipe.save(path)
            progress.end()
    if as_json:
        written = {"path": str(path) if tuned.recipe else None, "page": str(page)}
        say_json(tuned.to_dict() | written)
    elif not quiet:
        out().print(_table(tuned))
    if opens:
        from svg_models.cli.compare import show_page

        show_page(page)
    if tuned.recipe is None:
        raise SettingError(f"{tuned.shortfall()}; see {page}")
    (measured,) = tuned.recipe.measured
    if measured.prompts < len(tuned.prompts):
        show_note(
            f"time ran out: the recipe was measured on {measured.prompts} of "
            f"{len(tuned.prompts)} prompts; the same command goes on"
        )
    if not as_json:
        say_path(Path(output).expanduser(), "" if quiet else "recipe: ")
        if not quiet:
            say_path(page, "page: ")


def _prompts(file: str | None) -> list[str]:
    """Return the prompts of a file, which says nothing else of them."""
    if file is None:
        return []
    prompts = []
    for number, line in read_lines(file):
        if set(line) != {"prompt"} or not isinstance(line["prompt"], str):
            raise SettingError(f"{file}, line {number}: expected a prompt alone, got {line}")
        prompts.append(line["prompt"])
    return prompts


def _table(tuned: Tuned) -> Table:
    means = tuned.means()
    table = Table(title="best settings at each cost", title_justify="left")
    table.add_column("settings", overflow="fold")
    for name in ("PSNR", "of dense", "prompts"):
        table.add_column(name, justify="right")
    for point in tuned.frontier():
        count, psnr, cost = means[point]
        style = "bold" if point == tuned.point else ""
        cells = (f"{psnr:.1f} dB", f"{cost:.0%}", f"{count}")
        table.add_row(escaped(f"{point}"), *cells, style=style)
    return table
