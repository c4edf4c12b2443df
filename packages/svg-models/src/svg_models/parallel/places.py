"""Where the ranks that exchange heads have the tokens and the heads of a call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from svg_models.copies import picked
from svg_models.parallel.share import Share, part_sizes

__all__ = ["Places"]


@dataclass(frozen=True, kw_only=True)
class Places:
    """Which tokens and which heads each rank has of one call of attention.

    Before attention a rank has its part of the video, all of the text and all heads, `[B, text +
    its tokens, H, D]`; in attention the whole sequence of its heads, `[B, text + tokens, its heads,
    D]`.

    Attributes:
        share: what this rank holds.
        heads: of the layer.
        text: how many tokens of text there are.
        text_first: whether they stand before the video.
        order: int64 `[H]`, in which ranks have the heads; None for that of their numbers.
    """

    share: Share
    heads: int
    text: int
    text_first: bool
    order: Tensor | None = None

    @classmethod
    def of(
        cls,
        share: Share,
        query: Tensor,
        text_position: Literal["first", "last"] | None,
        order: Tensor | None,
    ) -> Places:
        """Return the places of a call.

        Args:
            share: what this rank holds.
            query: `[B, S, H, D]`.
            text_position: where the text stands; None if there is none.
            order: see the class.
        """
        return cls(
            share=share,
            heads=query.shape[2],
            text=query.shape[1] - share.sizes[share.rank],
            text_first=text_position == "first",
            order=order,
        )

    @cached_property
    def head_slices(self) -> list[slice]:
        """Return where each rank's heads are among those in order."""
        return _slices(part_sizes(self.heads, self.share.ranks))

    @property
    def mine(self) -> slice:
        """Return where this rank's heads are among those in order."""
        return self.head_slices[self.share.rank]

    @cached_property
    def token_slices(self) -> list[slice]:
        """Return where each rank's tokens are in the whole sequence, text counted."""
        before = self.text if self.text_first else 0
        return _slices(self.share.sizes, before)

    @property
    def words(self) -> slice:
        """Return where the text is in the whole sequence."""
        start = 0 if self.text_first else self.share.tokens
        return slice(start, start + self.text)

    @property
    def length(self) -> int:
        """Return the tokens of the whole sequence, text counted."""
        return self.text + self.share.tokens

    def of_rank(self, rank: int) -> tuple[slice, slice]:
        """Return where a rank has its part of the video, and the text, in what it holds."""
        tokens, text = self.share.sizes[rank], self.text
        if self.text_first:
            return slice(text, text + tokens), slice(0, text)
        return slice(0, tokens), slice(tokens, tokens + text)

    def picked(self, x: Tensor, axis: int, rank: int) -> Tensor:
        """Return the heads of a rank: a view, or a copy where they are out of order.

        Args:
            x: what has all heads.
            axis: of the heads, before the last.
            rank: whose.
        """
        heads = self.head_slices[rank]
        if self.order is None:
            return x.narrow(axis, heads.start, heads.stop - heads.start)
        return picked(x, axis, self.order[heads])

    def chosen(self, x: Tensor, rank: int) -> tuple[Tensor, Tensor | None]:
        """Return what has a rank's heads, `[B, S, H, D]`, and which of its heads these are.

        Args:
            x: what has all heads.
            rank: whose.

        Returns:
            The heads alone and None, or all and their numbers where they are out of order.
        """
        heads = self.head_slices[rank]
        return (x[:, :, heads], None) if self.order is None else (x, self.order[heads])

    def numbered(self, x: Tensor) -> Tensor:
        """Return `[B, S, H, D]` with its heads in the order of their numbers again."""
        return x if self.order is None else picked(x, 2, self.order.argsort())


def _slices(sizes: list[int], start: int = 0) -> list[slice]:
    found = []
    for size in sizes:
        found.append(slice(start, start + size))
        start += size
    return found
