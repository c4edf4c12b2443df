"""A rank's share of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from svg_attention import Ring

__all__ = ["Share", "part_sizes"]


def part_sizes(count: int, parts: int) -> list[int]:
    """Return the sizes of nearly equal parts, the larger ones first, as `torch.tensor_split` does.

    Args:
        count: of what is split.
        parts: how many.
    """
    size, more = divmod(count, parts)
    return [size + (part < more) for part in range(parts)]


@dataclass(frozen=True)
class Share:
    """What a rank holds of a sequence that the ranks of a group share in equal parts, in order.

    Attributes:
        group: the ranks.
        ranks: how many they are.
        rank: which of them this one is.
        tokens: of the whole sequence.
        ring: of ranks that keep their queries and pass on keys and values; None where all exchange
            heads.
        heads: the ranks that exchange heads, each so many in a row, where there is a ring.
        balanced: whether heads of a sparse run are dealt to ranks by what they cost.
        direct: exchanges heads, where it can, by writing into the memory of other ranks; None for
            messages.
    """

    group: Any
    ranks: int
    rank: int
    tokens: int
    ring: Ring | None = None
    heads: Any = None
    balanced: bool = False
    direct: Any = None

    @classmethod
    def of(cls, group: Any, tokens: int, ring: Ring | None = None, heads: Any = None) -> Share:
        """Return this process's share of a sequence of so many tokens.

        Args:
            group: the ranks; None for all.
            tokens: of the whole sequence.
            ring: see the class.
            heads: see the class.
        """
        return cls(group, dist.get_world_size(group), dist.get_rank(group), tokens, ring, heads)

    @classmethod
    def alone(cls) -> Share:
        """Return the share of a rank that has the whole sequence."""
        return cls(None, 1, 0, 0)

    @property
    def of_heads(self) -> Share:
        """Return this rank's share of what those it exchanges heads with have of the sequence."""
        if self.ring is None:
            return self
        ranks = self.ring.parts
        first = self.rank - self.rank % ranks
        tokens = sum(self.sizes[first : first + ranks])
        return Share(self.heads, ranks, self.rank % ranks, tokens, direct=self.direct)

    @property
    def sizes(self) -> list[int]:
        """Return how many tokens each rank has."""
        return part_sizes(self.tokens, self.ranks)

    @property
    def place(self) -> slice:
        """Return where in the sequence this rank's tokens are."""
        sizes = self.sizes
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def part(self, x: Tensor, axis: int) -> Tensor:
        """Return this rank's part of the whole sequence, a view."""
        place = self.place
        return x.narrow(axis, place.start, place.stop - place.start)

    def whole(self, x: Tensor, axis: int) -> Tensor:
        """Gather the parts of all ranks.

        Parts that differ in length are padded for the way: a collective for unequal ones would
        have to ask for their lengths, which are known.

        Args:
            x: this rank's part.
            axis: of the tokens.
        """
        if self.ranks == 1:
            return x
        sizes = self.sizes
        most = sizes[0]
        sent = x.movedim(axis, 0)
        if len(sent) < most:
            sent = torch.cat((sent, sent.new_zeros(most - len(sent), *sent.shape[1:])))
        parts = sent.new_empty(self.ranks * most, *sent.shape[1:])
        dist.all_gather(list(parts.split(most)), sent.contiguous(), group=self.group)
        if sizes[-1] < most:
            pieces = zip(parts.split(most), sizes, strict=True)
            parts = torch.cat([part[:size] for part, size in pieces])
        return parts.movedim(0, axis)
