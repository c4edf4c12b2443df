"""The Triton backend: its kernels in the interpreter, at toy sizes (fp16 and fp32 only)."""

from __future__ import annotations

import pytest
import torch
from kmeans_oracles import blobs, check_bad_rows, check_offset, check_small_angles, regret, rounding

import flash_kmeans as fk
from flash_kmeans import common

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize(
    ("dtype", "metric", "dim"),
    [
        (torch.float16, "euclidean", 5),
        (torch.float16, "cosine", 17),
        (torch.float32, "euclidean", 16),
        (torch.float32, "dot", 1),
    ],
)
def test_assign_maximises_the_score(dtype: torch.dtype, metric: str, dim: int) -> None:
    x = blobs(2, 21, dim, 5, dtype=dtype)
    centroids = blobs(2, 7, dim, 5, seed=1, dtype=dtype)
    labels = fk.assign(x, centroids, metric=metric, backend="triton")
    assert (regret(x, centroids, labels, metric) <= rounding(x, centroids, metric)).all()


def test_assign_loops_over_features_beyond_one_tile() -> None:
    x = blobs(1, 9, 550, 3, dtype=torch.float16)
    centroids = blobs(1, 3, 550, 3, seed=1, dtype=torch.float16)
    labels = fk.assign(x, centroids, backend="triton")
    assert (regret(x, centroids, labels) <= rounding(x, centroids)).all()


def test_assign_takes_the_lowest_of_equal_centroids() -> None:
    x = blobs(1, 12, 4, 2)
    centroids = x[:, :1].expand(-1, 40, -1)
    labels = fk.assign(x, centroids, backend="triton")
    assert (labels == 0).all()


@pytest.mark.parametrize(("points", "clusters"), [(1, 1), (63, 5), (300, 3), (70, 70)])
@pytest.mark.parametrize("weighted", [False, True])
def test_update_equals_the_reference(points: int, clusters: int, weighted: bool) -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2, points, 6, generator=source).half()
    # Skewed on purpose: most points in the last cluster, some clusters empty.
    labels = torch.randint(0, clusters, (2, points), generator=source)
    labels[:, points // 3 :] = clusters - 1
    previous = torch.randn(2, clusters, 6, generator=source).half()
    weight = torch.rand(2, points, generator=source) if weighted else None
    ours, theirs = (
        fk.update(x, labels, clusters, previous=previous, sample_weight=weight, backend=backend)
        for backend in ("triton", "reference")
    )
    assert torch.equal(ours.order, theirs.order)
    assert torch.equal(ours.sizes, theirs.sizes)
    torch.testing.assert_close(ours.centroids, theirs.centroids, rtol=2e-3, atol=1e-4)


def test_update_skips_runs_of_empty_clusters() -> None:
    # Three of 90 clusters have points, over several spans, and the last has some.
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, 4, generator=source).half()
    labels = torch.tensor([3, 40, 89])[torch.randint(0, 3, (2, 300), generator=source)]
    previous = torch.randn(2, 90, 4, generator=source).half()
    ours, theirs = (
        fk.update(x, labels, 90, previous=previous, backend=b) for b in ("triton", "reference")
    )
    assert torch.equal(ours.order, theirs.order)
    torch.testing.assert_close(ours.centroids, theirs.centroids, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_Updater_move_aims_the_next_assignment(metric: str) -> None:
    from flash_kmeans.triton.assigner import assigner_for
    from flash_kmeans.triton.updater import Updater

    x = blobs(2, 50, 6, 4, dtype=torch.float16)
    centroids = blobs(2, 20, 6, 4, seed=1, dtype=torch.float16)
    # One that is not finite, and one that stays where it is for lack of points.
    centroids[1, 3, 2], centroids[0, 7] = torch.nan, 0
    label, fresh = (assigner_for(x, 20, metric) for _ in range(2))
    label.aim(centroids)
    labels = label().clone()
    labels[labels == 7] = 5
    updater = Updater(x, 20, metric, *common.point_weights(x, metric, None))
    for round_ in range(2):
        updater.move(labels, centroids, assigner=label)
        fresh.aim(centroids)
        for name in ("directions", "bias", "scale"):
            ours, theirs = getattr(label, name), getattr(fresh, name)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, msg=f"{name} {round_}")
        assert torch.isinf(label.bias[1, 3])
        assert (updater.arrived == 0).all()
        ends = torch.nn.functional.pad(updater.sizes.cumsum(1), (1, 0))
        assert torch.equal(updater.starts, ends.int())


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((3, 7, 4), (28, 4, 1), (21, 4, 7, 0)),
        ((3, 7, 4), (40, 4, 1), (27, 4, 10, 0)),
        ((3, 7, 4), (36, 4, 1), (25, 4, 9, 0)),
        ((1, 7, 4), (999, 8, 1), (7, 4, 0, 0)),
        ((3, 7, 4), (4, 12, 1), (7, 12, 0, 4)),
        ((3, 7, 4), (4, 20, 1), (7, 12, 0, 4)),
        ((3, 7, 4), (30, 4, 1), None),
        ((3, 7, 4), (28, 0, 1), None),
        ((3, 7, 4), (0, 4, 1), (7, 4, 0, 0)),
    ],
)
def test_sheet_finds_every_batch(
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    expected: tuple[int, int, int, int] | None,
) -> None:
    from flash_kmeans.triton.assigner import sheet

    x = torch.arange(999.0).as_strided(shape, strides)
    found = sheet(x)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert (found.rows, found.columns, found.row_step, found.column_step) == expected
    matrix = x.as_strided((found.rows, found.columns), (x.stride(1), 1))
    for b in range(shape[0]):
        rows = slice(b * found.row_step, b * found.row_step + shape[1])
        columns = slice(b * found.column_step, b * found.column_step + shape[2])
        assert torch.equal(matrix[rows, columns], x[b])


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_kmeans_equals_the_reference(metric: str) -> None:
    x = blobs(2, 24, 6, 4)
    weight = torch.rand(2, 24, generator=torch.Generator().manual_seed(2))
    ours, theirs = (
        fk.kmeans(
            x, 4, init=x[:, :4], metric=metric, max_iter=2, sample_weight=weight, backend=backend
        )
        for backend in ("triton", "reference")
    )
    assert torch.equal(ours.labels, theirs.labels)
    torch.testing.assert_close(ours.centroids, theirs.centroids)
    torch.testing.assert_close(ours.inertia, theirs.inertia, rtol=1e-4, atol=1e-4)


def test_kmeans_of_a_strided_view_equals_its_copy() -> None:
    x = blobs(2, 24, 8, 3)
    wide = torch.full((2, 30, 16), torch.nan)
    wide[:, 3:27, :8] = x
    view = wide[:, 3:27, :8]
    ours = fk.kmeans(view, 3, init=x[:, :3], max_iter=2, backend="triton")
    theirs = fk.kmeans(x, 3, init=x[:, :3], max_iter=2, backend="triton")
    assert torch.equal(ours.labels, theirs.labels)
    assert torch.equal(ours.centroids, theirs.centroids)


def test_assign_refuses_bfloat16_in_the_interpreter() -> None:
    x = blobs(1, 8, 4, 2, dtype=torch.bfloat16)
    with pytest.raises(fk.UnsupportedError, match="bfloat16"):
        fk.assign(x, x[:, :2], backend="triton")


@pytest.mark.parametrize("offset", [1e6, 1e7])
def test_kmeans_of_points_with_an_offset(offset: float) -> None:
    check_offset(offset, "triton", n=40)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kmeans_keeps_the_digits_of_small_angles(dtype: torch.dtype) -> None:
    check_small_angles("triton", dtype, n=40)


def test_assign_of_many_features_with_an_offset() -> None:
    x = blobs(1, 9, 300, 3) + 1e5
    labels = fk.assign(x, x[:, :3], backend="triton")
    assert torch.equal(labels, fk.assign(x.double(), x[:, :3].double()))


@pytest.mark.parametrize(("dtype", "empty"), [(torch.float16, "keep"), (torch.float32, "farthest")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_lloyd_keeps_bad_rows_to_themselves(dtype: torch.dtype, empty: str) -> None:
    check_bad_rows("triton", dtype, empty)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_assign_lets_a_bad_centroid_attract_nothing(metric: str, bad: float) -> None:
    x = blobs(1, 20, 6, 5, dtype=torch.float16)
    centroids = blobs(1, 40, 6, 5, seed=1, dtype=torch.float16)
    rest = [k for k in range(40) if k not in (0, 3, 17)]
    expected = torch.tensor(rest)[fk.assign(x, centroids[:, rest], metric=metric).long()]
    centroids[0, 0, 1], centroids[0, 3], centroids[0, 17, 5] = bad, bad, -bad
    labels = fk.assign(x, centroids, metric=metric, backend="triton")
    assert torch.equal(labels, expected.int())


def test_assign_in_range_where_every_centroid_is_bad() -> None:
    x = blobs(1, 20, 6, 5, dtype=torch.float16)
    labels = fk.assign(x, torch.full((1, 40, 6), torch.nan), backend="triton")
    assert ((labels >= 0) & (labels < 40)).all()


def test_kmeans_equals_the_reference_on_zero_points_and_weights() -> None:
    x = blobs(2, 24, 6, 4)
    x[:, 5] = 0
    weight = torch.rand(2, 24, generator=torch.Generator().manual_seed(2))
    weight[:, 8:10] = 0
    ours, theirs = (
        fk.kmeans(
            x,
            4,
            init=x[:, :4],
            metric="cosine",
            max_iter=2,
            sample_weight=weight,
            empty="farthest",
            backend=backend,
        )
        for backend in ("triton", "reference")
    )
    assert torch.equal(ours.labels, theirs.labels)
    torch.testing.assert_close(ours.centroids, theirs.centroids)
    torch.testing.assert_close(ours.inertia, theirs.inertia)


def test_update_takes_fewer_points_than_clusters() -> None:
    previous = blobs(1, 9, 4, 3)
    x = previous[:, :2] + 1
    labels = torch.tensor([[5, 5]])
    ours, theirs = (
        fk.update(x, labels, 9, previous=previous, backend=b) for b in ("triton", "reference")
    )
    assert torch.equal(ours.centroids, theirs.centroids)
    assert torch.equal(ours.sizes, theirs.sizes)
