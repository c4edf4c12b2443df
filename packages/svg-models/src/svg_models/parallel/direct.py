"""Exchanging heads by writing into the memory of other ranks.

A rank copies the heads of another one straight to their places in the sequence there: no message is
packed, and none unpacked. Barriers on the GPU, of which the host knows nothing, keep readers and
writers apart. Queries and keys are written while values are projected, values while queries and
keys are clustered, outputs as soon as attention has them.

**Why no rank reads too early.** A rank reads queries, keys or values after a barrier of their own,
which each rank reaches when it has written them to all others; outputs likewise.

**Why none writes too early.** Every call uses the same memory, and begins with a barrier. A rank
reaches it when all that its stream has run before is done, so when it has read what the call before
left in its memory. Others write there only after it, that holds after an error amid a call as well.
What a call returns is memory of its own, because a model, or a compiler that reuses memory, may
keep it for as long as it likes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from svg_attention import UnsupportedError
from svg_models.copies import copy_beside, copy_bits
from svg_models.parallel.peers import PeerMemory
from svg_models.parallel.places import Places

__all__ = ["Direct"]

# Memory of each tensor begins at a multiple of so many bytes.
_ALIGNMENT = 512
_BEGIN, _BACK = 0, 1
_ARRIVAL = 2  # and the next ones: queries, keys, values
_TENSORS = 3

_log = logging.getLogger(__name__)


class Memory(Protocol):
    """Memory that ranks write into; see `PeerMemory`."""

    @property
    def size(self) -> int:
        """Return the bytes of each rank."""
        ...

    def view(self, rank: int, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor in the memory of a rank."""
        ...

    def barrier(self, channel: int) -> None:
        """Have the current stream wait for all ranks."""
        ...


class Direct:
    """Exchanges heads between the ranks of a group by writing into each other's memory.

    The memory is made with the first call, and anew with one that needs more. Where it cannot be
    had, that is known once for all ranks and all later calls.

    Args:
        group: the ranks; None for all.
        required: raise where there is no such memory, instead of leaving the call to others.
        allocate: makes the memory: given group, bytes and device, on all ranks or on none.
    """

    def __init__(
        self,
        group: Any,
        *,
        required: bool = False,
        allocate: Callable[[Any, int, torch.device], Memory] = PeerMemory,
    ) -> None:
        self._group, self._required, self._allocate = group, required, allocate
        self._memory: Memory | None = None
        self._refusal: UnsupportedError | None = None
        self._side: _Side | None = None
        self._begun: Exchange | None = None

    @property
    def size(self) -> int:
        """Return how many bytes of memory each rank has for this."""
        return 0 if self._memory is None else self._memory.size

    @property
    def refusal(self) -> str:
        """Return why nothing is exchanged directly; empty if it is, or if no call was made yet."""
        return "" if self._refusal is None else "; ".join(self._refusal.reasons.values())

    def begin(self, tensors: Sequence[Tensor], places: Places) -> None:
        """Begin the exchange of a call whose other tensors are still to come.

        The next call with these goes on from there.

        Args:
            tensors: queries, or queries and keys, `[B, S, H, D]`, what this rank holds.
            places: where it belongs.

        Raises:
            UnsupportedError: if there is no memory for it and it was required.
        """
        self._drop_begun()
        exchange = self._exchange(tensors, places)
        if exchange is not None:
            exchange.send(tensors, early=True)
            self._begun = exchange

    def exchange(self, tensors: Sequence[Tensor], places: Places) -> Exchange | None:
        """Return the exchange of a call; None, on all ranks alike, if it has to go another way.

        Args:
            tensors: queries, keys and values, `[B, S, H, D]`, what this rank holds.
            places: where it belongs.

        Raises:
            UnsupportedError: if there is no memory for it and it was required.
        """
        begun = self._begun
        if begun is not None and begun.is_of(tensors, places):
            self._begun = None
            return begun
        self._drop_begun()
        return self._exchange(tensors, places)

    def _exchange(self, tensors: Sequence[Tensor], places: Places) -> Exchange | None:
        if self._refusal is None:
            layout = _Layout(tensors[0], places)
            if layout.size > self.size:
                if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
                    return None  # nothing can be allocated; all ranks capture the same
                self._grow(layout.size, tensors[0].device)
            if self._memory is not None:
                return Exchange(layout, self._memory, self._side)
        if self._refusal is not None and self._required:
            raise self._refusal
        return None

    def _drop_begun(self) -> None:
        """Forget an exchange that was begun for a call that did not come."""
        if self._begun is not None:
            self._begun.wait()
            self._begun = None

    def release(self) -> None:
        """Give the memory back; a further call makes it again."""
        self._drop_begun()
        self._memory = None

    def _grow(self, size: int, device: torch.device) -> None:
        self._memory = None  # both at once might not fit; what is under way is waited for
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._side = self._side or _Side(device)
        try:
            self._memory = self._allocate(self._group, size, device)
        except UnsupportedError as error:
            self._refusal = error
            if device.type == "cuda" and dist.get_rank(self._group) == 0:
                _log.warning("heads are exchanged by messages: %s", self.refusal)


class Exchange:
    """The exchange of one call; whatever it has joined is overwritten by that of the next.

    Args:
        layout: where in memory its tensors go.
        memory: of all ranks.
        side: a stream for what others read; None on a device that has none.
    """

    def __init__(self, layout: _Layout, memory: Memory, side: _Side | None) -> None:
        self._layout, self._memory, self._places, self._side = layout, memory, layout.places, side
        self._sent: list[Tensor] = []
        self._whole: list[Tensor] = []
        self._pending: list[Callable[[], None]] = []
        self._given: tuple[Tensor, Callable[[], None]] | None = None

    def is_of(self, tensors: Sequence[Tensor], places: Places) -> bool:
        """Return whether these are the tensors that were sent, and what follows."""
        here = self._places
        return (
            here.order is places.order
            and replace(here, order=None) == replace(places, order=None)
            and all(_same(x, y) for x, y in zip(self._sent, tensors, strict=False))
        )

    def wait(self) -> None:
        """Have the current stream wait for all that was sent."""
        for arrived in self._pending:
            arrived()

    def send(self, tensors: Sequence[Tensor], *, early: bool) -> None:
        """Write this rank's part of tensors to where it belongs, beside the current stream.

        Args:
            tensors: `[B, S, H, D]`, one after the other of the call.
            early: whether the current stream has other work than to wait for the first of them.
        """
        places, me = self._places, self._places.share.rank
        helps = not early and not self._sent
        if not self._sent and self._side is not None:
            self._side.follow()
        with self._aside():
            if not self._sent:
                self._memory.barrier(_BEGIN)
            for x in tensors:
                joined = self._layout.joined(self._memory, x, len(self._sent))
                mine = x[:, places.of_rank(me)[0]]
                for rank in _others(places):
                    there = joined[rank][:, places.token_slices[me]]
                    copy_beside(there, *places.chosen(mine, rank))
                if self._sent or not helps:
                    self._copy_own(joined[me], x)
                self._memory.barrier(_ARRIVAL + len(self._sent))
                self._whole.append(joined[me])
                self._pending.append(self._written())
                self._sent.append(x)
        if helps:
            self._copy_own(self._whole[0], tensors[0])

    def join_heads(
        self, tensors: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Callable[[], None]]]:
        """Begin to gather whole sequences of this rank's heads; see `Collective.join_heads`."""
        self.send(tensors[len(self._sent) :], early=False)
        return self._whole, self._pending

    def _copy_own(self, joined: Tensor, x: Tensor) -> None:
        """Copy this rank's heads of what it holds itself."""
        places, me = self._places, self._places.share.rank
        parts = zip((places.token_slices[me], places.words), places.of_rank(me), strict=True)
        for target, source in parts:
            copy_beside(joined[:, target], *places.chosen(x[:, source], me))

    def give(self, local: Tensor) -> None:
        """Write outputs to the ranks that they are for, beside the current stream.

        Args:
            local: what `part_tokens` gets next.
        """
        places, me = self._places, self._places.share.rank
        with self._aside():
            for rank in _others(places):
                box = self._layout.box(self._memory, rank, me)
                video, words = places.of_rank(rank)
                copy_beside(box[:, video], local[:, places.token_slices[rank]])
                copy_beside(box[:, words], local[:, places.words])
            self._memory.barrier(_BACK)
            self._given = local, self._written()

    def part_tokens(self, local: Tensor) -> Tensor:
        """Return all heads of this rank's tokens; see `Collective.part_tokens`."""
        if self._given is None or not _same(self._given[0], local):
            self.give(local)
        places, me = self._places, self._places.share.rank
        out = local.new_empty(self._sent[0].shape)
        video, words = places.of_rank(me)
        copy_bits(out[:, video, places.mine], local[:, places.token_slices[me]])
        copy_bits(out[:, words, places.mine], local[:, places.words])
        if self._given is not None:
            self._given[1]()
        for rank in _others(places):
            copy_bits(out[:, :, places.head_slices[rank]], self._layout.box(self._memory, me, rank))
        if self._side is not None:
            self._side.finish()
        return places.numbered(out)

    def _aside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._side is None else self._side.after_current()

    def _written(self) -> Callable[[], None]:
        return _nothing if self._side is None else self._side.waiter()


class _Side:
    """A stream beside the current one, on which what others read is written.

    Args:
        device: of both.
    """

    def __init__(self, device: torch.device) -> None:
        # Short copies go before the long kernels of the other stream.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._last: torch.cuda.Event | None = None

    def follow(self) -> None:
        """Have the current stream wait for the call before, should that have run on another."""
        if self._last is not None and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().wait_event(self._last)

    def finish(self) -> None:
        """Take note of where a call ends on the current stream."""
        if not torch.cuda.is_current_stream_capturing():
            self._last = torch.cuda.Event()
            self._last.record()

    @contextlib.contextmanager
    def after_current(self) -> Iterator[None]:
        """Launch on this stream, after all that the current one has so far."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def waiter(self) -> Callable[[], None]:
        """Return what has the then current stream wait for what is on this one by now."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return lambda: torch.cuda.current_stream().wait_event(event)


class _Layout:
    """Where in the memory of the ranks the tensors of a call are.

    One after the other: whole queries, keys and values, then outputs from each other rank. All
    begin at the same byte on every rank, with room for the most heads and tokens that one has.

    Args:
        query: `[B, S, H, D]`, as which keys and values are shaped and typed.
        places: where they belong.
    """

    def __init__(self, query: Tensor, places: Places) -> None:
        self.places, self._dtype = places, query.dtype
        self._batch, self._width = query.shape[0], query.shape[3]
        most_heads = _size(places.head_slices[0])
        most_tokens = places.text + _size(places.token_slices[0])
        row = self._batch * self._width * query.element_size()
        self._whole = _rounded(places.length * most_heads * row)
        self._boxed = _rounded(most_tokens * most_heads * row)
        self.size = _TENSORS * self._whole + (places.share.ranks - 1) * self._boxed

    def joined(self, memory: Memory, x: Tensor, number: int) -> list[Tensor]:
        """Return where each rank has whole sequences of one of the tensors, `[B, S, H, D]`.

        Head by head in memory, or token by token, as what they are made from.

        Args:
            memory: of all ranks.
            x: what they are made from.
            number: 0 for queries, 1 for keys, 2 for values.
        """
        found, by_head = [], x.transpose(1, 2).is_contiguous()
        for rank, heads in enumerate(map(_size, self.places.head_slices)):
            middle = (heads, self.places.length) if by_head else (self.places.length, heads)
            shape = (self._batch, *middle, self._width)
            view = memory.view(rank, number * self._whole, shape, self._dtype)
            found.append(view.transpose(1, 2) if by_head else view)
        return found

    def box(self, memory: Memory, rank: int, source: int) -> Tensor:
        """Return where a rank gets outputs from another one, `[B, S, H, D]`."""
        number = source if source < rank else source - 1
        start = _TENSORS * self._whole + number * self._boxed
        tokens = self.places.text + _size(self.places.token_slices[rank])
        heads = _size(self.places.head_slices[source])
        shape = (self._batch, tokens, heads, self._width)
        return memory.view(rank, start, shape, self._dtype)


def _others(places: Places) -> list[int]:
    """Return the other ranks, the next one first, so that no two begin with the same."""
    ranks, me = places.share.ranks, places.share.rank
    return [(me + n) % ranks for n in range(1, ranks)]


def _same(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are the same numbers in memory."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def _size(part: slice) -> int:
    size: int = part.stop - part.start
    return size


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _nothing() -> None:
    pass
