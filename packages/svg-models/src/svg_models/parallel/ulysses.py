"""Ulysses: ranks hold shares of the sequence, and exchange them for whole sequences of some heads.

Before attention every rank sends each other one the heads that this one computes and gets its own
heads of all other shares; afterwards the way back. A sparse plan sees what it would see on one
GPU, of fewer heads, in the same order of tokens. It begins with the queries, while keys and values
are on their way.

Tokens of text are on every rank. It takes its own heads of them, and afterwards all ranks tell each
other what came out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from svg_attention import Arrivals, HeadShare, UnsupportedError
from svg_models.families import Family
from svg_models.parallel.share import Share, part_sizes

__all__ = ["attend_over_ranks", "context_config", "exchange", "head_share", "refuse_parallel"]


def context_config(holder: Any) -> Any:
    """Return the `ContextParallelConfig` in force of a transformer or an attention processor.

    Args:
        holder: what diffusers' `enable_parallelism` left its configuration with.

    Returns:
        None if its sequence is whole.
    """
    config = getattr(holder, "_parallel_config", None)
    return getattr(config, "context_parallel_config", None)


def head_share(
    share: Share, heads: int, *, order: Tensor | None = None, deals: bool = False
) -> HeadShare:
    """Return which heads of a layer this rank computes, for methods that look at all of them.

    Args:
        share: what this rank holds of the sequence.
        heads: of the layer.
        order: in which ranks have them; None for that of their numbers.
        deals: whether they may be dealt out anew.
    """
    of_heads = replace(share, tokens=heads)
    place = of_heads.place
    return HeadShare(
        first=place.start,
        heads=heads,
        gather=lambda x: of_heads.whole(x, 1),
        count=place.stop - place.start,
        devices=share.ranks,
        order=order,
        deals=deals,
    )


def attend_over_ranks(
    share: Share,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor, Arrivals], Tensor],
    *,
    text_position: Literal["first", "last"] | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Attend to a sequence of which each rank holds a share.

    Args:
        share: what this rank holds.
        query: `[B, S, H, D]`, this rank's video tokens, and all of the text if there is any.
        key: as `query`.
        value: as `query`.
        attend: computes attention of whole sequences, `[B, S, H, D]`, of this rank's heads; has to
            wait for the keys and the values before it reads them.
        text_position: where the text stands; None if there is none.
        order: int64 `[H]`, in which ranks have the heads; None for that of their numbers.

    Returns:
        As `query`, contiguous.
    """
    if share.ranks == 1:
        return attend(query, key, value, Arrivals())
    heads = part_sizes(query.shape[2], share.ranks)
    mine = slice(sum(heads[: share.rank]), sum(heads[: share.rank + 1]))
    text = query.shape[1] - share.sizes[share.rank]
    first = text if text_position == "first" else 0
    video, words = _slices(first, text, query.shape[1])
    all_video, all_words = _slices(first, text, text + share.tokens)

    def of_heads(x: Tensor, axis: int, start: int, stop: int) -> Tensor:
        if order is None:
            return x.narrow(axis, start, stop - start)
        return _picked(x, axis, order[start:stop])

    # All three are on their way before the first is waited for, and arrive in this order.
    pending, whole = [], []
    for x in (query, key, value):
        batch, _, _, width = x.shape
        shape = (batch, text + share.tokens, mine.stop - mine.start, width)
        # What the fused kernels make lies head by head and stays so: it is sent as it is, and
        # what comes is copied to its tokens. What a projection makes lies token by token: heads are
        # copied together to be sent, and what comes is in place.
        by_head = x.transpose(1, 2).is_contiguous()
        joined = _empty_by_head(x, shape) if by_head else x.new_empty(shape)
        if text:
            joined[:, all_words] = of_heads(x[:, words], 2, mine.start, mine.stop)
        sent = x[:, video]
        received = [joined[:, all_video][:, start:stop] for start, stop in _bounds(share.sizes)]
        if by_head:
            sent, received = sent.transpose(1, 2), [y.transpose(1, 2) for y in received]
        axis = 1 if by_head else 2
        parts = [of_heads(sent, axis, start, stop) for start, stop in _bounds(heads)]
        pending.append(exchange(parts, received, share))
        whole.append(joined)
    pending[0]()
    arrivals = Arrivals(key=pending[1], value=pending[2])
    try:
        local = attend(whole[0], whole[1], whole[2], arrivals)
    finally:
        arrivals.wait()  # memory that is still written must not be given to others

    out = local.new_empty(query.shape)
    shares = [local[:, all_video][:, start:stop] for start, stop in _bounds(share.sizes)]
    back = [exchange(shares, [out[:, video, i:k] for i, k in _bounds(heads)], share)]
    if text:
        spoken = [local[:, all_words]] * share.ranks
        back.append(exchange(spoken, [out[:, words, i:k] for i, k in _bounds(heads)], share))
    for finish in back:
        finish()
    return out if order is None else _picked(out, 2, order.argsort())


def exchange(
    sent: Sequence[Tensor], received: Sequence[Tensor], share: Share
) -> Callable[[], None]:
    """Begin to send a tensor to each rank and to receive one from each, into any memory.

    A tensor that is not contiguous is copied into a parcel, or out of one. Messages of whole heads,
    which need no parcel, took as long on 2 and 4 H200s. What a rank has for itself it copies, while
    the rest is on its way.

    Args:
        sent: what each rank gets.
        received: where what comes from each rank is written.
        share: the ranks, and which of them this one is.

    Returns:
        What has to be called before others read what is received, or write what is sent.
    """
    own, nothing = share.rank, sent[0].new_empty(0)
    parcels = [nothing if n == own else _packed(x) for n, x in enumerate(sent)]
    boxes = [
        nothing if n == own else x if x.is_contiguous() else x.new_empty(x.shape)
        for n, x in enumerate(received)
    ]
    if nothing.device.type == "cpu":  # gloo exchanges the parts of one tensor only
        sizes = [x.numel() for x in boxes]
        flat = torch.cat([x.flatten() for x in parcels])
        came = flat.new_empty(sum(sizes))
        work = dist.all_to_all_single(
            came, flat, sizes, [x.numel() for x in parcels], group=share.group, async_op=True
        )
        boxes = [x.view(box.shape) for x, box in zip(came.split(sizes), boxes, strict=True)]
    else:
        work = dist.all_to_all(boxes, parcels, group=share.group, async_op=True)
    _copy(received[own], sent[own])
    boxes[own] = received[own]
    return partial(_finish, work, received, boxes, parcels)


def _finish(
    work: Any,
    received: Sequence[Tensor],
    boxes: Sequence[Tensor],
    kept: Sequence[Tensor],
) -> None:
    """Wait for what is under way, whose tensors had to be kept, and unpack what came in boxes."""
    work.wait()
    for x, box in zip(received, boxes, strict=True):
        if x is not box:
            _copy(x, box)


def _packed(x: Tensor) -> Tensor:
    """Return a tensor that is contiguous: itself, or a copy."""
    if x.is_contiguous():
        return x
    parcel = x.new_empty(x.shape)
    _copy(parcel, x)
    return parcel


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy bit for bit, 16 bytes at a time where both lie so.

    Of strided tensors torch computes the address of every element, which takes longer than to move
    its two bytes.
    """
    wide = _wide(target), _wide(source)
    if wide[0] is None or wide[1] is None:
        target.copy_(source)
    else:
        wide[0].copy_(wide[1])


def _picked(x: Tensor, axis: int, places: Tensor) -> Tensor:
    """Return entries of an axis before the last, in a tensor of their own; see `_copy`."""
    wide = _wide(x)
    if wide is None:
        return x.index_select(axis, places)
    return wide.index_select(axis, places).view(x.dtype)


def _wide(x: Tensor) -> Tensor | None:
    """Return a tensor as elements of 16 bytes, a view, or None where it cannot be viewed so."""
    try:
        return x.view(torch.complex128)
    except RuntimeError:  # the width of a head, or where one begins, is no multiple of 16 bytes
        return None


def _empty_by_head(like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Return `[B, S, H, D]` in memory head by head."""
    batch, tokens, heads, width = shape
    return like.new_empty(batch, heads, tokens, width).transpose(1, 2)


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
                "ring": "a sparse plan needs the keys of the whole sequence and diffusers' ring "
                "shows one part at a time; use svg_models.parallelize(pipe, ring=...), or "
                "ContextParallelConfig(ulysses_degree=...)"
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
