"""`svg generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svg_models.cli.config import used, write_config
from svg_models.cli.options import AsJson, Quiet, SaveConfig, SaveRecipe, has_options_of
from svg_models.cli.output import err, escaped, say_json, say_path
from svg_models.cli.progress import progress_bars
from svg_models.generation.request import GenerateRequest
from svg_models.generation.settings import WHERE
from svg_models.interrupts import unwinding

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


@has_options_of(GenerateRequest)
def generate(
    request: GenerateRequest,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="The mp4 to write; replaces an existing one.",
            rich_help_panel=WHERE,
        ),
    ] = "video.mp4",
    save_config: SaveConfig = None,
    save_recipe: SaveRecipe = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Generate one clip with sparse attention and write it as an mp4."""
    from svg_models.files import check_outputs, check_suffix
    from svg_models.generation.ranks import places_of
    from svg_models.video import check_encoder

    if request.gpus > 1:
        places_of(request)  # refuses what is not there, before torch is imported
    check_suffix(output)
    path = check_outputs(output, save_config, save_recipe)
    check_encoder()
    with progress_bars(silent=quiet, as_json=as_json) as progress:
        from svg_models.generation.generate import generate as run

        with unwinding(path):
            clip = run(**vars(request.replace(progress=progress)))
            progress("writing", 0, 0)
            clip.save(path)
            progress.end()
    if save_config is not None:
        write_config(used(request, clip.settings), save_config)
    if save_recipe is not None:
        from svg_models.recipe import Recipe

        Recipe.from_dict(clip.stats.recipe).save(save_recipe)
    if as_json:
        say_json(clip.to_dict() | {"path": str(path)})
        return
    if not quiet:
        _tell_clip(clip, "processes" if request.device == "cpu" else "GPUs")
    say_path(Path(output).expanduser())


def _tell_clip(clip: Clip, many: str) -> None:
    settings = clip.settings
    where = f" on {clip.gpus} {many}" if clip.gpus > 1 else ""
    frames = len(clip.frames)
    text = (
        f"{frames} frame{'s' * (frames > 1)} of {settings.width} x {settings.height} in "
        f"{clip.seconds:.1f} s{where} with {clip.method.label}"
    )
    if clip.stats.sparse_records:
        text += f", density {clip.stats.mean_density:.0%} in sparse calls"
    err().print(escaped(text), highlight=False)
