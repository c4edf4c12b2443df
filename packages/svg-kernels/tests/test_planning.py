from __future__ import annotations

import pytest
import torch

from svg_kernels import UnsupportedError, planning
from svg_kernels.attention.reference import read_mask


@pytest.fixture(
    params=["reference", "triton", pytest.param("gpu", marks=pytest.mark.gpu)],
)
def plan(request, device):
    """Return (function, backend): how to call an operation, interpreted or on a GPU."""
    if request.param == "triton":
        request.getfixturevalue("interpreted")
    return "triton" if request.param == "gpu" else request.param


def clusters(generator, device, *, batch=1, heads=2, tiles=3, count=30, ties=False):
    shape = (batch, heads, tiles, count)
    mass = torch.rand(shape, generator=generator, device=device) ** 4
    if ties:
        mass = (mass * 4).floor() + 1
    mass = mass / mass.sum(-1, keepdim=True)
    sizes = torch.randint(0, 9, (batch, heads, count), generator=generator, device=device)
    sizes[..., 3] = 40
    return mass, sizes.int()


def ranked(priority, sizes):
    """Yield (index, clusters by falling priority, empty ones left out) of every tile."""
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in priority.shape[:3])).tolist():
        row, size = priority[b, h, t].tolist(), sizes[b, h].tolist()
        order = sorted((c for c in range(len(row)) if size[c]), key=lambda c: (-row[c], c))
        yield (b, h, t), order, size


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("top_p", "floor"), [(0.9003, 4), (0.3003, 1), (1e-6, 1), (0.9993, 30)])
def test_top_p_keeps_the_shortest_prefix(plan, device, generator, ties, top_p, floor):
    mass, sizes = clusters(generator, device, ties=ties)
    priority = mass / sizes.clamp(min=1)[:, :, None]
    kept = planning.keep_top_p(priority, mass, sizes, top_p=top_p, min_clusters=floor, backend=plan)
    for place, order, _ in ranked(priority, sizes):
        want, total = set(), 0.0
        for rank, c in enumerate(order):
            if rank < max(floor, 1) or total < top_p:
                want.add(c)
            total += mass[(*place, c)].item()
        assert {c for c, k in enumerate(kept[place].tolist()) if k} == want


@pytest.mark.parametrize("ties", [False, True])
def test_budget_is_filled_and_not_passed(plan, device, generator, ties):
    priority, sizes = clusters(generator, device, ties=ties)
    budget = torch.tensor([0.0, 21.0, 90.0], device=device).expand(1, 2, 3)
    kept = planning.keep_budget(priority, sizes, budget, backend=plan)
    for place, order, size in ranked(priority, sizes):
        room = budget[place].item()
        want = []
        for c in order:
            if want and sum(size[w] for w in want) + size[c] > room:
                break
            want.append(c)
            if sum(size[w] for w in want) > room:
                break
        for _ in range(2):
            spare = room - sum(size[w] for w in want)
            for c in [c for c in order if c not in want and size[c] <= spare]:
                if size[c] > spare:
                    break
                want.append(c)
                spare -= size[c]
        assert {c for c, k in enumerate(kept[place].tolist()) if k} == set(want)


def test_runs_cover_the_chosen_clusters_and_nothing_else(plan, device, generator):
    mass, sizes = clusters(generator, device, batch=2, count=40)
    mask = torch.rand(mass.shape, generator=generator, device=device) < 0.4
    tail = torch.tensor([5, 0], device=device)
    ends = torch.cat([sizes.cumsum(-1), (sizes.sum(-1) + tail[:, None])[..., None]], -1).int()
    full = torch.zeros(2, 3, dtype=torch.bool, device=device)
    full[0, 2] = True
    starts, lengths = planning.merge_clusters(mask, ends, full=full, backend=plan)
    assert starts.shape == lengths.shape == (2, 2, 3, 21)
    rows = int(ends.max())
    covered = read_mask(starts, lengths, rows)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 3))).tolist():
        owner = torch.repeat_interleave(torch.arange(40), sizes[b, h].cpu()).to(device)
        want = torch.zeros(rows, dtype=torch.bool, device=device)
        want[: len(owner)] = mask[b, h, t][owner] | full[b, t]
        want[len(owner) : len(owner) + int(tail[b])] = True
        assert torch.equal(covered[b, h, t], want)
        used = lengths[b, h, t] > 0
        count = int(used.sum())
        assert used[:count].all()
        ends_of_runs = (starts + lengths)[b, h, t, :count]
        assert (starts[b, h, t, 1:count] > ends_of_runs[:-1]).all(), "touching runs are merged"
        assert (starts[b, h, t, count:] == 0).all()


@pytest.mark.parametrize("multiple", [1, 8])
def test_rounding_reads_more_and_nothing_twice(plan, device, generator, multiple):
    cuts = torch.rand(2, 2, 3, 100, generator=generator, device=device).argsort(-1)[..., :16]
    cuts = cuts.sort(-1).values.int()
    starts, lengths = cuts[..., 0::2].clone(), cuts[..., 1::2] - cuts[..., 0::2]
    lengths[0, 0, 1] = starts[0, 0, 1] = 0
    limit = torch.tensor([100, 101], dtype=torch.int32, device=device)
    new_starts, new_lengths = planning.round_runs(
        starts, lengths, multiple=multiple, limit=limit, backend=plan
    )
    old, new = read_mask(starts, lengths, 101), read_mask(new_starts, new_lengths, 101)
    assert (new | ~old).all()
    assert torch.equal(new.sum(-1), new_lengths.sum(-1)), "no row is in two runs"
    ends = new_starts + new_lengths
    reach = limit[:, None, None, None]
    assert (ends <= reach).all()
    assert ((new_lengths % multiple == 0) | (ends == reach)).all()
    # Only rows within `multiple` of what was asked for are added.
    near = torch.nn.functional.max_pool1d(
        old.float().flatten(0, 2)[:, None], 2 * multiple - 1, 1, multiple - 1
    )
    assert (near.view_as(old).bool() | ~new).all()


def test_long_tiles_are_started_first_and_heads_stay_together(plan, device):
    lengths = torch.tensor([[[[3, 0], [2, 0], [40, 50], [3, 0]], [[1, 0]] * 4]], device=device)
    order = planning.long_tiles_first(lengths.int(), backend=plan)
    assert order.dtype == torch.int32
    assert order.tolist() == [2, 0, 1, 3, 4, 5, 6, 7]


def test_long_tiles_keep_their_order_among_themselves(plan, device, generator):
    lengths = torch.randint(0, 50, (2, 3, 37, 4), generator=generator, device=device) ** 2
    order = planning.long_tiles_first(lengths.int(), ratio=1.2, backend=plan).view(6, 37)
    rows = lengths.sum(-1).flatten(0, 1).double()
    for head in range(6):
        long = (rows[head] > 1.2 * rows[head].mean()).tolist()
        want = sorted(range(37), key=lambda tile: not long[tile])
        assert (order[head] - head * 37).tolist() == want


def test_tiers_agree_at_the_size_of_a_model(device, generator, plan):
    mass, sizes = clusters(generator, device, batch=1, heads=1, tiles=2, count=1000)
    priority = mass / sizes.clamp(min=1)[:, :, None]
    budget = torch.full((1, 1, 2), 1500.0, device=device)
    for name, arguments in (
        ("keep_top_p", {"mass": mass, "top_p": 0.9, "min_clusters": 100}),
        ("keep_budget", {"budget": budget}),
    ):
        function = getattr(planning, name)
        got = function(priority, sizes=sizes, backend=plan, **arguments)
        want = function(priority, sizes=sizes, backend="reference", **arguments)
        # A sum in another order may move the cluster that crosses the threshold.
        assert (got != want).sum() <= 2


def test_wrong_arguments_are_named(generator):
    mass, sizes = clusters(generator, torch.device("cpu"))
    with pytest.raises(TypeError, match="sizes must be int32"):
        planning.keep_top_p(mass, mass, sizes.long(), top_p=0.5)
    with pytest.raises(ValueError, match="sizes must be"):
        planning.keep_budget(mass, sizes[..., :-1], mass[..., 0])
    with pytest.raises(ValueError, match="budget must be"):
        planning.keep_budget(mass, sizes, mass[0, ..., 0])
    with pytest.raises(ValueError, match="ends must be"):
        planning.merge_clusters(mass > 0, sizes)
    with pytest.raises(ValueError, match="limit must be"):
        planning.round_runs(sizes[None], sizes[None], multiple=8, limit=sizes[0, 0])
    with pytest.raises(ValueError, match="backend must be"):
        planning.keep_top_p(mass, mass, sizes, top_p=0.5, backend="cuda")


def test_a_tier_that_cannot_run_says_why(generator, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    planning._tiers._chosen.clear()
    mass, sizes = clusters(generator, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"CUDA device|not installed"):
        planning.keep_top_p(mass, mass, sizes, top_p=0.5, backend="triton")
