"""Dense attention in a ring."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from svg_attention.attention import sparse_attention
from svg_attention.layout import TokenLayout
from svg_attention.methods.call import AttentionCall
from svg_attention.plan import SparsePlan
from svg_attention.ring.exchange import Ring, Travelling
from svg_attention.ring.merge import Merged

# Returns which keys of the share of a process the queries here read.
PlanOf = Callable[[int], SparsePlan]


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    ring: Ring,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend to the keys of all processes of a ring.

    Each process gives its share of one sequence and gets its share of the output of
    `softmax(query key' * scale) value` over the whole. At any time it holds two shares of the keys.

    Args:
        query: `[B, H, S_rank, D]`, this process's share; shares are those of `Ring.shares`.
        key: `[B, H_kv, S_rank, D]`.
        value: `[B, H_kv, S_rank, D]`.
        ring: the processes.
        scale: factor of the logits, `D ** -0.5` when None.
        backend: as for `sparse_attention`.

    Returns:
        `[B, H, S_rank, D]`, typed as `query`.

    Raises:
        ValueError: if the shapes do not fit each other.
        UnsupportedError: if no allowed backend can run this call; it lists each one's reason.
    """
    mine = torch.tensor([query.shape[2]], device=query.device)
    counts = [int(count) for count in ring.gather(mine).flatten()]
    layout = TokenLayout(grid=(1, 1, counts[ring.rank]))
    call = AttentionCall(query=query, key=key, value=value, layout=layout, scale=scale or 0.0)
    return attend_dense(call, ring, counts, backend=backend)


def attend_dense(call: AttentionCall, ring: Ring, counts: Sequence[int], *, backend: str) -> Tensor:
    """Compute a dense call in a ring.

    Args:
        call: this process's share; its layout is that of the share, with all text.
        ring: the processes.
        counts: video tokens of each process.
        backend: as for `sparse_attention`.
    """
    own = call.full_plan()

    def plan(holder: int) -> SparsePlan:
        return SparsePlan.full(
            call.batch, call.heads, call.layout.tokens, counts[holder],
            query_order=own.query_order, query_lengths=own.query_lengths, device=call.device,
        )  # fmt: skip

    coming = ring.pass_on((call.video(call.key), call.video(call.value)), counts[ring.holder(1)])
    out = attend_shares(
        call.query, (call.key, call.value), own, coming, plan,
        ring=ring, counts=counts, scale=call.scale, backend=backend,
    )  # fmt: skip
    return out.to(call.query.dtype)


def attend_shares(
    query: Tensor,
    own: tuple[Tensor, Tensor],
    own_plan: SparsePlan,
    coming: Travelling,
    plan: PlanOf,
    *,
    ring: Ring,
    counts: Sequence[int],
    scale: float,
    backend: str,
) -> Tensor:
    """Attend to the share of each process in turn, while the next one is on its way.

    Args:
        query: `[B, H, Sq, D]`.
        own: keys and values that are here.
        own_plan: what of them the queries read.
        coming: keys and values of the process before; its own are on their way to the next.
        plan: what the queries read of the share of another process.
        ring: the processes.
        counts: keys of each share.
        scale: factor of the logits.
        backend: as for `sparse_attention`.

    Returns:
        fp32 `[B, H, Sq, D]`.
    """

    def attend(keys: tuple[Tensor, ...], reads: SparsePlan) -> tuple[Tensor, Tensor]:
        key, value = keys
        return sparse_attention(
            query, key, value, reads, scale=scale, backend=backend, return_lse=True
        )

    merged = Merged(*attend(own, own_plan))
    for passes in range(1, ring.size):
        here = coming.arrived()
        if passes + 1 < ring.size:
            coming = ring.pass_on(here, counts[ring.holder(passes + 1)])
        merged.add(*attend(here, plan(ring.holder(passes))))
    return merged.out
