"""The options of a command in a TOML file: read, and written so that a run can be repeated."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from svg_models.errors import SettingError
from svg_models.files import atomic_path, regular_file
from svg_models.generation.settings import Option, options_of
from svg_models.spelling import DIFFUSERS_NAMES, check_names, respell

if TYPE_CHECKING:
    from svg_models.generation.request import Request
    from svg_models.generation.settings import Settings

__all__ = ["checked_options", "option_names", "read_config", "used", "write_config"]

_MOST_BYTES = 1 << 20


def option_names(kind: type[Request]) -> dict[str, Option]:
    """Return the fields of a request that a command has options for, the prompt included."""
    return {name: o for name, o in options_of(kind).items() if o.names or name == "prompt"}


def checked_options(
    where: str, given: Mapping[str, Any], known: Mapping[str, Option]
) -> dict[str, Any]:
    """Return options from a file under the names of their fields, of the types that they have.

    Args:
        where: the file, for sentences.
        given: name -> value; names of fields, of options, or of diffusers.
        known: what a command has, from `option_names`; `size`, `WIDTHxHEIGHT`, is known, too.

    Raises:
        SettingError: if a name is unknown (with the nearest), or a value is of a wrong type.
    """
    spellings = {
        option.lstrip("-").replace("-", "_"): name
        for name, about in known.items()
        for option in about.names
    }
    spellings = DIFFUSERS_NAMES | {
        spelt: name for spelt, name in spellings.items() if spelt != name
    }
    settings = respell({name.replace("-", "_"): value for name, value in given.items()}, spellings)
    check_names(where, settings, [*known, "size"])
    return {
        name: _checked(name, value, known.get(name, Option(help="")))
        for name, value in settings.items()
    }


def _checked(name: str, value: Any, about: Option) -> Any:
    if about.repeats:
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise SettingError(f"{name} must be a list of texts, got {value!r}")
    elif about.kind in (bool, str) and not isinstance(value, about.kind):
        what = "true or false" if about.kind is bool else "a text"
        raise SettingError(f"{name} must be {what}, got {value!r}")
    return about.checked(name, value)


def read_config(path: str, known: Mapping[str, Option]) -> dict[str, Any]:
    """Read the options of a command from a TOML file.

    Raises:
        SettingError: if it is no such file, or `checked_options` refuses what it says.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    file = regular_file(path, "as a configuration")
    if file.stat().st_size > _MOST_BYTES:
        raise SettingError(f"cannot read {path} as a configuration (more than a megabyte)")
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingError(f"cannot read {path} as a configuration ({error})") from error
    return checked_options(os.path.basename(path), document, known)


def used(request: Request, settings: Settings) -> dict[str, Any]:
    """Return the options that repeat a run, whatever the model's defaults will be.

    Args:
        request: what was asked for.
        settings: complete.
    """
    values: dict[str, Any] = {}
    for name, about in option_names(type(request)).items():
        value = getattr(settings if hasattr(settings, name) else request, name)
        if isinstance(value, tuple):
            value = [str(part) for part in value]
        elif about.kind is str and value is not None:
            value = str(value)
        if value not in (None, False, []):
            values[name] = value
    return values | {"size": f"{settings.width}x{settings.height}"}


def write_config(values: Mapping[str, Any], path: str) -> None:
    """Write options as TOML.

    Raises:
        SettingError, OutputError: if the file cannot be written.
    """
    lines = [f"{name} = {_literal(value)}" for name, value in values.items()]
    try:
        content = ("\n".join(lines) + "\n").encode()
    except UnicodeEncodeError as error:
        wrong = ascii(error.object[error.start : error.end])
        raise SettingError(
            f"cannot write {path}: TOML is UTF-8, and the name of a file that was used holds "
            f"{wrong}; rename that file"
        ) from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _literal(value: Any) -> str:
    # JSON's literals are TOML's, but for one control character that JSON lets stand.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
