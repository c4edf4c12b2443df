"""The command `svg`."""

from __future__ import annotations

import json
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from svg_models.compare import Comparison
    from svg_models.generate import Clip

app = typer.Typer(
    name="svg",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Generate video with sparse attention, and see what sparsity changes.\n\n"
    "Without any option, [bold]svg generate[/] and [bold]svg compare[/] run a small model that "
    "comes with this package: no download, no GPU.",
    epilog="Start with [bold]svg generate[/], then [bold]svg compare[/]. Ask [bold]svg doctor[/] "
    "what this machine can run.",
)
_WHAT, _HOW, _WHERE = "What to generate", "Attention", "Machine and output"
_INTERRUPTED = 130  # 128 + SIGINT, what shells expect


def _out() -> Console:
    return Console()


def _err() -> Console:
    return Console(stderr=True)


def _fail(sentence: str) -> NoReturn:
    _err().print(f"[bold red]error:[/] {_escaped(sentence)}", soft_wrap=True, highlight=False)
    raise typer.Exit(2)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))


@contextmanager
def _spoken_errors() -> Iterator[None]:
    """Turn what a person can mend into one sentence and exit code 2."""
    from svg_attention import UnsupportedError
    from svg_models.errors import SvgModelsError

    try:
        with _terminated_like_interrupted():
            yield
    except SvgModelsError as error:
        _fail(str(error))
    except UnsupportedError as error:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in error.reasons.items())
        _fail(f"this backend cannot run here ({reasons}); leave --backend out to use what can")
    except KeyboardInterrupt:
        _err().print("[yellow]stopped:[/] nothing was written", highlight=False)
        raise typer.Exit(_INTERRUPTED) from None


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM, which `timeout` and schedulers send, clean up as Ctrl-C does."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress() -> Iterator[Any]:
    """Show one bar per stage on stderr, with the time left where it can be known.

    The bars vanish at the end. Where stderr is no terminal there are none, only a line per clip.
    """
    console = _err()
    bars = Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with _hushed_libraries(), bars:
        yield _Stages(bars)


class _Stages:
    """Called as `(stage, done, total)`; a new stage ends the one before."""

    def __init__(self, bars: Progress) -> None:
        self._bars, self._stage = bars, ""
        self._task: TaskID | None = None

    def __call__(self, stage: str, done: float, total: float) -> None:
        percent = stage == "loading"  # parameters; their number tells nobody anything
        if percent:
            done, total = round(100 * done / max(total, 1)), 100
        if stage != self._stage:
            self.end()
            self._stage = stage
            if self._bars.disable and stage.endswith(": sampling"):
                self._bars.console.print(stage.removesuffix(": sampling"), highlight=False)
            self._task = self._bars.add_task(stage, total=total or None, completed=int(done))
        elif self._task is not None:
            self._bars.update(self._task, completed=int(done), total=total or None)
        if self._bars.disable:
            return
        if stage == "downloading":  # the hub's client draws its own bars, with the time left
            self._bars.stop()
        elif not self._bars.live.is_started:
            self._bars.start()

    def end(self) -> None:
        """Mark the running stage as done."""
        if self._task is not None:
            task = self._bars.tasks[self._task]
            total = task.total or 1
            self._bars.update(self._task, total=total, completed=total)
            if task.description and not task.description.endswith(("sampling", "loading")):
                self._bars.update(self._task, visible=False)


@contextmanager
def _hushed_libraries() -> Iterator[None]:
    """Keep the libraries' own bars and warnings out of ours; what this package says stays."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    levels = of_diffusers.get_verbosity(), of_transformers.get_verbosity()
    for library in (of_diffusers, of_transformers):
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning, module=r"svg_models\.")
            warnings.showwarning = _show_note
            yield
    finally:
        for library, level in zip((of_diffusers, of_transformers), levels, strict=True):
            library.enable_progress_bar()
            library.set_verbosity(level)


def _show_note(message: Any, *_: Any, **__: Any) -> None:
    _err().print(f"[yellow]note:[/] {_escaped(str(message))}", soft_wrap=True, highlight=False)


def _size(text: str | None) -> dict[str, Any]:
    from svg_models.errors import SettingError

    if text is None:
        return {}
    match = re.fullmatch(r"\s*(\d+)\s*[x×X]\s*(\d+)\s*", text)
    if match is None:
        raise SettingError(f"size is WIDTHxHEIGHT in pixels, such as 832x480, got '{text}'")
    return {"width": int(match[1]), "height": int(match[2])}


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    import importlib.metadata as metadata

    for name in ("svg-models", "svg-attention", "flash-kmeans", "svg-kernels"):
        try:
            _out().print(f"{name} {metadata.version(name)}", highlight=False)
        except metadata.PackageNotFoundError:
            _out().print(f"{name} not installed", highlight=False)
    raise typer.Exit


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
        rich_help_panel=_WHAT,
    ),
]
Negative = Annotated[
    str | None,
    typer.Option("--negative-prompt", help="What to steer away from.", rich_help_panel=_WHAT),
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps.", rich_help_panel=_WHAT)
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", help="Strength of classifier-free guidance.", rich_help_panel=_WHAT),
]
Size = Annotated[
    str | None,
    typer.Option("--size", metavar="WxH", help="Pixels, as in 832x480.", rich_help_panel=_WHAT),
]
NumFrames = Annotated[
    int | None,
    typer.Option("--frames", help="Video frames, a multiple of 4 plus 1.", rich_help_panel=_WHAT),
]
Fps = Annotated[float | None, typer.Option("--fps", help="Frames a second.", rich_help_panel=_WHAT)]
Seed = Annotated[
    int,
    typer.Option("--seed", help="Start of the noise; one seed, one clip.", rich_help_panel=_WHAT),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend", help="Kernel of sparse attention, see svg doctor.", rich_help_panel=_HOW
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=_WHERE),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16 or float16.",
        rich_help_panel=_WHERE,
    ),
]
Offload = Annotated[
    bool,
    typer.Option(
        "--offload",
        help="Keep on the GPU only the part of the model that runs.",
        rich_help_panel=_WHERE,
    ),
]


@app.callback()
def svg(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show versions and exit."
        ),
    ] = False,
) -> None:
    """Hold the options that stand before a command."""


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "svg generate\n\n"
    'svg generate "a large red star moving right" --seed 3 -o star.mp4\n\n'
    "svg generate --method svg2-error --density 0.2\n\n"
    'svg generate "a fox in the snow" -m Wan-AI/Wan2.1-T2V-14B-Diffusers --size 1280x720'
)
def generate(
    prompt: Prompt = None,
    model: Model = None,
    negative_prompt: Negative = None,
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
            help="svg2, svg2-comp, svg2-error, svg1, random or dense.",
            rich_help_panel=_HOW,
        ),
    ] = "svg2",
    density: Annotated[
        float | None,
        typer.Option(
            "--density",
            help="Share of query-key pairs to compute on sparse calls, 0 to 1.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            help="Attention mass that SVG2 keeps, 0 to 1, in place of a density.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    compensate: Annotated[
        bool,
        typer.Option(
            "--compensate",
            help="Count what is left out through its centroids: svg2 becomes svg2-comp.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    backend: Backend = "auto",
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="The mp4 to write, replaced if there.", rich_help_panel=_WHERE
        ),
    ] = "video.mp4",
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = False,
) -> None:
    """Generate one clip with sparse attention and write it as an mp4."""
    with _spoken_errors():
        from svg_models.generate import check_numbers
        from svg_models.generate import generate as run
        from svg_models.pipelines import load_pipeline
        from svg_models.specs import MethodSpec
        from svg_models.video import check_suffix, writable_path

        check_suffix(output)
        path = writable_path(output)
        spec = MethodSpec.parse(method, density=density, top_p=top_p)
        if compensate:
            spec = spec.compensated()
        settings = _size(size) | {"steps": steps, "guidance": guidance, "fps": fps, "seed": seed}
        settings |= {"frames": frames}
        check_numbers(**settings)
        with _progress() as progress:
            loaded = load_pipeline(
                model, device=device, dtype=dtype, offload=offload, progress=progress
            )
            clip = run(
                prompt,
                model=loaded,
                method=spec,
                backend=backend,
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
        f"{settings.frames} frames of {settings.width} x {settings.height} in "
        f"{clip.seconds:.1f} s with {clip.method.label}"
    )
    if clip.stats.sparse_records:
        text += f", density {clip.stats.mean_density:.0%} on sparse calls"
    _err().print(_escaped(text), highlight=False)
    _out().print(path, soft_wrap=True, highlight=False, markup=False)


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "svg compare\n\n"
    'svg compare "a blue circle moving up" --density 0.3 -o blue\n\n'
    "svg compare --method svg2@0.2 --method svg2@0.4 --method random@0.4"
)
def compare(
    prompt: Prompt = None,
    model: Model = None,
    negative_prompt: Negative = None,
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
            rich_help_panel=_HOW,
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            "--density",
            help="Budget of every method that names none, 0 to 1.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    backend: Backend = "auto",
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="The folder to write into.", rich_help_panel=_WHERE),
    ] = "svg-compare",
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = False,
) -> None:
    """Generate one clip dense and sparse, measure the difference, and make a page of it."""
    with _spoken_errors():
        from svg_models.compare import compare as run
        from svg_models.compare import parse_methods
        from svg_models.generate import check_numbers
        from svg_models.pipelines import load_pipeline
        from svg_models.video import writable_folder

        specs = parse_methods(method, density=density)
        settings = _size(size) | {"steps": steps, "guidance": guidance, "fps": fps, "seed": seed}
        settings |= {"frames": frames}
        check_numbers(**settings)
        folder = writable_folder(output)
        with _progress() as progress:
            loaded = load_pipeline(
                model, device=device, dtype=dtype, offload=offload, progress=progress
            )
            comparison = run(
                prompt,
                methods=specs,
                model=loaded,
                backend=backend,
                negative_prompt=negative_prompt,
                progress=progress,
                **settings,
            )
            progress("writing the page", 0, 0)
            page = comparison.save(folder)
            progress.end()
        _out().print(_comparison_table(comparison))
        _out().print(f"page: {page.resolve()}", soft_wrap=True, highlight=False, markup=False)


def _comparison_table(comparison: Comparison) -> Table:
    from svg_models.report.render import decibels

    table = Table(title=_escaped(comparison.dense.settings.prompt), title_justify="left")
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


@app.command()
def models() -> None:
    """List the models: the embedded one, and the families that can be made sparse."""
    with _spoken_errors():
        from svg_models.families import known_families

        _out().print(
            "[bold]embedded[/]  a small Wan model of moving shapes in this package; the default\n"
        )
        table = Table(title="Published settings by family", title_justify="left")
        for name in ("family", "settings published for", "clusters", "dense first"):
            table.add_column(name)
        table.add_column("tokens", justify="right")
        for family in known_families():
            for index, row in enumerate(family.recipes):
                table.add_row(
                    f"[bold]{family.name}[/]" if index == 0 else "",
                    row.title,
                    f"{row.q_clusters} x {row.k_clusters}",
                    f"{row.schedule.dense_steps:.0%} of steps",
                    f"{row.tokens:,}",
                )
            table.add_section()
        _out().print(table)
        titles = "; ".join(f"{f.name}: {f.title}" for f in known_families())
        _out().print(
            f"Any diffusers pipeline of these families loads with --model ({_escaped(titles)}). "
            "Short clips get fewer clusters.",
            highlight=False,
        )


@app.command()
def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for a program to read.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Say what this machine can run, and why not."""
    with _spoken_errors():
        from svg_models.doctor import diagnose, to_dict
        from svg_models.pipelines import pick_device

        checks = diagnose(pick_device(device))
        if as_json:
            json.dump(to_dict(checks), sys.stdout, indent=1)
            sys.stdout.write("\n")
            return
        table = Table(title="What this machine can run", title_justify="left")
        for name in ("", "what", "", "detail"):
            table.add_column(name, overflow="fold")
        marks = {True: "[green]✓[/]", False: "[red]✗[/]", None: ""}
        part = ""
        for check in checks:
            if check.part != part:
                table.add_section()
            shown, part = ("" if check.part == part else check.part), check.part
            table.add_row(
                f"[bold]{shown}[/]", check.name, marks[check.works], _escaped(check.detail)
            )
        _out().print(table)


if __name__ == "__main__":
    app()
