from __future__ import annotations

import pytest
import torch

from svg_attention.planning import reference
from svg_attention.planning.probes import probe_mass, probe_means


def draw_rows(generator, device, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def draw_order(generator, device, heads, rows, kept):
    order = torch.rand(2, heads, rows, generator=generator, device=device).argsort(-1)
    return order[..., :kept].int()


@pytest.mark.parametrize(
    ("kept", "probe_rows", "width"), [(300, 16, 12), (257, 128, 8), (128, 1, 4), (130, 32, 24)]
)
def test_probe_means_average_the_rows_of_a_probe(
    planner, device, generator, kept, probe_rows, width
):
    # Queries as a model keeps them, heads after tokens, with rows that no probe looks at.
    query = draw_rows(generator, device, 2, 310, 3, width).transpose(1, 2)
    order = draw_order(generator, device, 3, 310, kept)
    means = probe_means(query, order, probe_rows=probe_rows, backend=planner)
    tiles = (kept + 127) // 128
    assert means.shape == (2, 3, tiles * (128 // probe_rows), width)
    for b, h, p in torch.cartesian_prod(*(torch.arange(n) for n in means.shape[:3])).tolist():
        rows = order[b, h, p * probe_rows : (p + 1) * probe_rows].long()
        want = query[b, h, rows].double().mean(0) if len(rows) else torch.zeros(width).to(device)
        torch.testing.assert_close(means[b, h, p].double(), want.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("length", "probe_rows", "count"), [(300, 16, 70), (120, 1, 5), (257, 128, 33)]
)
@pytest.mark.parametrize("key_heads", [1, 2])
def test_probe_mass_is_the_average_share_of_every_key_at_its_centroid(
    planner, device, generator, length, probe_rows, count, key_heads
):
    tiles, probes = (length + 127) // 128, 128 // probe_rows
    means = draw_rows(generator, device, 2, 2, tiles * probes, 12) * 2
    centroids = draw_rows(generator, device, 2, key_heads, count, 12) * 2
    sizes = torch.randint(0, 9, (2, key_heads, count), generator=generator, device=device).int()
    sizes[..., 1], sizes[..., 2] = 0, 40
    mass = probe_mass(
        means, centroids, sizes, length=length, probe_rows=probe_rows, scale=0.4, backend=planner
    )
    assert mass.dtype == torch.float32
    assert mass.shape == (2, 2, tiles, count)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in mass.shape[:3])).tolist():
        key_head = h * key_heads // 2
        size = sizes[b, key_head].long()
        keys = centroids[b, key_head].double().repeat_interleave(size, dim=0)
        owner = torch.arange(count, device=device).repeat_interleave(size)
        share = torch.softmax(means[b, h].double() @ keys.T * 0.4, dim=-1)
        # Every row looks where its probe looks.
        row_share = share.repeat_interleave(probe_rows, dim=0)[:length][t * 128 : (t + 1) * 128]
        want = torch.zeros(count, dtype=torch.float64, device=device)
        want.index_add_(0, owner, row_share.mean(0))
        torch.testing.assert_close(mass[b, h, t].double(), want, rtol=2e-4, atol=1e-6)
        assert (mass[b, h, t][size == 0] == 0).all()
    worth = probe_mass(
        *(means, centroids, sizes), length=length, probe_rows=probe_rows, scale=0.4, per_key=True,
        backend=planner,
    )  # fmt: skip
    counts = sizes.clamp(min=1).repeat_interleave(2 // key_heads, dim=1)[:, :, None]
    torch.testing.assert_close(worth, mass / counts)


def test_probe_mass_stays_finite_at_logits_of_a_thousand(planner, device, generator):
    means = draw_rows(generator, device, 1, 1, 8, 16) * 300
    centroids = draw_rows(generator, device, 1, 1, 20, 16) * 10
    sizes = torch.ones(1, 1, 20, dtype=torch.int32, device=device)
    mass = probe_mass(means, centroids, sizes, length=128, scale=1.0, backend=planner)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass.sum(-1)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probe_mass_in_sixteen_bits_at_the_size_of_a_model(device, generator, dtype):
    query = draw_rows(generator, device, 1, 4, 5000, 128, dtype=dtype) * 2
    order = torch.rand(1, 4, 5000, generator=generator, device=device).argsort(-1).int()
    centroids = draw_rows(generator, device, 1, 2, 1000, 128, dtype=dtype)
    sizes = torch.randint(0, 90, (1, 2, 1000), generator=generator, device=device).int()
    means = probe_means(query, order, backend="triton")
    want = probe_means(query, order, backend="reference")
    assert (means.dtype, want.dtype) == (dtype, torch.float32)
    want = want.to(dtype)
    torch.testing.assert_close(means, want, rtol=1e-2, atol=1e-2)
    arguments = {"length": 5000, "scale": 128**-0.5}
    mass = probe_mass(want, centroids, sizes, backend="triton", **arguments)
    exact = probe_mass(want, centroids, sizes, backend="reference", **arguments)
    torch.testing.assert_close(mass, exact, rtol=2e-3, atol=1e-7)


def order_of(query, rows):
    """Return the first rows of every head in the given order."""
    return torch.arange(rows, dtype=torch.int32).expand(*query.shape[:2], rows)


@pytest.mark.parametrize("limit", [1, 2**26])
def test_probe_mass_averages_the_shares_of_a_tile(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "MASS_LOGITS", limit)
    query, centroids = torch.randn(2, 2, 300, 8), torch.randn(2, 2, 5, 8)
    sizes = torch.randint(1, 9, (2, 2, 5))
    mass = probe_mass(
        probe_means(query, order_of(query, 290), probe_rows=1),
        centroids,
        sizes.int(),
        length=290,
        probe_rows=1,
        scale=0.7,
    )
    weight = sizes.float().log()[:, :, None]
    rows = torch.softmax(query @ centroids.mT * 0.7 + weight, dim=-1)[:, :, :290]
    assert mass.shape == (2, 2, 3, 5)
    for tile, part in enumerate(rows.split(128, dim=2)):
        assert torch.allclose(mass[:, :, tile], part.mean(dim=2), atol=1e-6)


def test_probe_mass_of_finer_probes_sees_what_their_mean_hides() -> None:
    # Two kinds of queries that cancel in the mean, each with a cluster of its own.
    query = torch.tensor([9.0, -9.0]).repeat_interleave(64)[:, None].expand(128, 4)[None, None]
    centroids = torch.tensor([1.0, -1.0, 0.0])[:, None].expand(3, 4)[None, None]
    sizes = torch.tensor([[[8, 8, 8]]])

    def mass(rows: int) -> torch.Tensor:
        means = probe_means(query, order_of(query, 128), probe_rows=rows)
        return probe_mass(means, centroids, sizes.int(), length=128, probe_rows=rows, scale=0.5)[
            0, 0, 0
        ]

    assert torch.allclose(mass(128), torch.full((3,), 1 / 3))
    assert torch.allclose(mass(64), torch.tensor([0.5, 0.5, 0.0]), atol=1e-6)


def test_probe_means_average_a_partial_last_probe_over_its_own_rows() -> None:
    query = torch.randn(1, 2, 300, 4)
    means = probe_means(query, order_of(query, 290), probe_rows=64)
    assert means.shape == (1, 2, 6, 4)
    assert torch.allclose(means[:, :, 1], query[:, :, 64:128].mean(dim=2), atol=1e-6)
    assert torch.allclose(means[:, :, 4], query[:, :, 256:290].mean(dim=2), atol=1e-6)
    assert (means[:, :, 5] == 0).all()
    counts = reference.probe_counts(290, 64, query.device)
    assert counts.tolist() == [64, 64, 64, 64, 34, 0]
    whole = reference.tile_average(means, 290, 64)
    assert torch.allclose(
        whole, probe_means(query, order_of(query, 290), probe_rows=128), atol=1e-6
    )
    backwards = probe_means(query.flip(2), order_of(query, 300).flip(2)[:, :, :290], probe_rows=64)
    assert torch.equal(backwards, means)


def test_probe_mass_names_wrong_arguments(generator):
    query = torch.zeros(1, 2, 300, 8)
    order = torch.zeros(1, 2, 300, dtype=torch.int32)
    with pytest.raises(ValueError, match="probe_rows must divide 128"):
        probe_means(query, order, probe_rows=48)
    with pytest.raises(TypeError, match="order must be int32"):
        probe_means(query, order.long())
    with pytest.raises(ValueError, match="order must be"):
        probe_means(query, order[:, :1])
    means, centroids = torch.zeros(1, 2, 24, 8), torch.zeros(1, 1, 5, 8)
    sizes = torch.ones(1, 1, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match="512 rows are 32 probes of 16 rows, got 24"):
        probe_mass(means, centroids, sizes, length=512, scale=1.0)
    with pytest.raises(TypeError, match="sizes int32"):
        probe_mass(means, centroids, sizes.long(), length=300, scale=1.0)
    with pytest.raises(ValueError, match="sizes must be"):
        probe_mass(means, centroids, sizes[..., :4], length=300, scale=1.0)
    with pytest.raises(ValueError, match="centroids must be"):
        probe_mass(means, centroids[..., :4], sizes, length=300, scale=1.0)
