"""Ulysses: ranks hold shares of the sequence, and exchange them for whole sequences of some heads.

Before attention every rank sends each other one the heads that this one computes and gets its own
heads of all other shares; afterwards the way back. A sparse plan sees what it would see on one
GPU, of fewer heads, in the same order of tokens. It begins with the queries, while keys and values
are on their way.

Tokens of text are on every rank. It takes its own heads of them, and afterwards all ranks tell each
other what came out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from svg_attention import Arrivals, HeadShare, UnsupportedError
from svg_models.families import Family
from svg_models.parallel.collective import Collective
from svg_models.parallel.places import Places
from svg_models.parallel.share import Share

__all__ = [
    "attend_over_ranks",
    "begin_over_ranks",
    "context_config",
    "head_share",
    "refuse_parallel",
]


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
    given, places = (query, key, value), Places.of(share, query, text_position, order)
    direct = None if share.direct is None else share.direct.exchange(given, places)
    exchange = Collective(places) if direct is None else direct
    whole, pending = exchange.join_heads(given)
    pending[0]()
    arrivals = Arrivals(
        lambda out: exchange.give(out.transpose(1, 2)), key=pending[1], value=pending[2]
    )
    try:
        local = attend(whole[0], whole[1], whole[2], arrivals)
    finally:
        arrivals.wait()  # memory that is still written must not be given to others
    return exchange.part_tokens(local)


def begin_over_ranks(
    share: Share,
    query: Tensor,
    key: Tensor,
    *,
    text_position: Literal["first", "last"] | None = None,
    order: Tensor | None = None,
) -> None:
    """Send queries and keys on their way, if that can be, while values are still computed.

    Args:
        share: what this rank holds.
        query: as `attend_over_ranks` gets it next.
        key: as `query`.
        text_position: see there.
        order: see there.
    """
    if share.ranks > 1 and share.direct is not None:
        share.direct.begin((query, key), Places.of(share, query, text_position, order))


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
