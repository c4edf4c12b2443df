"""Ulysses: ranks hold shares of the sequence, and exchange them for whole sequences of some heads.

Before attention every rank sends each other one the heads that this one computes and gets its own
heads of all other shares; afterwards the way back. A sparse plan sees what it would see on one
GPU, of fewer heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from svg_attention import UnsupportedError
from svg_models.families import Family

__all__ = ["attend_over_ranks", "context_config", "refuse_parallel"]


def context_config(holder: Any) -> Any:
    """Return the `ContextParallelConfig` in force of a transformer or an attention processor.

    Args:
        holder: what diffusers' `enable_parallelism` left its configuration with.

    Returns:
        None if its sequence is whole.
    """
    config = getattr(holder, "_parallel_config", None)
    return getattr(config, "context_parallel_config", None)


def attend_over_ranks(
    holder: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Attend to a sequence of which each rank holds a share.

    Args:
        holder: the attention processor whose configuration counts.
        query: `[B, S, H, D]`, this rank's share of the tokens.
        key: as `query`.
        value: as `query`.
        attend: computes attention of whole sequences, `[B, S, H, D]`, of this rank's heads.

    Returns:
        As `query`.
    """
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    def local_heads(
        _: Any, q: Tensor, k: Tensor, v: Tensor, *unused: Any, **options: Any
    ) -> Tensor:
        return attend(q.contiguous(), k.contiguous(), v.contiguous()).contiguous()

    out: Tensor = _templated_context_parallel_attention(
        query,
        key,
        value,
        forward_op=local_heads,
        backward_op=None,
        _parallel_config=holder._parallel_config,
    )
    return out


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
                "ulysses": f"{family.title} attends to text and video in one sequence; split over "
                "devices, each part would hold text of its own amid the video, where no sparse "
                "plan looks for it; run it on one device"
            }
        )
