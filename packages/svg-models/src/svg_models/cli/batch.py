"""`svg batch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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
    from svg_models.generation.batch import BatchClip, BatchResult

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "svg batch prompts.txt\n\n"
    "svg batch prompts.jsonl --steps 30 --method svg2@0.25 -o clips\n\n"
    "svg batch prompts.jsonl --gpus 8 --gpus-per-clip 2\n\n"
    'A line of a .jsonl file: {"prompt": "a red star moving right", "seed": 3, "frames": 33}'
)


@has_options_of(GenerateRequest, without=("prompt",))
def batch(
    request: GenerateRequest,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="One prompt per line, or .jsonl: one object per line, with a prompt and settings.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="Output folder.", rich_help_panel=WHERE),
    ] = "svg-batch",
    gpus_per_clip: Annotated[
        int,
        typer.Option(
            "--gpus-per-clip",
            metavar="N",
            min=1,
            help="GPUs that generate one clip together.",
            rich_help_panel=WHERE,
        ),
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Ray cluster that generates the clips: auto, HOST:PORT, or local.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Generate a clip for each line of a file. The same command resumes where it stopped."""
    from svg_models.files import check_folder, writable_folder
    from svg_models.generation.batch import SHEET, plan_batch, read_lines, run_batch, write_sheet
    from svg_models.generation.makers import (
        check_groups,
        groups_of,
        make_here,
        make_on_groups,
    )
    from svg_models.video import check_encoder

    clips = plan_batch(file, read_lines(file), request, _fields)
    folder = check_folder(output)
    check_encoder()
    results: list[BatchResult] = []
    check_groups(request.gpus, gpus_per_clip)
    with ExitStack() as ended:
        alone = request.gpus == 1 and ray is None
        groups = [] if alone or ray is not None else groups_of(request, gpus_per_clip)
        progress = ended.enter_context(progress_bars(silent=quiet, as_json=as_json))
        interrupts = ended.enter_context(unwinding(folder / SHEET))
        writable_folder(folder)
        shown = [progress]
        shown += [progress.another() for _ in range(request.gpus // gpus_per_clip - 1)]

        def reports(clip: BatchClip, maker: int) -> Any:
            title = f"{clips.index(clip) + 1} of {len(clips)}"
            return shown[maker].named(f"{title}  {clip.request.prompt or 'example'}"[:60])

        def make(missing: Sequence[BatchClip]) -> Any:
            if alone:
                return make_here(missing, reports)
            if ray is not None:
                from svg_models.generation.on_ray import make_on_ray, ray_cluster

                module = ended.enter_context(ray_cluster(ray, request, gpus_per_clip))
                return make_on_ray(module, missing, request, gpus_per_clip, reports)
            for group in groups:
                ended.enter_context(group)
            return make_on_groups(missing, groups, reports)

        for result in run_batch(clips, folder, make):
            results.append(result)
            there = sum(r.path is not None for r in results)
            interrupts.says = (
                f"{there} of {len(clips)} clips are in {escaped(str(folder))}; the same command "
                "resumes from there"
            )
            if result.error:
                show_note(f"line {result.clip.line}: {result.error}")
        progress("writing the contact sheet", 0, 0)
        results.sort(key=lambda result: result.clip.line)
        sheet = write_sheet(results, folder)
        for one in shown:
            one.end()
    if as_json:
        say_json([_facts(result) for result in results])
    elif not quiet:
        out().print(_table(results))
    if sheet is not None and not as_json:
        say_path(sheet, "" if quiet else "contact sheet: ")
    failed = [result for result in results if result.error]
    if failed:
        err().print(f"[bold red]error:[/] {len(failed)} of {len(clips)} clips failed")
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
