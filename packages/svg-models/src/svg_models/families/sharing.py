"""Where the video tokens of a transformer are dealt out to ranks, and gathered again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["IN_A_ROW", "STATES", "TABLE", "TABLES", "Axis", "Sharing"]

Axis = Mapping[int, int]
"""The axis of the tokens in a tensor, by how many axes the tensor has."""


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How ranks share the sequence of one kind of transformer.

    Each rank computes the blocks for its share of the video tokens. Text in the same sequence is
    short: every rank computes all of it, so that neither its length nor its padding matters.
    Modules are named by regular expressions that their paths match; the transformer's own is empty.

    Attributes:
        rotation: axis of the tokens in the tables of the rotary embedding, as attentions get them.
        inputs: arguments of modules that are dealt out, by name. Tensors with other axes, or with
            another number of tokens, stay as they are; tuples are looked into.
        outputs: positions of what modules return that is dealt out.
        gathered: the module, of several the last, after which the sequence is whole again: the only
            or first thing that it returns, with the tokens on axis 1.
        whole: modules that have to see the whole sequence: by name the arguments that are gathered
            for them, with the tokens on axis 1. If they are given a share as their first argument,
            they return one.
        counts: arguments that are a number of tokens at the beginning of the sequence.
        tokens: how many tokens are dealt out, from the transformer and the arguments of its forward
            pass by name; None for those of the clip and its conditions.
    """

    rotation: Axis
    inputs: Mapping[str, Mapping[str, Axis]]
    outputs: Mapping[str, Mapping[int, Axis]] = field(default_factory=dict)
    gathered: str = "proj_out"
    whole: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    counts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tokens: Callable[[Any, Mapping[str, Any]], int] | None = None


TABLE: Axis = {2: 0}
TABLES: Mapping[int, Axis] = {0: TABLE, 1: TABLE}
"""Cosines and sines as most models keep them, `[S, D]`."""
STATES: Mapping[str, Axis] = {"hidden_states": {3: 1}}
"""The video tokens that a block is given."""


def tokens_in_a_row(transformer: Any, arguments: Mapping[str, Any]) -> int:
    """Return how many tokens a pipeline hands over, those of conditions with them."""
    count: int = arguments["hidden_states"].shape[1]
    return count


IN_A_ROW = Sharing(
    rotation={3: 1, 4: 2},
    inputs={"": {**STATES, "timestep": {2: 1}}},
    outputs={"rope": {0: {3: 1, 4: 2}, 1: {3: 1, 4: 2}}},
    tokens=tokens_in_a_row,
)
"""Of a model that is given its tokens in a row, and tables for them or for them by head."""
