from __future__ import annotations

import importlib.util

import pytest
import torch

from svg_attention import TokenLayout, planner, runs
from svg_attention.methods import profile, routing, selection
from svg_attention.methods.band import Band
from svg_attention.methods.clustering import Clusters
from svg_attention.planner import device_planner, device_prober

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("svg_kernels") is None, reason="svg-kernels is not installed"
)


@pytest.fixture
def both(monkeypatch):
    """Return a function that runs another in plain torch, then with the planner of svg_kernels.

    On a CPU the planner computes with its own reference: what is tested is that it means the same.
    """

    def run(function, *args, **kwargs):
        from svg_kernels import planning

        results = []
        for found in (None, planning):
            for module in (runs, selection, routing, profile):
                for name in ("device_planner", "device_prober"):
                    if hasattr(module, name):
                        monkeypatch.setattr(module, name, lambda _, found=found: found)
            results.append(function(*args, **kwargs))
        return results

    return run


def choice(generator, device, *, heads=2, tiles=3, count=50):
    shape = (2, heads, tiles, count)
    mass = torch.rand(shape, generator=generator, device=device).softmax(-1)
    sizes = torch.randint(0, 20, (2, heads, count), generator=generator, device=device)
    return mass, sizes.int()


def test_a_cpu_plans_in_plain_torch():
    assert device_planner(torch.zeros(1)) is None
    assert device_prober(torch.zeros(1, 64)) is None


def test_rows_that_no_kernel_takes_are_probed_in_plain_torch(monkeypatch):
    monkeypatch.setattr(planner, "device_planner", lambda _: planner)
    assert device_prober(torch.zeros(1, 256)) is planner
    assert device_prober(torch.zeros(1, 257)) is None
    assert device_prober(torch.zeros(1, 64, dtype=torch.float64)) is None


@pytest.mark.parametrize("min_keep", [0.0, 0.1])
def test_top_p(both, device, generator, min_keep):
    mass, sizes = choice(generator, device)
    plain, planned = both(selection.keep_top_p, mass, sizes, top_p=0.6, min_keep=min_keep)
    assert torch.equal(plain, planned)


def test_budget(both, device, generator):
    mass, sizes = choice(generator, device)
    budget = torch.tensor([100.0, 3.0], dtype=torch.float64, device=device)[:, None, None]
    plain, planned = both(selection.keep_budget, mass, sizes, budget)
    assert torch.equal(plain, planned)


@pytest.mark.parametrize("full", [None, "batch", "head"])
def test_runs_of_clusters(both, device, generator, full):
    mass, sizes = choice(generator, device)
    tail = torch.tensor([7, 0], dtype=torch.int32, device=device)
    if full is not None:
        shape = (2, 1 if full == "batch" else 2, 3)
        full = torch.rand(shape, generator=generator, device=device) < 0.5
    plain, planned = both(runs.cluster_runs, mass > mass.mean(), sizes, tail=tail, full=full)
    assert torch.equal(plain[0], planned[0])
    assert torch.equal(plain[1], planned[1])


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("probe_rows", [16, 128])
def test_estimated_mass(both, device, generator, probe_rows, key_heads):
    query = torch.randn(2, 2, 310, 16, generator=generator, device=device)
    centroids = torch.randn(2, key_heads, 20, 16, generator=generator, device=device)
    sizes = torch.randint(0, 20, (2, key_heads, 20), generator=generator, device=device)
    order = torch.rand(2, 2, 300, generator=generator, device=device).argsort(-1).int()

    def mass():
        means = selection.probe_means(query, order, probe_rows)
        return selection.estimated_mass(means, centroids, sizes, 0.5, 300, probe_rows)

    plain, planned = both(mass)
    torch.testing.assert_close(plain, planned, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("key_heads", [1, 2])
def test_error_of_the_centroids(both, device, generator, key_heads):
    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    sizes = torch.randint(0, 20, (2, key_heads, 20), generator=generator, device=device).int()
    rows = int(sizes.sum(-1).max())
    sizes[..., 5] += rows - sizes.sum(-1).int()
    order = torch.rand(2, key_heads, rows, generator=generator, device=device).argsort(-1).int()
    found = Clusters(
        labels=torch.empty_like(order),
        centroids=normal(2, key_heads, 20, 16) * 0.2,
        sizes=sizes,
        order=order,
    )
    keys, values = normal(2, key_heads, rows, 16), normal(2, key_heads, rows, 8)
    # Constants are taken from the clusters' means, so those have to be true.
    owner = torch.arange(20, device=device).expand(2, key_heads, 20).flatten(0, 1)
    owner = torch.stack(
        [o.repeat_interleave(n) for o, n in zip(owner, sizes.flatten(0, 1), strict=True)]
    )
    share = torch.nn.functional.one_hot(owner, 20).float().mT
    share = share / share.sum(-1, keepdim=True).clamp(min=1)
    sorted_values = values.gather(2, order.long()[..., None].expand_as(values))
    value_means = share.view(2, key_heads, 20, rows) @ sorted_values
    means = normal(2, 2, 24, 16)

    def errors():
        return routing.centroid_error(means, keys, values, found, value_means, 0.5, 300, 16)

    plain, planned = both(errors)
    torch.testing.assert_close(plain, planned, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("position", ["first", "last"])
def test_profile_of_the_bands(both, device, generator, position):
    layout = TokenLayout(grid=(5, 8, 9), text_tokens=7, text_position=position)
    query, key, value = (
        torch.randn(2, h, layout.tokens, 16, generator=generator, device=device) for h in (4, 2, 2)
    )
    text = torch.tensor([3, 7], dtype=torch.int32, device=device)
    bands = tuple(
        Band(layout=layout, temporal=t, text=text, width=torch.tensor([40, 9], device=device))
        for t in (False, True)
    )
    rows = torch.randint(layout.video_tokens, (20,), generator=generator, device=device)
    plain, planned = both(profile.pattern_errors, query, key, value, rows, bands, 0.3)
    torch.testing.assert_close(torch.stack(plain), torch.stack(planned), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("limits", [1, 2])
def test_rounding(both, device, generator, limits):
    mass, sizes = choice(generator, device)
    (starts, lengths), _ = both(runs.cluster_runs, mass > mass.mean(), sizes)
    limit = sizes.sum(-1).amax().expand(limits)[:, None, None, None]
    plain, planned = both(runs.round_runs, starts, lengths, multiple=8, limit=limit)
    assert torch.equal(plain[0], planned[0])
    assert torch.equal(plain[1], planned[1])


@pytest.mark.gpu
def test_kernels_plan_what_torch_plans(both, device, generator):
    mass, sizes = choice(generator, device, count=1000, tiles=20)
    assert device_planner(mass) is not None
    budget = torch.full((1, 1, 1), 2000.0, device=device)
    plain, planned = both(selection.keep_budget, mass, sizes, budget)
    assert torch.equal(plain, planned)
    starts, lengths = both(runs.cluster_runs, plain, sizes)
    assert torch.equal(torch.stack(starts), torch.stack(lengths))
    plain, planned = both(selection.keep_top_p, mass, sizes, top_p=0.9, min_keep=0.1)
    # Sums in another order: the cluster that crosses the threshold may be the next one.
    assert (plain != planned).sum(-1).max() <= 2
