"""Give a command the options of a request, each as its field describes itself."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from svg_models.cli.config import option_names, read_config
from svg_models.cli.output import spoken_errors
from svg_models.generation.request import Request
from svg_models.generation.settings import WHAT, WHERE, Option

__all__ = ["AsJson", "Quiet", "SaveConfig", "SaveRecipe", "has_options_of", "read_size"]

SMALLEST = 16  # diffusers' pipelines ask for multiples of it whatever the VAE
SIZE = typer.Option(
    "--size", metavar="WxH", help="Width and height, such as 832x480.", rich_help_panel=WHAT
)

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print only results and errors.", rich_help_panel=WHERE),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print results as JSON.", rich_help_panel=WHERE),
]
SaveConfig = Annotated[
    str | None,
    typer.Option(
        "--save-config",
        metavar="FILE",
        help="Write the options of this run as a file for --config.",
        rich_help_panel=WHERE,
    ),
]
SaveRecipe = Annotated[
    str | None,
    typer.Option(
        "--save-recipe",
        metavar="FILE",
        help="Write method, settings and schedule of this run as a recipe for --recipe.",
        rich_help_panel=WHERE,
    ),
]


def has_options_of(
    kind: type[Request], *, without: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a function of a request, and of options of its own, into a command.

    What a person can mend becomes one sentence, whether it is found while the request is made or
    while the function runs.

    Args:
        kind: the class of the request.
        without: fields that this command has no option for.
    """
    shared = {name: o for name, o in option_names(kind).items() if name not in without}
    defaults = {f.name: f.default for f in fields(kind)}

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        given = [_parameter(name, about, defaults[name]) for name, about in shared.items()]
        parameters = [*given, _keyword("size", None, Annotated[str | None, SIZE])]
        parameters.append(_keyword("config", None, Annotated[str | None, _config(shared)]))
        parameters += [_keyword(p.name, p.default, p.annotation) for p in own]

        @functools.wraps(function)
        def command(**values: Any) -> None:
            with spoken_errors():
                rest = {p.name: values[p.name] for p in own}
                asked = {name: values[name] for name in shared}
                asked = {
                    name: (tuple(value or ()) if shared[name].repeats else value)
                    for name, value in asked.items()
                }
                request = kind(**asked, **read_size(values["size"]))
                check_where(request)
                function(request, **rest)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return wrap


def _parameter(name: str, about: Option, default: Any) -> inspect.Parameter:
    kind: Any = about.kind
    if about.repeats:
        kind = list[kind]
    if name == "prompt":
        says: Any = typer.Argument(help=about.help)
    else:
        says = typer.Option(
            *about.names,
            help=about.help,
            metavar=about.metavar or {int: "N", float: "X"}.get(about.kind),
            parser=_reading(about.kind),
            autocompletion=_completing(about),
            rich_help_panel=about.panel,
        )
    if about.repeats:
        default = None
    optional: Any = kind | None if default is None else kind
    return _keyword(name, default, Annotated[optional, says])


def _reading(kind: type) -> Callable[[Any], Any] | None:
    """Return what reads a number as it is typed; None for what is no number."""
    if kind not in (int, float):
        return None

    def read(text: Any) -> Any:
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise typer.BadParameter(f"expected {what}, got '{text}'") from None

    return read


def _completing(about: Option) -> Callable[[str], list[str]] | None:
    """Return what completes the words of an option in a shell."""
    words = about.choices or about.suggestions
    if not words:
        return None
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def _config(known: dict[str, Option]) -> Any:
    """Return the option `--config`, whose file gives what the line leaves out."""

    def read(context: typer.Context, path: str | None) -> str | None:
        if path is not None:
            context.default_map = read_config(path, known)
        return path

    return typer.Option(
        "--config",
        metavar="FILE",
        help="TOML file with options, such as steps = 30; the command line takes precedence.",
        callback=read,
        is_eager=True,
        rich_help_panel=WHERE,
    )


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


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
    match = re.fullmatch(r"\s*(\d{1,9})\s*[x×X]\s*(\d{1,9})\s*", text, re.ASCII)
    if match is None:
        raise SettingError(f"size is WIDTHxHEIGHT in pixels, such as 832x480, got '{text}'")
    return {"width": int(match[1]), "height": int(match[2])}


def check_multiple(height: int | None, width: int | None) -> None:
    """Refuse a size that no pipeline takes; what else a model asks for is known when it is loaded.

    Raises:
        SettingError: names the nearest size.
    """
    from svg_models.errors import SettingError

    if height is None or width is None or not (height % SMALLEST or width % SMALLEST):
        return
    near = [max(1, round(side / SMALLEST)) * SMALLEST for side in (height, width)]
    raise SettingError(
        f"height and width must be multiples of {SMALLEST}, got {height} x {width}; the nearest "
        f"valid size is {near[0]} x {near[1]}"
    )


def check_frames(frames: int, latent: int) -> None:
    """Refuse a number of frames that does not fill the latent frames of a model.

    Args:
        frames: of the clip.
        latent: video frames of a latent one, the first excepted; 1 if nobody says.

    Raises:
        SettingError: names the nearest number.
    """
    from svg_models.errors import SettingError

    if (frames - 1) % latent:
        nearest = max(0, round((frames - 1) / latent)) * latent + 1
        raise SettingError(
            f"frames must be a multiple of {latent} plus 1, got {frames}; the nearest valid number "
            f"is {nearest}"
        )


def latent_frame(folder: Path) -> int:
    """Return how many video frames a model's VAE makes one of; 1 if its folder does not say."""
    import json

    names = ("scale_factor_temporal", "temporal_compression_ratio")
    try:
        config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        found = [config[name] for name in names if isinstance(config.get(name), int)]
    except (OSError, ValueError, AttributeError, RecursionError):
        return 1  # whoever loads the model says what is wrong with it
    return max(1, *found) if found else 1


def check_where(request: Request) -> None:
    """Refuse names of models, files and devices that cannot be right, before torch is imported.

    Raises:
        SettingError: if an option or a file cannot be used.
        ModelUnavailableError: if the model's folder or name cannot be right.
    """
    from svg_models.embedded import embedded_path
    from svg_models.files import regular_file
    from svg_models.loading.device import check_device, check_dtype
    from svg_models.loading.folder import check_components, read_index
    from svg_models.loading.hub import local_folder
    from svg_models.loading.lora import Lora
    from svg_models.loading.placement import check_offload

    check_device(request.device)
    check_dtype(request.dtype)
    check_offload(request.offload, request.device, compiled=request.compiled)
    for lora in request.loras:
        Lora.parse(lora)
    if request.image is not None:
        regular_file(request.image, "as an image")
    if request.last_image is not None:
        regular_file(request.last_image, "as an image")
    if request.video is not None:
        regular_file(request.video, "as a video")
    check_multiple(request.height, request.width)
    folder: Path | None = None
    if request.model in (None, "embedded"):
        folder = embedded_path()
    elif isinstance(request.model, str):
        folder = local_folder(request.model)
        if folder is not None:
            check_components(folder, read_index(folder))
    if folder is not None and request.frames is not None:
        check_frames(request.frames, latent_frame(folder))
