"""The transformers that ranks share, and the calls that they get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tiny
import torch
import zoo
from composition.player import Player, record
from torch import Tensor

STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A transformer, and what is unusual about it.

    Attributes:
        case: of the zoo.
        heads: of each attention.
        change: makes another call of a recorded one.
    """

    case: str
    heads: int = 4
    change: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def player(self) -> Player:
        """Record the calls, and return a model with that many heads to play them to."""
        recorded = record(zoo.case(self.case), STEPS)
        model = recorded.transformer
        config = dict(model.config)
        was, size = config["num_attention_heads"], config["attention_head_dim"]
        config["num_attention_heads"] = self.heads
        for name in ("cross_attention_dim", "added_kv_proj_dim"):
            if config.get(name) == was * size:
                config[name] = self.heads * size
        torch.manual_seed(3)
        recorded.transformer = type(model).from_config(config).eval()
        tiny.sharpen(recorded.transformer, 4.0)
        if self.change is not None:
            recorded.calls = [self.change(call) for call in recorded.calls]
        return recorded


def cropped(call: dict[str, Any]) -> dict[str, Any]:
    """Leave 3 x 7 x 7 tokens: a number that neither 2 nor 4 divides."""
    return call | {"hidden_states": call["hidden_states"][..., :7, :7]}


def two_texts(call: dict[str, Any]) -> dict[str, Any]:
    """Make a batch of two, whose texts differ in length."""
    batch = {
        name: torch.cat((x, x.flip(-1) if x.is_floating_point() else x))
        if isinstance(x, Tensor)
        else x
        for name, x in call.items()
    }
    mask = call["encoder_attention_mask"].clone()
    mask[:, 5:] = 0
    return batch | {"encoder_attention_mask": torch.cat((call["encoder_attention_mask"], mask))}


SUBJECTS: dict[str, Subject] = {
    case: Subject(case=case)
    for case in (
        *("wan t2v", "wan 2.2 ti2v, image", "wan vace", "wan animate"),
        *("hunyuan_video t2v", "hunyuan_video i2v token_replace", "hunyuan_video15 i2v"),
        *("framepack i2v", "cosmos 1.0 t2w", "cosmos predict2 v2w", "cogvideox 1.5 i2v"),
        *("ltx t2v", "ltx later images", "ltx2 t2v", "ltx2 later image", "skyreels v2 t2v"),
        *("mochi t2v", "chronoedit i2v", "allegro t2v", "easyanimate t2v"),
    )
} | {
    "consisid i2v": Subject(case="consisid i2v", heads=2),
    "wan t2v, 147 tokens": Subject(case="wan t2v", change=cropped),
    "wan t2v, 5 heads": Subject(case="wan t2v", heads=5),
    "hunyuan_video t2v, 147 tokens": Subject(case="hunyuan_video t2v", change=cropped),
    "hunyuan_video t2v, 5 heads, two texts": Subject(
        case="hunyuan_video t2v", heads=5, change=two_texts
    ),
}
