"""Read what a folder in diffusers' format holds, without its weights."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch
from torch import nn

from svg_models.errors import ModelUnavailableError
from svg_models.families import SKIPPED, family_of, known_families

__all__ = ["check_family", "check_transformers", "components", "networks"]


def components(folder: Path) -> dict[str, tuple[str, str]]:
    """Return library and class name of each component that the pipeline has.

    Raises:
        ModelUnavailableError: if `model_index.json` cannot be read.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ModelUnavailableError(
            f"cannot read {folder / 'model_index.json'}: {error}"
        ) from error
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)
    }


def check_family(name: str, folder: Path) -> None:
    """Refuse a pipeline whose transformer no family covers, before its weights are fetched.

    Raises:
        ModelUnavailableError: it lists the known families, or says why this one is skipped.
    """
    kind = components(folder).get("transformer", ("", "nothing"))[1]
    if kind in SKIPPED:
        raise ModelUnavailableError(f"{name} has {kind} as its transformer: {SKIPPED[kind]}")
    families = known_families()
    if not any(kind in family.transformers for family in families):
        known = ", ".join(f"{f.name} ({f.title})" for f in families)
        raise ModelUnavailableError(
            f"{name} has {kind} as its transformer, which no model family covers; known are {known}"
        )


def networks(folder: Path) -> dict[str, nn.Module]:
    """Build each component that is a network from its configuration, without its weights.

    Args:
        folder: a pipeline in diffusers' format.

    Returns:
        Component name -> network on the meta device, where parameters have a shape and no memory.

    Raises:
        ModelUnavailableError: if `model_index.json` cannot be read or names unknown classes.
    """
    built = {}
    for name, (library, class_name) in components(folder).items():
        if not (folder / name / "config.json").is_file():
            continue
        try:
            kind = getattr(importlib.import_module(library), class_name)
        except (ImportError, AttributeError) as error:
            raise ModelUnavailableError(
                f"component '{name}' of {folder} needs {library}.{class_name}, which is not "
                f"installed here; a newer {library} may have it"
            ) from error
        with torch.device("meta"):
            if library == "diffusers":
                built[name] = kind.from_config(kind.load_config(folder / name))
            else:
                built[name] = kind(kind.config_class.from_pretrained(folder / name))
    return built


def check_transformers(name: str, built: dict[str, nn.Module]) -> None:
    """Refuse a checkpoint that its family cannot make sparse, as its configuration tells.

    Args:
        name: of the model.
        built: what `networks` returns.

    Raises:
        ModelUnavailableError: says why.
    """
    for part, network in built.items():
        if part.startswith("transformer"):
            try:
                family_of(network)
            except ValueError as error:
                raise ModelUnavailableError(f"{name}: {error}") from error
