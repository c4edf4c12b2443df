"""Ulysses: ranks hold shares of the sequence, and exchange them for whole sequences of some heads.

Before attention every rank sends each other one the heads that this one computes and gets its own
heads of all other shares; afterwards the way back. A sparse plan sees what it would see on one
GPU, of fewer heads, in the same order of tokens.

Tokens of text are on every rank. It takes its own heads of them, and afterwards all ranks tell each
other what came out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from svg_attention import HeadShare, UnsupportedError
from svg_models.families import Family
from svg_models.parallel.share import Share, part_sizes

__all__ = ["attend_over_ranks", "context_config", "head_share", "refuse_parallel"]


def context_config(holder: Any) -> Any:
    """Return the `ContextParallelConfig` in force of a transformer or an attention processor.

    Args:
        holder: what diffusers' `enable_parallelism` left its configuration with.

    Returns:
        None if its sequence is whole.
    """
    config = getattr(holder, "_parallel_config", None)
    return getattr(config, "context_parallel_config", None)


def head_share(share: Share, heads: int) -> HeadShare:
    """Return which heads of a layer this rank computes, for methods that look at all of them.

    Args:
        share: what this rank holds of the sequence.
        heads: of the layer.
    """
    of_heads = replace(share, tokens=heads)
    return HeadShare(first=of_heads.place.start, heads=heads, gather=lambda x: of_heads.whole(x, 1))


def attend_over_ranks(
    share: Share,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    text_position: Literal["first", "last"] | None = None,
) -> Tensor:
    """Attend to a sequence of which each rank holds a share.

    Args:
        share: what this rank holds.
        query: `[B, S, H, D]`, this rank's video tokens, and all of the text if there is any.
        key: as `query`.
        value: as `query`.
        attend: computes attention of whole sequences, `[B, S, H, D]`, of this rank's heads.
        text_position: where the text stands; None if there is none.

    Returns:
        As `query`, contiguous.
    """
    heads = part_sizes(query.shape[2], share.ranks)
    mine = slice(sum(heads[: share.rank]), sum(heads[: share.rank + 1]))
    text = query.shape[1] - share.sizes[share.rank]
    first = text if text_position == "first" else 0
    video, words = _slices(first, text, query.shape[1])
    all_video, all_words = _slices(first, text, text + share.tokens)

    exchanges = [_Exchange(share.group) for _ in range(3)]
    whole = []
    for exchange, x in zip(exchanges, (query, key, value), strict=True):
        joined = x.new_empty(x.shape[0], mine.stop - mine.start, text + share.tokens, x.shape[3])
        joined[:, :, all_words] = x[:, words, mine].transpose(1, 2)
        by_head = x[:, video].transpose(1, 2)
        exchange.start(
            [by_head[:, start:stop] for start, stop in _bounds(heads)],
            [joined[:, :, all_video][:, :, start:stop] for start, stop in _bounds(share.sizes)],
        )
        whole.append(joined.transpose(1, 2))
    for exchange in exchanges:
        exchange.finish()
    local = attend(*whole) if mine.stop > mine.start else whole[0]

    out = query.new_empty(query.shape).to(local.dtype)
    back = _Exchange(share.group)
    back.start(
        [local[:, all_video][:, start:stop] for start, stop in _bounds(share.sizes)],
        [out[:, video, start:stop] for start, stop in _bounds(heads)],
    )
    if text:
        words_back = _Exchange(share.group)
        words_back.start(
            [local[:, all_words]] * share.ranks,
            [out[:, words, start:stop] for start, stop in _bounds(heads)],
        )
        words_back.finish()
    back.finish()
    return out


class _Exchange:
    """One tensor for each rank sent, one from each received, into memory of any layout.

    Args:
        group: the ranks.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._work: Any = None
        self._unpack: list[tuple[Tensor, Tensor]] = []

    def start(self, sent: list[Tensor], received: list[Tensor]) -> None:
        """Begin to exchange.

        Args:
            sent: what each rank gets.
            received: what it came from each rank is written to, once `finish` is called.
        """
        boxes = [x if x.is_contiguous() else x.new_empty(x.shape) for x in received]
        self._unpack = [(x, box) for x, box in zip(received, boxes, strict=True) if x is not box]
        parcels = [x.contiguous() for x in sent]
        if dist.get_backend(self._group) != "gloo":
            self._work = dist.all_to_all(boxes, parcels, group=self._group, async_op=True)
            return
        # Gloo exchanges parts of one tensor only.
        flat = torch.cat([x.flatten() for x in parcels])
        sizes = [x.numel() for x in boxes]
        incoming = flat.new_empty(sum(sizes))
        dist.all_to_all_single(
            incoming, flat, sizes, [x.numel() for x in parcels], group=self._group
        )
        for box, came in zip(boxes, incoming.split(sizes), strict=True):
            box.copy_(came.view(box.shape))

    def finish(self) -> None:
        """Have what came where it was asked for, as far as the device's stream can tell."""
        if self._work is not None:
            self._work.wait()
        for out, box in self._unpack:
            out.copy_(box)


def _slices(first: int, text: int, length: int) -> tuple[slice, slice]:
    """Return where video and text are in a sequence whose text has `first` tokens in front."""
    if first:
        return slice(text, length), slice(0, text)
    return slice(0, length - text), slice(length - text, length)


def _bounds(sizes: list[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for size in sizes:
        yield start, start + size
        start += size


def refuse_parallel(transformer: nn.Module, family: Family) -> None:
    """Refuse the kinds of context parallelism under which no sparse plan can be made.

    Args:
        transformer: may have a diffusers `ParallelConfig`.
        family: its family.

    Raises:
        UnsupportedError: if it asks for ring attention, or for any kind where text and video share
            the sequence.
    """
    context = context_config(transformer)
    if context is None:
        return
    if (context.ring_degree or 1) > 1:
        raise UnsupportedError(
            {
                "ring": "a sparse plan needs the keys of the whole sequence and ring attention "
                "shows one part at a time; use ContextParallelConfig(ulysses_degree=...)"
            }
        )
    if family.text_position is not None:
        raise UnsupportedError(
            {
                "ulysses": f"{family.title} attends to text and video in one sequence; split by a "
                "plan of diffusers, each part would hold text of its own amid the video, where no "
                "sparse plan looks for it; use svg_models.parallelize(pipe) in its place"
            }
        )
