"""Put a function in the place of a method of one object, for a while."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["standing_in"]


@contextmanager
def standing_in(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let an object have a function as its attribute, in place of what it or its class has.

    What somebody else has put over the class's own is there again afterwards; what somebody puts
    over this one meanwhile is left alone.

    Args:
        owner: the object, held weakly.
        name: of the method.
        function: what is called instead, without `owner`.
    """
    held, own = weakref.ref(owner), vars(owner).get(name)
    setattr(owner, name, function)
    del owner
    try:
        yield
    finally:
        owner = held()
        if owner is not None and vars(owner).get(name) == function:
            if own is None:
                delattr(owner, name)  # the class's own is there again
            else:
                setattr(owner, name, own)
