"""One of the processes of a ring, over gloo on the CPU: `ring_member.py RANK SIZE FILE`.

Every check draws the whole sequence alike on each process, gives this one its share, and compares
with what one process computes of the whole. Started by `test_ring.py`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from svg_attention import (
    SVG1,
    SVG2,
    Call,
    Dense,
    HeadShare,
    LayerMemory,
    Ring,
    Schedule,
    Session,
    TokenLayout,
    UnsupportedError,
    dense_attention,
    ring_attention,
    sparse_attention,
)
from svg_attention.planning.clustering import cluster_rows
from svg_attention.planning.dealing import counts_of_heads
from svg_attention.ring import attend_in_ring
from svg_attention.ring.call import RingOutput
from svg_attention.ring.clustering import cluster_shared_rows
from svg_attention.ring.merge import Merged

SPARSE = SVG2(q_clusters=6, k_clusters=24, top_p=0.5, min_keep=0.0, first_iterations=4)
SEED = 7  # of what `attend` draws
ALWAYS = Schedule(dense_steps=0.0, dense_layers=0.0)


def rows(*shape: int, seed: int = 0, clusters: int = 12) -> Tensor:
    """Draw rows that lie around a few centres, so that attention is uneven."""
    source = torch.Generator().manual_seed(seed)
    centres = 2.0 * torch.randn(*shape[:-2], clusters, shape[-1], generator=source)
    pick = torch.randint(clusters, shape[:-1], generator=source)
    near = centres.gather(-2, pick[..., None].expand(shape))
    return near + 0.3 * torch.randn(shape, generator=source)


def tensors(layout: TokenLayout, batch: int = 1, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (rows(batch, heads, layout.tokens, 16, seed=seed) for seed in range(3))
    return query, key, value


def share(x: Tensor, layout: TokenLayout, ring: Ring) -> Tensor:
    """Return what a process holds of a sequence: its video tokens, and all text."""
    first, counts = layout.video_start, ring.shares(layout.video_tokens)
    start = first + sum(counts[: ring.rank])
    video = x[:, :, start : start + counts[ring.rank]]
    text = x[:, :, layout.text_start : layout.text_start + layout.text_tokens]
    return torch.cat([text, video] if layout.text_position == "first" else [video, text], dim=2)


def attend(
    method: SVG2 | Dense | SVG1, layout: TokenLayout, ring: Ring, batch: int = 1, **options: object
) -> RingOutput:
    shares = (share(x, layout, ring) for x in tensors(layout, batch))
    generator = torch.Generator().manual_seed(SEED)
    return attend_in_ring(method, *shares, ring=ring, layout=layout, generator=generator, **options)


def check_merge(ring: Ring) -> None:
    query, key, value = tensors(TokenLayout(grid=(1, 5, 9)))
    whole = (query @ key.mT * 0.25).float()
    parts = []
    for part in (slice(0, 20), slice(20, 20), slice(20, 45)):
        logits = whole[..., part]
        lse = logits.logsumexp(-1)
        parts.append(((logits - lse[..., None]).exp().nan_to_num() @ value[:, :, part], lse))
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        merged = Merged(*parts[order[0]])
        merged.add(*parts[order[1]])
        merged.add(*parts[order[2]])
        torch.testing.assert_close(merged.out, whole.softmax(-1) @ value)
        torch.testing.assert_close(merged.lse, whole.logsumexp(-1))
    nothing = Merged(torch.zeros(1, 1, 3, 4), torch.full((1, 1, 3), -torch.inf))
    nothing.add(torch.zeros(1, 1, 3, 4), torch.full((1, 1, 3), -torch.inf))
    assert (nothing.out == 0).all()
    assert (nothing.lse == -torch.inf).all()


def check_dense(ring: Ring) -> None:
    """Dense attention in a ring is dense attention; uneven shares, shared key heads, a scale."""
    for tokens, key_heads, scale in ((48, 4, None), (49, 2, 0.5), (1 + ring.size, 1, None)):
        layout = TokenLayout(grid=(1, 1, tokens))
        query, key, value = tensors(layout, batch=2, heads=4)
        key, value = key[:, :key_heads], value[:, :key_heads]
        expected = dense_attention(query, key, value, scale=scale)
        mine = [share(x, layout, ring) for x in (query, key, value)]
        found = ring_attention(*mine, ring=ring, scale=scale)
        torch.testing.assert_close(found, share(expected, layout, ring), rtol=1e-4, atol=1e-5)


def check_text(ring: Ring) -> None:
    """Every process holds all text: before or after the video, of different lengths."""
    for position, lengths in (("first", None), ("last", None), ("last", (3, 7))):
        layout = TokenLayout(grid=(3, 7, 9), text_tokens=7, text_position=position)
        valid = None if lengths is None else torch.tensor(lengths)
        query, key, value = tensors(layout, batch=2)
        keys = None if valid is None else valid + layout.video_tokens
        expected = share(dense_attention(query, key, value, key_lengths=keys), layout, ring)
        count = ring.shares(layout.video_tokens)[ring.rank]
        full = replace(SPARSE, top_p=0.9999999, min_keep=1.0)
        for method in (Dense(), full, replace(full, density=0.99999)):
            found = attend(method, layout, ring, 2, text_lengths=valid)
            for item in range(2):
                # Padded rows are no part of the result.
                end = None if lengths is None else count + lengths[item]
                torch.testing.assert_close(
                    found.out[item, :, :end], expected[item, :, :end], rtol=1e-4, atol=1e-5
                )
            if found.density is not None:
                torch.testing.assert_close(found.density, torch.ones_like(found.density))


def check_clusters(ring: Ring) -> None:
    """The clusters of a ring are those of one device, from the first call on."""
    key = rows(2, 3, 301, 16, seed=4)
    layout = TokenLayout(grid=(1, 7, 43))
    memory: Tensor | None = None
    alone: Tensor | None = None
    source, other = (torch.Generator().manual_seed(3) for _ in range(2))
    for _ in range(3):
        expected = cluster_rows(key, 12, remembered=alone, iterations=(6, 2), generator=source)
        found = cluster_shared_rows(
            share(key, layout, ring),
            12,
            ring=ring,
            counts=ring.shares(301),
            remembered=memory,
            iterations=(6, 2),
            generator=other,
        )
        assert torch.equal(found.here.labels, share_of_rows(expected.labels, ring))
        assert torch.equal(found.sizes, expected.sizes)
        torch.testing.assert_close(found.here.centroids, expected.centroids)
        here = torch.zeros_like(found.sizes)
        here.scatter_add_(2, found.here.labels.long(), torch.ones_like(found.here.labels))
        assert torch.equal(found.shares[ring.rank], here)
        alone, memory = expected.centroids, found.here.centroids


def share_of_rows(x: Tensor, ring: Ring) -> Tensor:
    return x.split(ring.shares(x.shape[2]), dim=2)[ring.rank]


def check_sparse(ring: Ring) -> None:
    """A sparse call reads what it says, and what it leaves out is what matters least."""
    layout = TokenLayout(grid=(3, 16, 16), text_tokens=5)
    query, key, value = tensors(layout)
    whole = dense_attention(query, key, value)
    exact, last = share(whole, layout, ring), torch.inf
    for top_p in (0.3, 0.6, 0.9):
        method = replace(SPARSE, top_p=top_p)
        found = attend(method, layout, ring)
        assert found.density is not None
        assert (found.density < 1).all()
        error = float((found.out - exact).norm() / exact.norm())
        source = torch.Generator().manual_seed(SEED)
        plan = method.plan(query, key, value, layout=layout, generator=source)
        alone = sparse_attention(query, key, value, plan) - whole
        assert error < 2 * float(alone.norm() / whole.norm())
        assert error < last
        last = error
    for density in (0.2, 0.5):
        found = attend(replace(SPARSE, density=density), layout, ring)
        assert found.density is not None
        assert (found.density <= density + 0.03).all()
        assert (found.density > density - 0.1).all()


def check_distance(ring: Ring) -> None:
    """Clusters are those of one device; outputs are apart as those of two seeds of it."""
    layout = TokenLayout(grid=(8, 16, 16))
    query, key, value = tensors(layout)
    method = replace(SPARSE, q_clusters=16, k_clusters=64, density=0.3)

    def alone(seed: int, memory: LayerMemory) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        plan = method.plan(query, key, value, layout=layout, generator=source, memory=memory)
        return sparse_attention(query, key, value, plan)

    def apart(one: Tensor, other: Tensor) -> float:
        return float((one - other).norm() / one.norm())

    one, here = LayerMemory(), LayerMemory()
    expected = alone(7, one)
    found = attend(method, layout, ring, memory=here).out
    torch.testing.assert_close(here.query_centroids, one.query_centroids)
    torch.testing.assert_close(here.key_centroids, one.key_centroids)
    seeds = [apart(expected, alone(seed, LayerMemory())) for seed in range(3)]
    # Of 1,024 rows in 12 groups tiles of 128 mix more than of 2,048; longer clips are nearer.
    assert 0.0 < apart(share(expected, layout, ring), found) < 2.0 * max(seeds)


def check_plan(ring: Ring) -> None:
    """The output is the softmax over exactly the keys that the plans of all shares name."""
    layout = TokenLayout(grid=(3, 16, 16), text_tokens=5, text_position="first")
    for method in (SPARSE, replace(SPARSE, compensate=True), replace(SPARSE, density=0.3)):
        found, mask, bias = with_mask(method, layout, ring)
        query, key, value = tensors(layout)
        mine = share(query, layout, ring)
        logits = (mine @ key.mT) * 16**-0.5
        logits = logits.masked_fill(~mask, -torch.inf)
        if bias is not None:
            centroids, means, weights = bias
            more = mine @ centroids.mT * 16**-0.5 + weights
            logits, value = torch.cat([logits, more], -1), torch.cat([value, means], 2)
        torch.testing.assert_close(found.out, logits.softmax(-1) @ value, rtol=1e-4, atol=1e-5)
        assert found.density is not None
        density = mask.float().mean(dim=(2, 3))
        torch.testing.assert_close(found.density, density, rtol=1e-4, atol=1e-5)


def with_mask(
    method: SVG2, layout: TokenLayout, ring: Ring
) -> tuple[RingOutput, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """Return a call's output, the keys of the whole sequence that it read, and its centroids."""
    import svg_attention.ring.dense as dense

    plans, attended = [], dense.sparse_attention

    def watched(query, key, value, plan, **options):  # type: ignore[no-untyped-def]
        plans.append((plan, key))
        return attended(query, key, value, plan, **options)

    dense.sparse_attention = watched
    try:
        found = attend(method, layout, ring)
    finally:
        dense.sparse_attention = attended
    whole = tensors(layout)[1]
    mask = torch.zeros(*found.out.shape[:3], layout.tokens, dtype=torch.bool)
    for plan, key in plans:
        # Which token a travelling key is, told by its value: all keys differ.
        place = (key[..., None, :] == whole[:, :, None]).all(-1).float().argmax(-1)
        read = plan.to_mask()
        assert not (mask.gather(3, place[:, :, None].expand_as(read)) & read).any(), "read twice"
        mask.scatter_(3, place[:, :, None].expand_as(read), read)
    summaries = [plan.summary for plan, _ in plans if plan.summary is not None]
    if not summaries:
        return found, mask, None
    (summary,) = summaries
    order = plans[0][0].query_order.long()
    tiles = summary.log_weights.repeat_interleave(128, dim=2)[:, :, : order.shape[2]]
    weights = torch.zeros_like(tiles).scatter_(2, order[..., None].expand_as(tiles), tiles)
    return found, mask, (summary.keys, summary.values, weights)


def check_broken(ring: Ring) -> None:
    """A head with NaN on one process is dense on all, and says so."""
    layout = TokenLayout(grid=(3, 8, 8))
    query, key, value = (share(x, layout, ring) for x in tensors(layout))
    if ring.rank == ring.size - 1:
        key[:, 1, 3] = torch.nan
    found = attend_in_ring(SPARSE, query, key, value, ring=ring, layout=layout)
    assert found.broken is not None
    assert found.broken.tolist() == [[False, True]]
    assert found.density is not None
    assert found.density[0, 1] == 1
    assert found.out[:, 0].isfinite().all()


def check_steps(ring: Ring) -> None:
    """Steps go on from the centroids of the last; a session logs the calls."""
    layout = TokenLayout(grid=(3, 16, 16))
    session = Session(
        SPARSE, Schedule(dense_steps=0.25, dense_layers=0.0), layout=layout, num_steps=4,
        num_layers=1,
    )  # fmt: skip
    mine = [share(x, layout, ring) for x in tensors(layout)]
    exact = share(dense_attention(*tensors(layout)), layout, ring)
    for step in range(4):
        with session.step(step):
            out = session.attend(*mine, layer=0, ring=ring, out_layout="BSHD")
        assert out.transpose(1, 2).is_contiguous()
        if step == 0:
            torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5)
    records = session.records()
    assert [record.method for record in records] == ["Dense", "SVG2", "SVG2", "SVG2"]
    assert [record.density < 1 for record in records] == [False, True, True, True]
    assert records[0].tokens == layout.tokens
    memory = LayerMemory()
    attend(SPARSE, layout, ring, memory=memory)
    first = memory.key_centroids
    assert first is not None
    assert memory.query_centroids is not None
    assert memory.query_centroids.shape[2] == 6
    attend(SPARSE, layout, ring, memory=memory)
    assert memory.key_centroids is not None
    assert not torch.equal(memory.key_centroids, first)


def check_refusals(ring: Ring) -> None:
    layout = TokenLayout(grid=(3, 8, 8))
    error = {"compensate": True, "route": "error"}
    for method in (SVG1(), replace(SPARSE, **error), replace(SPARSE, repair_rows=8)):
        with pytest.raises(UnsupportedError, match="Ulysses"):
            attend(method, layout, ring)
    with pytest.raises(ValueError, match="192"):
        attend(replace(SPARSE, k_clusters=193), layout, ring)
    query = torch.zeros(1, 2, 5, 16)
    with pytest.raises(ValueError, match="tokens"):
        attend_in_ring(SPARSE, query, query, query, ring=ring, layout=layout)


def heads_here(heads: int, order: Tensor | None, *, deals: bool) -> HeadShare:
    """Return which heads of a layer this process has, of those that all processes share."""
    rank, size = dist.get_rank(), dist.get_world_size()
    counts = counts_of_heads(heads, size)

    def gather(x: Tensor) -> Tensor:
        most = x.new_zeros(x.shape[0], counts[0], *x.shape[2:])
        most[:, : x.shape[1]] = x
        parts = [torch.empty_like(most) for _ in range(size)]
        dist.all_gather(parts, most)
        return torch.cat([part[:, :n] for part, n in zip(parts, counts, strict=True)], dim=1)

    return HeadShare(
        first=sum(counts[:rank]), heads=heads, gather=gather, count=counts[rank], devices=size,
        order=order, deals=deals,
    )  # fmt: skip


def check_balance(ring: Ring) -> None:
    """Heads dealt by their cost: plain dealing is 1.3 or more off, this at most 1.05."""
    heads, layout = 24, TokenLayout(grid=(3, 16, 16))
    method = replace(SPARSE, k_clusters=48)
    query, key, value = tensors(layout, heads=heads)
    query = query * torch.linspace(2.0, 0.3, heads)[:, None, None]
    results: dict[str, list[Tensor]] = {}
    sessions = {}
    for way in ("alone", "plain", "dealt"):
        session = sessions[way] = Session(
            method, ALWAYS, layout=layout, num_steps=3, num_layers=1, seed=5
        )
        results[way] = []
        for step in range(3):
            call = Call(step=step, num_steps=3, layer=0, num_layers=1)
            noise = 0.05 * torch.randn(query.shape, generator=torch.Generator().manual_seed(step))
            given = (query + noise, key, value)
            if way == "alone":
                results[way].append(session.attend(*given, call=call))
                continue
            size = dist.get_world_size()
            order = session.head_order(call, size, query.device)
            assert (order is not None) == (way == "dealt" and step > 0)
            share = heads_here(heads, order, deals=way == "dealt")
            place = torch.arange(heads) if order is None else order
            out = session.attend(
                *(x[:, share.here(place)] for x in given), call=call, head_share=share
            )
            results[way].append(share.gather(out)[:, place.argsort()])
            assert session.head_order(call, size + 1, query.device) is None
    for way in ("plain", "dealt"):
        for found, expected in zip(results[way], results["alone"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for one, other in zip(sessions[way].records(), sessions["alone"].records(), strict=True):
            assert one.head_density == pytest.approx(other.head_density)
            assert one.density == pytest.approx(other.density)
    plain, dealt, alone = (
        [record.imbalance for record in sessions[way].records()]
        for way in ("plain", "dealt", "alone")
    )
    assert alone == [1.0] * 3
    assert min(plain) > 1.3, plain
    assert dealt[0] == pytest.approx(plain[0])
    assert max(dealt[1:]) <= 1.05, dealt


def check_shares(ring: Ring) -> None:
    """Shares are those of `torch.tensor_split`, or as many of its parts in a row as are asked."""
    for tokens in (1, 7, 48, 1000):
        for parts in (1, 2, 3):
            split = torch.arange(tokens).tensor_split(ring.size * parts)
            expected = [sum(map(len, split[n : n + parts])) for n in range(0, len(split), parts)]
            assert list(Ring(ring.group, parts=parts).shares(tokens)) == expected


CHECKS = (
    check_balance,
    check_shares,
    check_merge,
    check_dense,
    check_text,
    check_clusters,
    check_sparse,
    check_distance,
    check_plan,
    check_broken,
    check_steps,
    check_refusals,
)


def main() -> None:
    rank, size, where = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{where}", rank=rank, world_size=size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    group = None
    if size == 4:  # two rings beside each other, as under Ulysses
        groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
        group = groups[rank % 2]
    for check in CHECKS:
        check(Ring(group))
        print(check.__name__, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
