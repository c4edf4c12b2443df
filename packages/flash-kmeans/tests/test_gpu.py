"""The Triton backend on a GPU: every width, large sizes, graphs, no synchronisation."""

from __future__ import annotations

import pytest
import torch
import triton
from kmeans_oracles import blobs, check_bad_rows, check_offset, check_small_angles, regret, rounding

import flash_kmeans as fk
from flash_kmeans.triton import launch

pytestmark = pytest.mark.gpu

DIMS = (1, 2, 16, 17, 31, 64, 96, 100, 128, 257, 511, 513, 2048)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_assign_and_update_equal_the_reference(dim: int, dtype: torch.dtype, metric: str) -> None:
    x = blobs(2, 700, dim, 9, dtype=dtype).cuda()
    start = blobs(2, 70, dim, 9, seed=1, dtype=dtype).cuda()
    labels = fk.assign(x, start, metric=metric, backend="triton")
    assert (regret(x, start, labels, metric) <= rounding(x, start, metric)).all()
    expected = fk.update(
        x.double(), labels, 70, previous=start.double(), metric=metric, backend="reference"
    )
    ours = fk.update(x, labels, 70, previous=start, metric=metric, backend="triton")
    assert torch.equal(ours.order, expected.order)
    assert torch.equal(ours.sizes, expected.sizes)
    # The mean of n points, summed in fp32, is off by about sqrt(n) roundings of a point's size.
    summed = 2**-24 * float(expected.sizes.max()) ** 0.5 * float(x.abs().max())
    if metric == "cosine":
        summed = 2**-24 * float(expected.sizes.max()) ** 0.5
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        ours.centroids.double(), expected.centroids, rtol=eps, atol=eps * 2**-3 + summed
    )


def test_assign_is_not_disturbed_by_a_common_offset() -> None:
    x = (torch.randn(1, 65_536, 128, device="cuda") * 0.3 + 8).bfloat16()
    result = fk.kmeans(x, 64, max_iter=3, backend="triton")
    labels = fk.assign(x, result.centroids, backend="triton")
    wrong = (regret(x, result.centroids, labels) > 0).double().mean()
    assert wrong <= 0.005


@pytest.mark.parametrize("clusters", [65, 300, 1000, 4096, 8192])
def test_assign_is_right_in_both_kernels(clusters: int) -> None:
    x = torch.randn(3, 9000, 128, device="cuda", dtype=torch.float16)
    start = x[:, :clusters].contiguous()
    wide = torch.full((3, 9000, 136), torch.nan, device="cuda", dtype=torch.float16)
    wide[..., :128] = x
    # The video of sequences that end in text, and heads that share a token's row.
    gaps = torch.full((3, 9007, 128), torch.nan, device="cuda", dtype=torch.float16)
    gaps[:, :9000] = x
    heads = torch.full((9000, 4, 128), torch.nan, device="cuda", dtype=torch.float16)
    heads[:, :3] = x.transpose(0, 1)
    uneven = torch.empty(3 * 9001 * 128, device="cuda", dtype=torch.float16)
    uneven = uneven.as_strided(x.shape, (9000 * 128 + 8, 128, 1)).copy_(x)
    limit = rounding(x, start)
    layouts = (x, wide[..., :128], gaps[:, :9000], heads.transpose(0, 1)[:3], uneven)
    if torch.cuda.get_device_capability() == (9, 0) and triton.__version__.startswith("3.6"):
        suited = [launch.suits_hopper(points, clusters, "euclidean") for points in layouts]
        assert suited == [True] * 4 + [False]
    for points in layouts:
        labels = fk.assign(points, start, backend="triton")
        assert (regret(x, start, labels) <= limit).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("points", [5000, 50_000])
def test_kmeans_rounds_follow_each_other_as_calls_do(points: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, points, 128, device="cuda").to(dtype)
    start = x[:, :700].contiguous()
    result = fk.kmeans(x, 700, init=start, max_iter=3, backend="triton")
    current = start
    for _ in range(3):
        labels = fk.assign(x, current, backend="triton")
        last, update = current, fk.update(x, labels, 700, previous=current)
        current, sizes, order = update.centroids, update.sizes, update.order
    # A bias that an update writes may differ in its last digit from one that a call derives, and a
    # point that goes elsewhere for it moves two centroids, and some of their points with them.
    assert (regret(x, last, result.labels) > rounding(x, last)).double().mean() < 1e-3
    assert (labels != result.labels).double().mean() < 1e-3
    assert (sizes - result.sizes).abs().sum() <= 2 * int((labels != result.labels).sum())
    assert torch.equal(order.sort(1).values, result.order.sort(1).values)


def test_kmeans_never_synchronises_and_its_graph_replays() -> None:
    x = torch.randn(4, 20_000, 128, device="cuda", dtype=torch.bfloat16)
    start = x[:, :500].contiguous()
    expected = fk.kmeans(x, 500, init=start, max_iter=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fk.kmeans(x, 500, init=start, max_iter=2)
        fk.kmeans(x, 500, max_iter=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fk.kmeans(x, 500, init=start, max_iter=2)
    captured.labels.zero_()
    graph.replay()
    for name in ("labels", "centroids", "sizes", "order", "inertia"):
        assert torch.equal(getattr(captured, name), getattr(expected, name)), name


def test_kmeans_compiles_whole() -> None:
    x = torch.randn(2, 4000, 64, device="cuda", dtype=torch.bfloat16)

    def run(points: torch.Tensor) -> torch.Tensor:
        return fk.kmeans(points + 1, 30, init=points[:, :30] + 1, max_iter=2).centroids * 2

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(x), run(x))


def test_kmeans_is_bit_equal_from_run_to_run() -> None:
    x = torch.randn(2, 100_000, 96, device="cuda", dtype=torch.float16)
    start = x[:, :20].contiguous()
    one, two = (fk.kmeans(x, 20, init=start, max_iter=5, deterministic=True) for _ in range(2))
    for name in ("labels", "centroids", "inertia"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_kmeans_takes_more_batches_than_a_grid_axis_holds() -> None:
    x = torch.randn(70_000, 40, 16, device="cuda", dtype=torch.float16)
    result = fk.kmeans(x, 4, init=x[:, :4], max_iter=1)
    some = slice(69_000, 70_000)
    assert (
        regret(x[some], x[some, :4], result.labels[some]) <= rounding(x[some], x[some, :4])
    ).all()


def test_kmeans_takes_more_values_than_32_bits_count() -> None:
    points, dim = (1 << 31) // 64 + 4096, 64
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GB of device memory")
    x = torch.zeros(1, points, dim, device="cuda", dtype=torch.float16)
    x[:, -4096:] = torch.randn(1, 4096, dim, device="cuda", dtype=torch.float16)
    start = x[:, -16:].clone()
    result = fk.kmeans(x, 16, init=start, max_iter=1)
    tail = x[:, -4096:]
    assert (regret(tail, start, result.labels[:, -4096:]) <= rounding(tail, start)).all()
    by_label = result.labels[0].gather(0, result.order[0].long())
    assert (by_label.diff() >= 0).all()


def test_update_takes_more_clusters_than_counters() -> None:
    x = torch.randn(1, 600_000, 8, device="cuda", dtype=torch.float16)
    clusters = 300_000
    labels = torch.randint(0, clusters, (1, 600_000), device="cuda", dtype=torch.int32)
    arguments = {"previous": x[:, :clusters].contiguous()}
    ours = fk.update(x, labels, clusters, backend="triton", **arguments)
    theirs = fk.update(x, labels, clusters, backend="reference", **arguments)
    assert torch.equal(ours.order, theirs.order)
    torch.testing.assert_close(ours.centroids, theirs.centroids, rtol=2e-3, atol=2e-3)


def test_kmeans_stream_equals_in_memory_through_pinned_buffers() -> None:
    x = torch.randn(100_000, 64, dtype=torch.float16)
    whole = fk.kmeans(x.cuda(), 50, init=x[:50].cuda(), max_iter=3)
    parts = fk.kmeans_stream(
        x, 50, init=x[:50], max_iter=3, chunk_rows=7000, device="cuda", progress=False
    )
    assert (parts.labels != whole.labels.cpu()).double().mean() < 1e-3
    torch.testing.assert_close(parts.centroids, whole.centroids, rtol=1e-2, atol=1e-2)
    assert parts.inertia == pytest.approx(float(whole.inertia), rel=1e-3)


def test_kmeans_keeps_labels_in_range_on_bad_points() -> None:
    x = torch.full((1, 1000, 128), torch.nan, device="cuda", dtype=torch.float16)
    result = fk.kmeans(x, 100, init=x[:, :100], max_iter=2)
    assert ((result.labels >= 0) & (result.labels < 100)).all()
    assert torch.isnan(result.inertia).all()
    with pytest.raises(ValueError, match="finite"):
        fk.kmeans(x, 100, tol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("empty", ["keep", "farthest"])
def test_lloyd_keeps_bad_rows_to_themselves(dtype: torch.dtype, empty: str) -> None:
    check_bad_rows("triton", dtype, empty, "cuda")
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES)
def test_assign_keeps_bad_rows_to_themselves_in_both_kernels(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5000, 128, device="cuda").to(dtype)
    start = x[:, :300].clone()
    expected = fk.assign(x, start, backend="triton")
    others = [k for k in range(300) if k not in (0, 7, 64)]
    names = torch.tensor(others, device="cuda", dtype=torch.int32)
    without = names[fk.assign(x, start[:, others], backend="triton").long()]
    x[1, 4321, 5], x[1, 17] = torch.nan, torch.inf
    start[1, 0, 3], start[1, 7], start[1, 64, 9] = torch.nan, torch.inf, -torch.inf
    labels = fk.assign(x, start, backend="triton")
    assert ((labels >= 0) & (labels < 300)).all()
    assert torch.equal(labels[0], expected[0])
    rows = torch.isfinite(x[1]).all(-1)
    assert torch.equal(labels[1, rows], without[1, rows])
    torch.cuda.synchronize()


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6, 1e7])
def test_kmeans_of_points_with_an_offset(offset: float) -> None:
    check_offset(offset, "triton", "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_kmeans_keeps_the_digits_of_small_angles(dtype: torch.dtype) -> None:
    check_small_angles("triton", dtype, "cuda")


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_kmeans_shows_bad_weights_as_nan_inertia(bad: float) -> None:
    x = torch.randn(2, 500, 16, device="cuda", dtype=torch.float16)
    weight = torch.ones(2, 500, device="cuda")
    expected = fk.kmeans(x, 9, init=x[:, :9], max_iter=3, sample_weight=weight)
    weight[1, 77] = bad
    result = fk.kmeans(x, 9, init=x[:, :9], max_iter=3, sample_weight=weight)
    assert torch.isnan(result.inertia[1])
    assert torch.equal(result.inertia[0], expected.inertia[0])
    assert torch.equal(result.labels[0], expected.labels[0])
    assert torch.isfinite(result.centroids).all()
    with pytest.raises(ValueError, match="sample_weight"):
        fk.kmeans(x, 9, sample_weight=weight, tol=1e-4)


def test_kmeans_stream_reads_integers_and_draws_a_scalable_start() -> None:
    x = torch.randint(0, 256, (50_000, 32), dtype=torch.uint8)
    start = x[:20].float()
    whole = fk.kmeans(x.float().cuda(), 20, init=start.cuda(), max_iter=3)
    parts = fk.kmeans_stream(x, 20, init=start, max_iter=3, chunk_rows=7000, progress=False)
    assert (parts.labels != whole.labels.cpu()).double().mean() < 1e-3
    assert parts.inertia == pytest.approx(float(whole.inertia), rel=1e-5)
    drawn = fk.kmeans_stream(x, 20, init="k-means||", max_iter=3, progress=False)
    assert drawn.inertia == pytest.approx(parts.inertia, rel=0.05)


def test_kmeans_bounds_sizes() -> None:
    x = torch.randn(2, 4000, 16, device="cuda") * 0.01
    x[:, :100] = torch.randn(2, 100, 16, device="cuda") * 10
    result = fk.kmeans(x, 40, init="k-means++", max_iter=5, max_size_ratio=1.5)
    assert int(result.sizes.max()) <= 150
    assert torch.isfinite(result.inertia).all()
