"""Read what a folder in diffusers' format holds, without its weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from svg_models.errors import ModelUnavailableError, foreign_faults
from svg_models.families import SKIPPED, family_of, known_families
from svg_models.loading.folder import ModelIndex

__all__ = ["check_family", "check_transformers", "class_of", "networks", "sizes_of"]


def check_family(name: str, index: ModelIndex) -> None:
    """Refuse a pipeline whose transformer no family covers, before its weights are fetched.

    Raises:
        ModelUnavailableError: it lists the known families, or says why this one is skipped.
    """
    kind = index.components.get("transformer", ("", "nothing"))[1]
    if kind in SKIPPED:
        raise ModelUnavailableError(f"{name} has {kind} as its transformer: {SKIPPED[kind]}")
    families = known_families()
    if not any(kind in family.transformers for family in families):
        known = ", ".join(f"{f.name} ({f.title})" for f in families)
        raise ModelUnavailableError(
            f"{name} has {kind} as its transformer, which no model family covers; known are {known}"
        )


def class_of(index: ModelIndex, name: str) -> type[Any]:
    """Return the class of a component: one that diffusers itself would load, from nowhere else.

    Raises:
        ModelUnavailableError: if the library is neither diffusers, one of its pipelines, nor
            transformers, or has no such class.
    """
    library, class_name = index.components[name]
    module = _library(library)
    if module is None:
        raise ModelUnavailableError(
            f"component '{name}' is of a library '{library}', and only classes of diffusers and "
            "transformers are loaded"
        )
    kind = getattr(module, class_name, None)
    if kind is None:
        raise ModelUnavailableError(
            f"component '{name}' needs {library}.{class_name}, which is not installed here; a "
            f"newer {library} may have it"
        )
    if not isinstance(kind, type) or not _loadable(kind, module):
        raise ModelUnavailableError(
            f"component '{name}' is {library}.{class_name}, which is no part of a pipeline"
        )
    return kind


def _library(name: str) -> ModuleType | None:
    if name in ("diffusers", "transformers"):
        return importlib.import_module(name)
    import diffusers.pipelines

    # As diffusers does: a pipeline may have classes of its own, beside it.
    module = getattr(diffusers.pipelines, name, None)
    home = getattr(module, "__name__", "")
    return (
        module if isinstance(module, ModuleType) and home == f"diffusers.pipelines.{name}" else None
    )


def _loadable(kind: type[Any], module: ModuleType) -> bool:
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    if module.__name__ not in LOADABLE_CLASSES:
        return kind.__module__.startswith(module.__name__)
    bases = (getattr(module, name, None) for name in LOADABLE_CLASSES[module.__name__])
    return issubclass(kind, tuple(base for base in bases if isinstance(base, type)))


def networks(folder: Path, index: ModelIndex) -> dict[str, nn.Module]:
    """Build each component that is a network from its configuration, without its weights.

    Args:
        folder: a pipeline in diffusers' format, `check_components` passed.
        index: of the folder.

    Returns:
        Component name -> network on the meta device, where parameters have a shape and no memory.

    Raises:
        ModelUnavailableError: if a class is unknown or its configuration makes no network.
    """
    built = {}
    for name, (library, _) in index.components.items():
        kind: Any = class_of(index, name)
        place = folder / name
        if not (place / "config.json").is_file() or not issubclass(kind, nn.Module):
            continue
        sentence = f"{place / 'config.json'} makes no {kind.__name__}"
        with foreign_faults(sentence, ModelUnavailableError), torch.device("meta"):
            if library == "transformers":
                built[name] = kind(kind.config_class.from_pretrained(place))
            else:
                built[name] = kind.from_config(kind.load_config(place))
    return built


def sizes_of(built: dict[str, nn.Module]) -> dict[str, int]:
    """Return how many numbers each network holds: parameters, and tables such as of positions."""
    return {
        name: sum(t.numel() for t in (*network.parameters(), *network.buffers()))
        for name, network in built.items()
    }


def check_transformers(name: str, built: dict[str, nn.Module]) -> None:
    """Refuse a checkpoint that its family cannot make sparse, as its configuration tells.

    Args:
        name: of the model.
        built: what `networks` returns.

    Raises:
        ModelUnavailableError: says why.
    """
    if not any(part.startswith("transformer") for part in built):
        raise ModelUnavailableError(f"{name} has no configuration of a transformer")
    for part, network in built.items():
        if part.startswith("transformer"):
            try:
                family_of(network)
            except ValueError as error:
                raise ModelUnavailableError(f"{name}: {error}") from error
