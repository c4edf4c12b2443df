"""The one operator through which every sparse self-attention goes.

`torch.compile` must see one opaque node that is the same for every layer and every step: whatever
changes between calls (the layer, the step, the guidance branch) may not be a Python value in traced
code, or each layer would compile its own graph. So a call carries only a CPU tensor `[session,
slot]`, and the session is looked up when the operator executes.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["attention", "begin", "make_handle", "owner", "owners", "register"]


class Attends(Protocol):
    """What the operator needs of a run."""

    def attend(self, slot: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute attention of the layer behind `slot`; `[B, S, H, D]` in and out."""
        ...

    def begin(self, slot: int, query: Tensor, key: Tensor) -> None:
        """Take queries and keys before `attend` has values as well, to make use of the time."""
        ...

    def tell(self, message: str) -> None:
        """Warn the user once."""
        ...


_owners: weakref.WeakValueDictionary[int, Attends] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(session: Attends) -> int:
    """Register `session` under a number that handles can carry; the table keeps none alive.

    Args:
        session: whatever answers `attend`.

    Returns:
        A number that no other of this process has had.
    """
    number = next(_numbers)
    _owners[number] = session
    return number


def owner(number: int) -> Attends | None:
    """Return what `register` gave this number, or None if it is gone."""
    return _owners.get(number)


def owners() -> list[Attends]:
    """Return all that `register` was given and that is not gone, the earliest first."""
    return list(_owners.values())


def make_handle(number: int, slot: int) -> Tensor:
    """Make the tensor that tells a call which session and which attention it belongs to.

    Args:
        number: what `register` gave.
        slot: position of the attention in that session.

    Returns:
        int64 `[2]` on the CPU, so that reading it never waits for an accelerator.
    """
    return torch.tensor([number, slot], dtype=torch.int64, device="cpu")


def begin(query: Tensor, key: Tensor, handle: Tensor) -> None:
    """Give queries and keys of an attention that follows to the run behind `handle`.

    Not while something compiles, or where autocast will hand over others.

    Args:
        query: `[B, S, H, D]`, as `attention` gets it next.
        key: as `query`.
        handle: from `make_handle`.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(query.device.type):
        return
    number, slot = handle.tolist()
    session = _owners.get(number)
    if session is not None:
        session.begin(slot, query, key)


def attention(query: Tensor, key: Tensor, value: Tensor, handle: Tensor) -> Tensor:
    """Compute self-attention as the run behind `handle` decides: dense or sparse.

    Args:
        query: `[B, S, H, D]`, the layout of diffusers' own dispatcher.
        key: as `query`.
        value: as `query`.
        handle: from `make_handle`.

    Returns:
        `[B, S, H, D]`, contiguous, typed as `query`, or as autocast says. There is no backward.

    Raises:
        RuntimeError: if the run was restored or is gone.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # it knows torch's attention, not this one
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out: Tensor = torch.ops.svg_models.self_attention(query, key, value, handle)
    return out


def _execute(query: Tensor, key: Tensor, value: Tensor, handle: Tensor) -> Tensor:
    number, slot = handle.tolist()
    session = _owners.get(number)
    if session is None:
        raise RuntimeError(
            "this attention belongs to a sparse run that has ended; "
            "put back the processors the model had, or call sparsify(pipe) again"
        )
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return session.attend(slot, query, key, value).contiguous()
    with torch.autocast(device, enabled=False):  # it has had its say, and a plan is made in fp32
        return session.attend(slot, query, key, value).contiguous()


def _describe(query: Tensor, key: Tensor, value: Tensor, handle: Tensor) -> Tensor:
    return query.new_empty(query.shape)


def _tags() -> tuple[torch.Tag, ...]:
    # A CUDA graph would replay the step it was captured in; older torch has no way to say so.
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    return () if tag is None else (tag,)


_library = torch.library.Library("svg_models", "DEF")
_library.define(
    "self_attention(Tensor query, Tensor key, Tensor value, Tensor handle) -> Tensor",
    tags=_tags(),
)
_library.impl("self_attention", _execute, "CompositeExplicitAutograd")
torch.library.register_fake("svg_models::self_attention", _describe, lib=_library)
