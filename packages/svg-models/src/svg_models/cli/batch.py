"""`svg batch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from svg_models.cli.config import checked_options, option_names
from svg_models.cli.options import AsJson, Quiet, has_options_of, read_size
from svg_models.cli.output import err, escaped, out, say_json, say_path, show_note
from svg_models.cli.progress import progress_bars
from svg_models.errors import shortened
from svg_models.generation.request import GenerateRequest
from svg_models.generation.settings import WHERE
from svg_models.interrupts import unwinding

if TYPE_CHECKING:
    from svg_models.generation.batch import BatchResult

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "svg batch prompts.txt\n\n"
    "svg batch prompts.jsonl --steps 30 --method svg2@0.25 -o clips\n\n"
    'A line of a .jsonl file: {"prompt": "a red star moving right", "seed": 3, "frames": 33}'
)


@has_options_of(GenerateRequest, without=("prompt",))
def batch(
    request: GenerateRequest,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A prompt a line, or .jsonl with an object a line: a prompt and other settings.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="The folder to write into.", rich_help_panel=WHERE),
    ] = "svg-batch",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Generate a clip of each line of a file; the same line again goes on where it stopped."""
    from svg_models.files import check_folder, writable_folder
    from svg_models.generation.batch import SHEET, plan_batch, read_lines, run_batch, write_sheet

    clips = plan_batch(file, read_lines(file), request, _fields)
    folder = check_folder(output)
    results: list[BatchResult] = []
    with progress_bars(silent=quiet, as_json=as_json) as progress:
        from svg_models.generation.generate import generate
        from svg_models.generation.sample import prepare

        with unwinding(folder / SHEET) as interrupts:
            writable_folder(folder)
            first = clips[0].request.replace(progress=progress)

            def make(wanted: GenerateRequest) -> Any:
                title = f"{len(results) + 1} of {len(clips)}"
                named = progress.named(f"{title}  {wanted.prompt or 'example'}"[:60])
                return generate(**vars(wanted.replace(progress=named)))

            for result in run_batch(clips, folder, lambda: prepare(first, first.spec)[0], make):
                results.append(result)
                there = sum(r.path is not None for r in results)
                interrupts.says = (
                    f"{there} of {len(clips)} clips are in {escaped(str(folder))}; the same line "
                    "again goes on from there"
                )
                if result.error:
                    show_note(f"line {result.clip.line}: {result.error}")
            progress("writing the contact sheet", 0, 0)
            sheet = write_sheet(results, folder)
            progress.end()
    if as_json:
        say_json([_facts(result) for result in results])
    elif not quiet:
        out().print(_table(results))
    if sheet is not None and not as_json:
        say_path(sheet, "" if quiet else "contact sheet: ")
    failed = [result for result in results if result.error]
    if failed:
        err().print(f"[bold red]error:[/] {len(failed)} of {len(clips)} clips were not made")
        raise typer.Exit(2)


def _fields(path: str, line: Mapping[str, Any]) -> dict[str, Any]:
    values = checked_options(Path(path).name, line, option_names(GenerateRequest))
    return read_size(values.pop("size", None)) | values


def _facts(result: BatchResult) -> dict[str, Any]:
    path = None if result.path is None else str(result.path)
    return {
        "line": result.clip.line,
        "path": path,
        "made": result.made,
        "error": result.error or None,
        **(result.facts or {}),
    }


def _table(results: Sequence[BatchResult]) -> Table:
    table = Table()
    for name in ("clip", "prompt"):
        table.add_column(name, overflow="fold")
    for name in ("seed", "seconds", "density"):
        table.add_column(name, justify="right")
    for result in results:
        facts = result.facts or {}
        density = facts.get("attention", {}).get("mean_density")
        table.add_row(
            escaped(result.clip.name),
            escaped(shortened(result.clip.request.prompt or "(the model's example)", 200)),
            str(result.clip.request.seed),
            "failed" if result.error else f"{facts.get('seconds', 0):.1f}",
            "-" if density is None else f"{density:.0%}",
        )
    return table
