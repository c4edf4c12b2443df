"""Exchanging heads by messages, through the collectives of NCCL or gloo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from svg_models.copies import copy_bits, packed
from svg_models.parallel.places import Places
from svg_models.parallel.share import Share

__all__ = ["Collective"]


class Collective:
    """The exchange of one call.

    Args:
        places: what belongs where.
    """

    def __init__(self, places: Places) -> None:
        self._places = places

    def join_heads(
        self, tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Callable[[], None]]]:
        """Begin to gather whole sequences of this rank's heads.

        All tensors are on their way before the first is waited for, and arrive in their order.

        Args:
            tensors: queries, keys and values, `[B, S, H, D]`, what this rank holds.

        Returns:
            `[B, text + tokens, its heads, D]` of each, and what has to be called before it is read.
        """
        places, whole, pending = self._places, [], []
        video, words = places.of_rank(places.share.rank)
        for x in tensors:
            by_head = x.transpose(1, 2).is_contiguous()
            joined = self._empty_joined(x, by_head=by_head)
            if places.text:
                joined[:, places.words] = places.picked(x[:, words], 2, places.share.rank)
            sent, received = x[:, video], [joined[:, tokens] for tokens in places.token_slices]
            # What the fused kernels make lies head by head: it is sent as it is, and what comes is
            # copied to its tokens. What a projection makes lies token by token: heads are copied
            # together to be sent, and what comes is in place.
            if by_head:
                sent, received = sent.transpose(1, 2), [y.transpose(1, 2) for y in received]
            axis = 1 if by_head else 2
            parts = [places.picked(sent, axis, rank) for rank in range(places.share.ranks)]
            pending.append(_exchange(parts, received, places.share))
            whole.append(joined)
        return whole, pending

    def give(self, local: Tensor) -> None:
        """Do nothing with an output that is known before `part_tokens` is called.

        Messages go one after the other, and small ones of others would wait for those of outputs.
        """

    def part_tokens(self, local: Tensor) -> Tensor:
        """Return all heads of this rank's tokens, given whole sequences of its heads.

        Args:
            local: `[B, text + tokens, its heads, D]`.

        Returns:
            `[B, S, H, D]`, contiguous.
        """
        places = self._places
        batch, _, _, width = local.shape
        here = places.text + places.share.sizes[places.share.rank]
        out = local.new_empty(batch, here, places.heads, width)
        video, words = places.of_rank(places.share.rank)
        shares = [local[:, tokens] for tokens in places.token_slices]
        targets = [out[:, video, heads] for heads in places.head_slices]
        back = [_exchange(shares, targets, places.share)]
        if places.text:
            spoken = [local[:, places.words]] * places.share.ranks
            targets = [out[:, words, heads] for heads in places.head_slices]
            back.append(_exchange(spoken, targets, places.share))
        for finish in back:
            finish()
        return places.numbered(out)

    def _empty_joined(self, x: Tensor, *, by_head: bool) -> Tensor:
        batch, _, _, width = x.shape
        heads, length = self._places.mine.stop - self._places.mine.start, self._places.length
        if by_head:
            return x.new_empty(batch, heads, length, width).transpose(1, 2)
        return x.new_empty(batch, length, heads, width)


def _exchange(
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
    parcels = [nothing if n == own else packed(x) for n, x in enumerate(sent)]
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
    copy_bits(received[own], sent[own])
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
            copy_bits(x, box)
