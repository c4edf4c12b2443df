"""The command `svg`."""

from __future__ import annotations

from typing import Annotated

import typer

from svg_models.cli import batch as _batch
from svg_models.cli import compare as _compare
from svg_models.cli import generate as _generate
from svg_models.cli import models as _models
from svg_models.cli import tune as _tune
from svg_models.cli.doctor import doctor
from svg_models.cli.output import PlainCommand, SpokenGroup, out

__all__ = ["app"]

app = typer.Typer(
    name="svg",
    cls=SpokenGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Generate video with sparse attention, and see the effect of sparsity.\n\n"
    "Without options, [bold]svg generate[/] and [bold]svg compare[/] run a small model that ships "
    "with this package: no download, no GPU.",
    epilog="Start with [bold]svg generate[/], then [bold]svg compare[/]. [bold]svg doctor[/] "
    "reports what this machine can run.",
)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    import importlib.metadata as metadata

    for name in ("svg-models", "svg-attention", "svg-flash-kmeans", "svg-kernels"):
        try:
            out().print(f"{name} {metadata.version(name)}", highlight=False)
        except metadata.PackageNotFoundError:
            out().print(f"{name} not installed", highlight=False)
    raise typer.Exit


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


app.command("generate", cls=PlainCommand, epilog=_generate.EXAMPLES)(_generate.generate)
app.command("batch", cls=PlainCommand, epilog=_batch.EXAMPLES)(_batch.batch)
app.command("compare", cls=PlainCommand, epilog=_compare.EXAMPLES)(_compare.compare)
app.command("tune", cls=PlainCommand, epilog=_tune.EXAMPLES)(_tune.tune)
app.command("models", cls=PlainCommand, epilog=_models.EXAMPLES)(_models.models)
app.command("doctor", cls=PlainCommand)(doctor)
