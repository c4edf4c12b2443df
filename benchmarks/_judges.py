"""The models that quality is judged by, and what each was made to show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from _quality_cases import SIDES
from training.card import CARD, read_card
from training.clips import caption
from training.evaluate import held_out_scenes

from svg_models.embedded.defaults import FRAMES, GUIDANCE

__all__ = ["Judge", "find_judge"]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Say what a model is asked for.

    Attributes:
        name: in results and on pages.
        sizes: name of a clip's size -> height and width.
        measured: those of the sizes that are measured if none is chosen.
        frames: of a clip.
        guidance: scale; 1 is none, and a step is then one pass.
        steps: the only count of denoising steps that it was made for; None for any.
        prompts: in their order.
    """

    name: str
    sizes: dict[str, tuple[int, int]]
    measured: tuple[str, ...]
    frames: int
    guidance: float
    steps: int | None = None
    prompts: tuple[str, ...]


def find_judge(model: Path | None, *, first: int, prompts: int) -> Judge:
    """Return the judge that a folder holds: the embedded model, or one with a card of its own.

    Args:
        model: folder; None for the embedded model.
        first: number of the first prompt. A model with a card has no prompts that a setting was
            chosen on, so all of them count.
        prompts: how many.

    Raises:
        SystemExit: if the card has fewer prompts.
    """
    card = {} if model is None else read_card(model)
    if model is None or not card:
        scenes = held_out_scenes(first + prompts)
        return Judge(
            name="embedded",
            sizes={name: (side, side) for name, side in SIDES.items()},
            measured=("default", "large"),
            frames=FRAMES,
            guidance=GUIDANCE,
            prompts=tuple(caption(scene) for scene in scenes[first:]),
        )
    if len(card["prompts"]) < prompts:
        raise SystemExit(f"{model / CARD} has {len(card['prompts'])} prompts; ask for no more")
    sizes = card.get("sizes") or {card["name"]: (card["height"], card["width"])}
    return Judge(
        name=card["name"],
        sizes={name: (height, width) for name, (height, width) in sizes.items()},
        measured=tuple(sizes),
        frames=card["frames"],
        guidance=card["guidance"],
        steps=card.get("steps"),
        prompts=tuple(card["prompts"][:prompts]),
    )
