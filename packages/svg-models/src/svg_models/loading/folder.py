"""Check a folder in diffusers' format before a library reads it: nothing is built, nothing runs.

A folder may come from anywhere. What is checked here needs no torch, and little memory whatever the
files say of themselves.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from svg_models.errors import ModelUnavailableError

__all__ = [
    "ModelIndex",
    "check_components",
    "check_safetensors",
    "check_weights",
    "read_index",
    "read_json",
]

_MOST_CONFIG = 1 << 20  # bytes; the largest of the hub have some ten thousand
_MOST_JSON = 1 << 28  # bytes of a tokenizer, the largest of which have 35 MB
_MOST_HEADER = 100_000_000  # bytes, what safetensors itself takes
_DEEPEST = 24  # lists in lists
_LARGEST = 1 << 31

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_CLASS = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,127}")
_LIBRARY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack"}
_OWN_ATTENTION = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}

# What a configuration may say where more, or nothing, would keep the machine busy for hours or
# divide by zero: the least and the most.
_BOUNDS: tuple[tuple[re.Pattern[str], int, int], ...] = tuple(
    (re.compile(pattern), least, most)
    for pattern, least, most in (
        (r"num_layers|num_hidden_layers", 1, 1024),
        (r"num_(\w+_)?layers|num_(\w+_)?blocks|n_layers?|depth|layers_per_block", 0, 1024),
        (r"num_(\w+_)?heads|attention_head_dim|d_model|d_kv|hidden_size", 1, 1 << 20),
        (r"(in|out|latent)_channels|z_dim|base_dim|patch_size(_t)?", 1, 1 << 20),
        (r"block_out_channels|dim_mult", 1, 1 << 20),
        (r"vocab_size", 1, 1 << 26),
        (r"num_train_timesteps", 1, 1 << 20),
    )
)
_BITS = {
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **dict.fromkeys(("F4", "F6_E2M3", "F6_E3M2"), 0),  # of no fixed width; none is loaded here
}


@dataclass(frozen=True, kw_only=True)
class ModelIndex:
    """What `model_index.json` says.

    Attributes:
        pipeline: name of a class of diffusers.
        components: name -> library and class, for each that the pipeline has.
        options: everything else.
    """

    pipeline: str
    components: Mapping[str, tuple[str, str]]
    options: Mapping[str, Any] = field(default_factory=dict)


def read_json(path: Path, *, most: int = _MOST_CONFIG) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ModelUnavailableError: if it is no such file, is larger than `most` bytes, or nests deeper
            than any configuration.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise _broken(path, "expected a file")
        if found.st_size > most:
            raise _broken(path, f"{found.st_size:,} bytes, and at most {most:,} are read")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except RecursionError as error:
        raise _broken(path, "nested too deep") from error
    except (OSError, ValueError) as error:
        if isinstance(error, ModelUnavailableError):
            raise
        raise _broken(path, str(getattr(error, "strerror", None) or error).lower()) from error
    if not isinstance(value, dict):
        raise _broken(path, f"expected an object, got a {type(value).__name__}")
    return value


def read_index(folder: Path) -> ModelIndex:
    """Read the list of a pipeline's components.

    Raises:
        ModelUnavailableError: if it cannot be read or is no such list.
    """
    path = folder / "model_index.json"
    if not path.exists() and not path.is_symlink():
        raise ModelUnavailableError(
            f"{folder} is not a diffusers pipeline: it has no model_index.json"
        )
    index = read_json(path)
    pipeline = index.pop("_class_name", None)
    if not isinstance(pipeline, str) or not _CLASS.fullmatch(pipeline):
        raise _broken(
            path, f"_class_name must name a pipeline of diffusers, got {_shown(pipeline)}"
        )
    components: dict[str, tuple[str, str]] = {}
    options: dict[str, Any] = {}
    for name, value in index.items():
        if not isinstance(value, list):
            options[name] = value
        elif not _NAME.fullmatch(name):
            raise _broken(path, f"{_shown(name)} is no name of a component")
        elif value != [None, None]:
            if len(value) != 2 or not all(isinstance(word, str) for word in value):
                raise _broken(
                    path, f"component '{name}' must be a library and a class, got {_shown(value)}"
                )
            library, kind = value
            if not _LIBRARY.fullmatch(library) or not _CLASS.fullmatch(kind):
                raise _broken(
                    path,
                    f"component '{name}' is of {_shown(library)} and {_shown(kind)}, which "
                    "diffusers would not load",
                )
            components[name] = library, kind
    return ModelIndex(pipeline=pipeline, components=components, options=options)


def check_components(folder: Path, index: ModelIndex) -> None:
    """Refuse configurations that no model has, before anything is built from them.

    Args:
        folder: has the configurations; weights and tokenizers may be missing yet.
        index: of the folder.

    Raises:
        ModelUnavailableError: names the file, and what is wrong with it.
    """
    for name, (library, _) in index.components.items():
        place = folder / name
        if (place / f"{library}.py").exists():
            raise ModelUnavailableError(
                f"{place} holds code of its own ({library}.py), which is never run; choose a model "
                "that diffusers has the classes of"
            )
        if (place / "adapter_config.json").exists():
            raise ModelUnavailableError(
                f"{place} is an adapter that names another model; give adapters by --lora"
            )
        for file in ("config.json", "scheduler_config.json"):
            if (place / file).exists() or (place / file).is_symlink():
                config = read_json(place / file)
                _check_config(place / file, config)
                _check_latents(place / file, config)


def check_weights(folder: Path, index: ModelIndex) -> None:
    """Refuse a folder that lacks files, or whose weights are not what their headers say.

    Args:
        folder: complete.
        index: of the folder.

    Raises:
        ModelUnavailableError: names the file, and what is wrong with it.
    """
    for name in index.components:
        place = folder / name
        if not place.is_dir():
            raise ModelUnavailableError(f"{folder} has no folder '{name}', which its index names")
        for file in sorted(place.glob("*.json")):
            most = _MOST_JSON if file.name not in ("config.json",) else _MOST_CONFIG
            if file.name != "vocab.json" or file.stat().st_size <= most:
                read_json(file, most=most)
        if (place / "config.json").is_file():
            for weights in _weight_files(place):
                check_safetensors(weights)


def _weight_files(place: Path) -> Iterator[Path]:
    names = sorted(file.name for file in place.iterdir())
    parts: set[str] = set()
    for name in names:
        if name.endswith(".safetensors.index.json"):
            listed = read_json(place / name, most=_MOST_JSON).get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise _broken(place / name, "weight_map must say which file holds which weight")
            for file in listed.values():
                if not isinstance(file, str) or "/" in file or "\\" in file or "\0" in file:
                    raise _broken(place / name, f"{_shown(file)} is no file of this folder")
                parts.add(file)
    parts |= {name for name in names if name.endswith(".safetensors")}
    if not parts:
        pickled = [name for name in names if Path(name).suffix in _PICKLES]
        if pickled:
            raise ModelUnavailableError(
                f"{place} has its weights in {pickled[0]}, a format that can run code, so it is "
                "not read; take a model with safetensors, or convert it"
            )
        raise ModelUnavailableError(f"{place} has no weights (*.safetensors); copy them there")
    yield from (place / name for name in sorted(parts))


def check_safetensors(path: Path) -> None:
    """Refuse a file whose header does not describe what follows it.

    Raises:
        ModelUnavailableError: names the file, and what is wrong with it.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise _broken(path, "expected a file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if found.st_size < 10 or length > min(_MOST_HEADER, found.st_size - 8):
                raise _broken(path, "the file is cut off or is no safetensors")
            header = json.loads(file.read(length))
    except RecursionError as error:
        raise _broken(path, "its header is nested too deep") from error
    except (OSError, ValueError) as error:
        if isinstance(error, ModelUnavailableError):
            raise
        reason = getattr(error, "strerror", None) or "its header is no JSON"
        raise _broken(path, str(reason).lower()) from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is no object")
    header.pop("__metadata__", None)
    total = sum(_tensor_bytes(path, name, entry) for name, entry in header.items())
    there = found.st_size - 8 - length
    if total != there:
        raise _broken(
            path,
            f"its header speaks of {total:,} bytes, and the file has {there:,}",
        )


def _tensor_bytes(path: Path, name: str, entry: Any) -> int:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, ends = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS or not (_sizes(shape) and _sizes(ends)):
        raise _broken(path, f"its header describes no tensor at {_shown(name)}")
    if len(ends) != 2 or ends[1] < ends[0]:
        raise _broken(path, f"its header gives {_shown(name)} no place in the file")
    size: int = ends[1] - ends[0]
    if _BITS[dtype] and math.prod(shape) * _BITS[dtype] != 8 * size:
        raise _broken(path, f"its header gives {_shown(name)} a size that its shape has not")
    return size


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in value
    )


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    infinite = path.name == "scheduler_config.json"  # lambda_min_clipped is, in published ones
    for key, value, depth in _walk(config):
        if depth > _DEEPEST:
            raise _broken(path, "nested too deep")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and (value != value or (abs(value) == math.inf and not infinite)):
            raise _broken(path, f"{key} is {value}")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise _broken(
                path, f"{key} is {_shown(value)}, and no model has more than {_LARGEST:,}"
            )
        chosen = key.endswith("attn_implementation") and isinstance(value, str)
        if chosen and value not in _OWN_ATTENTION:
            raise _broken(path, f"{key} names code from elsewhere, {_shown(value)}")
        for pattern, least, most in _BOUNDS:
            if number and pattern.fullmatch(key) and not least <= value <= most:
                raise _broken(path, f"{key} must be {least} to {most:,}, got {_shown(value)}")
            if isinstance(value, str) and pattern.fullmatch(key):
                raise _broken(path, f"{key} must be a number, got {_shown(value)}")


def _check_latents(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a VAE that would fail on the clip that it shall decode, when all is computed."""
    channels = config.get("z_dim") or config.get("latent_channels") or 1
    for key in ("latents_mean", "latents_std"):
        value = config.get(key)
        numbers = isinstance(value, list) and all(
            isinstance(x, int | float) and not isinstance(x, bool) for x in value
        )
        if value is not None and not (numbers and value and len(value) % channels == 0):
            raise _broken(path, f"{key} must be a list of {channels} numbers, got {_shown(value)}")


def _walk(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any, int]]:
    """Yield every value with its key, those in lists under the key of the list."""
    yield key, value, depth
    if depth > _DEEPEST:
        return
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _walk(inner, name, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner, key, depth + 1)


def _constant(name: str) -> float:
    return {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}[name]


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:76]} …"


def _broken(path: Path, why: str) -> ModelUnavailableError:
    return ModelUnavailableError(f"cannot use {path}: {why}")
