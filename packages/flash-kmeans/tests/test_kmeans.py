"""The reference backend through the public functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kmeans_oracles import (
    blobs,
    check_bad_rows,
    check_offset,
    check_small_angles,
    means,
    regret,
    rounding,
)

import flash_kmeans as fk
from flash_kmeans import common, reference

METRICS = ("euclidean", "cosine", "dot")
DIMS = (1, 2, 16, 17, 31, 64, 96, 100, 128, 257, 511, 513, 2048)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", DIMS)
def test_assign_maximises_the_score_for_every_width(dim: int, metric: str) -> None:
    x = blobs(2, 63, dim, 7, dtype=torch.bfloat16)
    centroids = blobs(2, 9, dim, 7, seed=1, dtype=torch.bfloat16)
    labels = fk.assign(x, centroids, metric=metric, backend="reference")
    assert labels.dtype == torch.int32
    assert (regret(x, centroids, labels, metric) <= rounding(x, centroids, metric)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_kmeans_returns_fields_that_describe_one_state(dtype: torch.dtype) -> None:
    x = blobs(3, 200, 12, 5, dtype=dtype)
    result = fk.kmeans(x, 11, max_iter=4, backend="reference")
    assert result.n_iter == 4
    assert result.centroids.dtype == dtype
    counts = torch.stack([torch.bincount(row, minlength=11) for row in result.labels])
    assert torch.equal(result.sizes, counts.int())
    by_label = result.labels.sort(dim=1, stable=True)
    assert torch.equal(result.order, by_label.indices.int())
    expected = means(x, result.labels, result.centroids)
    torch.testing.assert_close(result.centroids, expected.to(dtype))
    cost = -2 * regret_free_score(x, result)
    torch.testing.assert_close(result.inertia.double(), cost, rtol=1e-5, atol=0)


def regret_free_score(x: torch.Tensor, result: fk.KMeansResult) -> torch.Tensor:
    own = result.centroids.double().gather(
        1, result.labels.long().unsqueeze(-1).expand(-1, -1, x.shape[-1])
    )
    return -(x.double() - own).square().sum((1, 2)) / 2


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_kmeans_never_raises_inertia(metric: str) -> None:
    x = blobs(2, 400, 6, 9)
    init = x[:, :9].clone()
    costs = torch.stack(
        [fk.kmeans(x, 9, init=init, metric=metric, max_iter=i).inertia for i in range(1, 9)]
    )
    assert (costs[1:] <= costs[:-1] * (1 + 1e-6)).all()
    assert (costs[-1] < costs[0]).all()


def test_assign_is_not_disturbed_by_a_common_offset() -> None:
    source = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 8192, 128, generator=source) * 0.3 + 8).bfloat16()
    result = fk.kmeans(x, 64, max_iter=3, generator=source, backend="reference")
    labels = fk.assign(x, result.centroids, backend="reference")
    wrong = (regret(x, result.centroids, labels) > 0).double().mean()
    assert wrong <= 0.005


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6, 1e7])
def test_kmeans_of_points_with_an_offset(offset: float) -> None:
    check_offset(offset, "reference")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kmeans_keeps_the_digits_of_small_angles(dtype: torch.dtype) -> None:
    check_small_angles("reference", dtype)


@pytest.mark.parametrize("empty", ["keep", "farthest"])
def test_lloyd_keeps_bad_rows_to_themselves(empty: str) -> None:
    check_bad_rows("reference", torch.float32, empty)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_lloyd_keeps_centroids_finite_whatever_the_metric(metric: str) -> None:
    x = blobs(1, 40, 4, 3)
    x[0, 7, 1] = torch.nan
    labels, centroids, *_ = reference.lloyd(x, x[:, :3], None, metric, "keep", 3, False)  # type: ignore[arg-type]
    assert ((labels >= 0) & (labels < 3)).all()
    assert torch.isfinite(centroids).all()


def test_kmeans_takes_half_precision_points_whose_squared_norm_overflows() -> None:
    x = (blobs(1, 300, 64, 4) * 40 + 200).half()
    assert torch.isinf((x * x).sum(-1)).all()
    result = fk.kmeans(x, 4, max_iter=5, init="k-means++", backend="reference")
    assert (regret(x, result.centroids, fk.assign(x, result.centroids)) == 0).float().mean() > 0.99
    assert torch.isfinite(result.inertia).all()


def test_kmeans_of_one_cluster_is_the_mean_and_of_as_many_as_points_costs_nothing() -> None:
    x = blobs(2, 33, 5, 3)
    single = fk.kmeans(x, 1, max_iter=1)
    torch.testing.assert_close(single.centroids[:, 0], x.mean(1))
    every = fk.kmeans(x, 33, max_iter=2)
    assert torch.equal(every.sizes, torch.ones_like(every.sizes))
    assert (every.inertia == 0).all()
    lone = fk.kmeans(x[:, :1], 1, max_iter=3)
    assert torch.equal(lone.centroids, x[:, :1])


def test_kmeans_keeps_the_centroid_of_an_empty_cluster() -> None:
    x = blobs(2, 50, 4, 2)
    init = torch.cat([x[:, :3], torch.full((2, 2, 4), 1e4)], dim=1)
    result = fk.kmeans(x, 5, init=init, max_iter=3)
    assert torch.equal(result.sizes[:, 3:], torch.zeros(2, 2, dtype=torch.int32))
    assert torch.equal(result.centroids[:, 3:], init[:, 3:])


@pytest.mark.parametrize("metric", METRICS)
def test_kmeans_moves_empty_clusters_to_the_farthest_points(metric: str) -> None:
    x = blobs(2, 60, 4, 6)
    far = -1e3 if metric == "dot" else 1e3
    init = torch.cat([x[:, :2], far * x[:, :2].mean(1, keepdim=True).expand(-1, 4, -1)], dim=1)
    kept = fk.kmeans(x, 6, init=init, max_iter=6, metric=metric)
    moved = fk.kmeans(x, 6, init=init, max_iter=6, metric=metric, empty="farthest")
    if metric == "euclidean":
        assert (kept.sizes == 0).any()
        assert (moved.sizes > 0).all()
        assert (moved.inertia < kept.inertia).all()
    expected = means(x, moved.labels, moved.centroids)
    if metric != "cosine":
        torch.testing.assert_close(moved.centroids.double(), expected, rtol=1e-5, atol=1e-5)


def test_update_with_ten_clusters_that_hold_nearly_all_points() -> None:
    source = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 10, (2, 5000), generator=source)
    labels[:, :50] = torch.randint(10, 100, (2, 50), generator=source)
    x = torch.randn(2, 5000, 8, generator=source)
    previous = torch.randn(2, 100, 8, generator=source)
    out = fk.update(x, labels, 100, previous=previous)
    torch.testing.assert_close(
        out.centroids.double(), means(x, labels, previous), rtol=1e-5, atol=1e-5
    )


def test_kmeans_gives_empty_clusters_no_point_of_weight_zero() -> None:
    x = torch.tensor([[0.0], [0.1], [5.0], [5.1], [9.0], [9.1], [100.0]])
    start = torch.tensor([[0.0], [5.0], [100.0]])
    weight = [1, 1, 1, 1, 1, 1, 0]
    for tol in (0.0, 1e-6):
        options = {"init": start, "max_iter": 9, "tol": tol, "empty": "farthest"}
        weighted = fk.kmeans(x, 3, sample_weight=weight, **options)
        without = fk.kmeans(x[:6], 3, **options)
        assert float(weighted.inertia) == pytest.approx(0.015, rel=1e-5)
        torch.testing.assert_close(weighted.inertia, without.inertia)
        torch.testing.assert_close(weighted.centroids, without.centroids)


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf, 1e39])
@pytest.mark.parametrize("tol", [0.0, 1e-4])
def test_kmeans_and_update_refuse_bad_weights(bad: float, tol: float) -> None:
    x = blobs(1, 20, 2, 3)[0]
    weight = torch.ones(20, dtype=torch.float64)
    weight[7] = bad
    with pytest.raises(ValueError, match=r"sample_weight must hold finite weights of at least 0"):
        fk.kmeans(x, 3, sample_weight=weight, tol=tol)
    labels = torch.zeros(20, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"sample_weight must hold finite weights"):
        fk.update(x, labels, 3, previous=x[:3], sample_weight=weight)


@pytest.mark.parametrize(
    "kind", [np.asarray, torch.Tensor.tolist, lambda t: t.numpy().astype(">f8")]
)
def test_kmeans_takes_arrays_as_weights_and_starts(kind) -> None:  # type: ignore[no-untyped-def]
    x = blobs(1, 20, 2, 3)[0]
    weight, start = torch.arange(20) % 3 + 0.5, x[:3].clone()
    expected = fk.kmeans(x, 3, init=start, sample_weight=weight)
    found = fk.kmeans(x, 3, init=kind(start), sample_weight=kind(weight))
    assert torch.equal(found.centroids, expected.centroids)
    labels = fk.assign(x, kind(expected.centroids))
    assert torch.equal(labels, fk.assign(x, expected.centroids))
    moved = fk.update(x, labels, 3, previous=kind(start), sample_weight=kind(weight))
    assert torch.equal(moved.centroids, expected.centroids)


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_in_bags_equal_sums_in_turn(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "VALUES_AT_ONCE", {"cpu": 64, "cuda": 64})
    x = blobs(1, 100, 5, 3)[0]
    labels = (torch.arange(100) ** 2 % 7).sort().values  # 3, 5 and 6 are empty
    factor = torch.rand(100, generator=torch.Generator().manual_seed(0)) if weighted else None
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    turned = torch.empty_like(x).index_copy_(0, order, x)
    moved = None if factor is None else torch.empty_like(factor).index_copy_(0, order, factor)
    sizes = torch.bincount(labels, minlength=7)
    bags = reference._sums_in_bags(turned, order, sizes, moved)
    turn = reference._sums_in_turn(x, labels, 7, factor)
    torch.testing.assert_close(bags, turn, rtol=1e-14, atol=1e-14)


def test_update_takes_fewer_points_than_clusters() -> None:
    previous = blobs(1, 9, 4, 3)[0]
    x = previous[:2] + 1
    out = fk.update(x, torch.tensor([5, 5]), 9, previous=previous)
    torch.testing.assert_close(out.centroids[5], x.mean(0))
    kept = [k for k in range(9) if k != 5]
    assert torch.equal(out.centroids[kept], previous[kept])
    assert out.sizes.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0]


@pytest.mark.parametrize("label", [-1, 3])
def test_update_refuses_labels_out_of_range(label: int) -> None:
    x = blobs(1, 9, 4, 3)[0]
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        fk.update(x, torch.tensor([0, 1, 2] * 2 + [1, 2, label]), 3, previous=x[:3])


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
def test_kmeans_with_integer_weights_equals_repeated_points(metric: str) -> None:
    x = blobs(1, 40, 3, 4)
    weight = torch.arange(40) % 3
    repeated = x.repeat_interleave(weight, dim=1)
    init = x[:, 1:5].clone()
    one = fk.kmeans(x, 4, init=init, sample_weight=weight, max_iter=5, metric=metric)
    two = fk.kmeans(repeated, 4, init=init, max_iter=5, metric=metric)
    torch.testing.assert_close(one.centroids, two.centroids)
    torch.testing.assert_close(one.inertia, two.inertia)


def test_kmeans_of_a_batch_equals_its_parts_and_of_a_view_its_copy() -> None:
    x = blobs(3, 100, 16, 5)
    init = x[:, :7].clone()
    whole = fk.kmeans(x, 7, init=init, max_iter=3)
    for b in range(3):
        part = fk.kmeans(x[b], 7, init=init[b], max_iter=3)
        assert part.labels.shape == (100,)
        assert torch.equal(part.labels, whole.labels[b])
        torch.testing.assert_close(part.centroids, whole.centroids[b])
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    again = fk.kmeans(strided, 7, init=init, max_iter=3)
    assert torch.equal(again.labels, whole.labels)


def test_kmeans_of_many_small_batches() -> None:
    x = torch.randn(70_000, 3, 2, generator=torch.Generator().manual_seed(0))
    result = fk.kmeans(x, 2, init=x[:, :2], max_iter=1)
    assert (regret(x, x[:, :2], result.labels) <= rounding(x, x[:, :2])).all()
    torch.testing.assert_close(
        (result.centroids * result.sizes.unsqueeze(-1)).sum(1), x.sum(1), rtol=1e-5, atol=1e-5
    )


def test_kmeans_is_bit_equal_from_run_to_run_and_a_generator_decides_the_start() -> None:
    x = blobs(2, 500, 8, 6)
    runs = [
        fk.kmeans(x, 6, init=init, generator=torch.Generator().manual_seed(seed), max_iter=3)
        for init in ("random", "k-means++")
        for seed in (1, 1, 2)
    ]
    for same, again, other in (runs[:3], runs[3:]):
        assert torch.equal(same.centroids, again.centroids)
        assert not torch.equal(same.centroids, other.centroids)


def test_kmeans_leaves_the_global_seed_alone() -> None:
    state = torch.get_rng_state()
    fk.kmeans(blobs(1, 50, 2, 2), 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())


def test_kmeans_stops_early_once_nothing_moves() -> None:
    x = blobs(2, 300, 4, 3)
    result = fk.kmeans(x, 3, init="k-means++", tol=1e-12, max_iter=100)
    assert 1 < result.n_iter < 100
    settled = fk.kmeans(x, 3, init=result.centroids, max_iter=1)
    torch.testing.assert_close(settled.centroids, result.centroids)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("tol", [0.0, 1e-4])
def test_kmeans_refuses_points_that_are_not_finite(bad: float, tol: float) -> None:
    x = blobs(1, 20, 3, 2)
    x[0, 3, 1] = bad
    with pytest.raises(ValueError, match="finite"):
        fk.kmeans(x, 2, tol=tol)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n_clusters": 21}, ValueError, "between 1 and the number of points"),
        ({"n_clusters": 0}, ValueError, "between 1"),
        ({"n_clusters": 2.0}, TypeError, "must be an integer"),
        ({"n_clusters": True}, TypeError, "must be an integer"),
        ({"n_clusters": "2"}, TypeError, "must be an integer"),
        ({"max_iter": 2.5}, TypeError, "max_iter must be an integer"),
        ({"max_iter": True}, TypeError, "max_iter must be an integer"),
        ({"tol": "no"}, TypeError, "tol must be a number"),
        ({"tol": float("nan")}, ValueError, "tol must be finite"),
        ({"allow_tf32": "no"}, TypeError, "allow_tf32 must be True or False"),
        ({"deterministic": 1}, TypeError, "deterministic must be True or False"),
        ({"max_size_ratio": 0.5}, ValueError, "max_size_ratio must be finite and at least 1"),
        ({"sample_weight": "no"}, TypeError, "sample_weight must be a tensor or an array"),
        ({"init": torch.full((2, 3), torch.nan)}, ValueError, "init must be finite"),
        ({"init": {}}, TypeError, "init must be a tensor or an array"),
        ({"x": torch.zeros(20)}, ValueError, "must be"),
        ({"x": torch.zeros(0, 3)}, ValueError, "empty"),
        ({"x": torch.zeros(20, 3, dtype=torch.int64)}, TypeError, "convert it"),
        ({"x": [[1.0]]}, TypeError, "torch.Tensor"),
        ({"metric": "l1"}, ValueError, "euclidean, cosine, dot"),
        ({"empty": "drop"}, ValueError, "keep, farthest"),
        ({"backend": "cuda"}, ValueError, "auto, reference, triton"),
        ({"init": "pca"}, ValueError, "init must be"),
        ({"init": torch.zeros(1, 4, 3)}, ValueError, "init must be"),
        ({"max_iter": 0}, ValueError, "max_iter"),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"sample_weight": torch.ones(19)}, ValueError, "sample_weight"),
    ],
)
def test_kmeans_names_bad_arguments(change: dict[str, object], error: type, words: str) -> None:
    arguments: dict[str, object] = {"x": torch.randn(20, 3), "n_clusters": 2, **change}
    with pytest.raises(error, match=words):
        fk.kmeans(arguments.pop("x"), arguments.pop("n_clusters"), **arguments)  # type: ignore[arg-type]


def test_assign_says_why_a_backend_is_impossible() -> None:
    with pytest.raises(fk.UnsupportedError, match=r"float64|triton") as raised:
        fk.assign(torch.zeros(4, 2).double(), torch.zeros(2, 2).double(), backend="triton")
    assert set(raised.value.reasons) == {"triton"}


def test_kmeans_compiles_without_graph_breaks() -> None:
    x = blobs(2, 100, 8, 4)
    init = x[:, :5].clone()

    def run(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = fk.kmeans(points * 2, 5, init=init * 2, max_iter=2)
        return result.labels, result.centroids / 2

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for ours, theirs in zip(compiled(x), run(x), strict=True):
        assert torch.equal(ours, theirs)


def test_ops_pass_torchs_own_checks() -> None:
    x = blobs(2, 30, 4, 3)
    init = x[:, :3].clone()
    for args, op in (
        ((x, init, "euclidean", "reference", False), torch.ops.flash_kmeans.assign.default),
        (
            (x, torch.zeros(2, 30, dtype=torch.int32), init, None, "dot", "reference"),
            torch.ops.flash_kmeans.update.default,
        ),
        (
            (x, init, None, "cosine", "keep", 2, "reference", False),
            torch.ops.flash_kmeans.lloyd.default,
        ),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
