"""The model families that `sparsify` knows."""

from __future__ import annotations

from torch import nn

from svg_models.families.allegro import ALLEGRO
from svg_models.families.anyflow import ANYFLOW
from svg_models.families.base import Family, unwrap
from svg_models.families.chronoedit import CHRONOEDIT
from svg_models.families.cogvideox import COGVIDEOX
from svg_models.families.consisid import CONSISID
from svg_models.families.cosmos import COSMOS
from svg_models.families.easyanimate import EASYANIMATE
from svg_models.families.framepack import FRAMEPACK
from svg_models.families.hunyuan_video import HUNYUAN_VIDEO
from svg_models.families.hunyuan_video15 import HUNYUAN_VIDEO_15
from svg_models.families.ltx import LTX
from svg_models.families.ltx2 import LTX2
from svg_models.families.mochi import MOCHI
from svg_models.families.skipped import SKIPPED
from svg_models.families.wan import SKYREELS, WAN
from svg_models.families.wan_animate import WAN_ANIMATE

__all__ = [
    "SKIPPED",
    "TRANSFORMERS",
    "Family",
    "family_of",
    "known_families",
    "register",
    "transformers_of",
]

TRANSFORMERS = ("transformer", "transformer_2")
"""What diffusers' pipelines call their denoising transformers."""

_families: list[Family] = [
    WAN,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    COSMOS,
    COGVIDEOX,
    LTX,
    LTX2,
    SKYREELS,
    MOCHI,
    WAN_ANIMATE,
    CHRONOEDIT,
    ALLEGRO,
    CONSISID,
    EASYANIMATE,
    FRAMEPACK,
    ANYFLOW,
]


def known_families() -> tuple[Family, ...]:
    """Return all families, the packaged ones first."""
    return tuple(_families)


def register(family: Family) -> None:
    """Make a family known to this process.

    Args:
        family: its `name` and its transformer classes must be new.

    Raises:
        ValueError: if another family has the name or one of the transformer classes.
    """
    for known in _families:
        shared = set(known.transformers) & set(family.transformers)
        if known.name == family.name or shared:
            raise ValueError(
                f"family {family.name!r} ({', '.join(family.transformers)}) is already known as "
                f"{known.name!r} ({', '.join(known.transformers)})"
            )
    _families.append(family)


def transformers_of(pipe: object) -> dict[str, nn.Module]:
    """Return the denoising transformers of a pipeline by component name.

    Args:
        pipe: a diffusers pipeline, or one transformer.

    Returns:
        `{"transformer": ...}` and, where the pipeline has two, `"transformer_2"`; wrappers, such
        as those of `torch.compile` and DDP, are taken off.

    Raises:
        TypeError: if there is none.
    """
    if isinstance(pipe, nn.Module):
        return {"transformer": unwrap(pipe)}
    found = {name: getattr(pipe, name, None) for name in TRANSFORMERS}
    modules = {name: unwrap(m) for name, m in found.items() if isinstance(m, nn.Module)}
    if not modules:
        raise TypeError(
            f"expected a diffusers video pipeline or its transformer, got {type(pipe).__name__}, "
            "which has no attribute 'transformer'"
            + ("; pass its .pipe" if hasattr(pipe, "pipe") else "")
        )
    return modules


def family_of(transformer: nn.Module) -> Family:
    """Return the family of a transformer.

    Args:
        transformer: a diffusers transformer.

    Returns:
        The family that covers its class.

    Raises:
        ValueError: if no family does, or it is one that cannot be made sparse; the message says
            why, or lists the known families and how to add one.
    """
    for family in _families:
        if family.covers(transformer):
            objection = family.objection(transformer)
            if objection:
                raise ValueError(f"{type(transformer).__name__} stays dense: {objection}")
            return family
    names = [cls.__name__ for cls in type(transformer).__mro__]
    for name in names:
        if name in SKIPPED:
            raise ValueError(f"{name} stays dense: {SKIPPED[name]}")
    known = "; ".join(f"{f.name}: {', '.join(f.transformers)} ({f.title})" for f in _families)
    raise ValueError(
        f"no model family covers {names[0]}; known families are {known}. "
        "Describe yours in a Family and pass it to svg_models.families.register: "
        "see 'Adding a model' in the documentation"
    )
