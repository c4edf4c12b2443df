"""What this package knows of models, as plain values: families, pipelines, recipes."""

from __future__ import annotations

from typing import Any

from svg_models.errors import SettingError
from svg_models.families import SKIPPED, Family, known_families
from svg_models.families.published import Published
from svg_models.loading.defaults import of_call
from svg_models.loading.inputs import Inputs
from svg_models.model_names import PIPELINES, unknown

__all__ = ["catalog", "describe", "find_family"]


def catalog() -> list[dict[str, Any]]:
    """Return the description of every family."""
    return [describe(family) for family in known_families()]


def find_family(name: str) -> Family:
    """Return the family of this name, or of a checkpoint or transformer of this name.

    Raises:
        SettingError: it lists the names, or says why that transformer stays dense.
    """
    for family in known_families():
        if name in (family.name, *family.checkpoints, *family.transformers):
            return family
    if name in SKIPPED:
        raise SettingError(f"{name} stays dense: {SKIPPED[name]}")
    raise unknown(name, [family.name for family in known_families()])


def describe(family: Family) -> dict[str, Any]:
    """Return what a family covers, takes and was published with, as plain values."""
    return {
        "name": family.name,
        "title": family.title,
        "transformers": list(family.transformers),
        "pipelines": [_pipeline(name) for name in PIPELINES.get(family.name, ())],
        "checkpoints": list(family.checkpoints),
        "recipes": [_recipe(row) for row in family.recipes],
    }


def _pipeline(name: str) -> dict[str, Any]:
    import diffusers

    kind = getattr(diffusers, name)
    inputs = Inputs.of(kind)
    return {
        "name": name,
        "image": bool(inputs.image),
        "video": inputs.video or None,
        "needs": inputs.needs or None,
        "defaults": of_call(kind),
    }


def _recipe(row: Published) -> dict[str, Any]:
    return {
        "published_for": row.title,
        "task": row.task,
        "tokens": row.tokens,
        "q_clusters": row.q_clusters,
        "k_clusters": row.k_clusters,
        "top_p": row.top_p,
        "svg1_density": row.svg1_density,
        "schedule": row.schedule.to_dict(),
        "source": row.source,
    }
