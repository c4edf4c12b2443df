"""Properties over inputs that hypothesis draws: clusterings, streams, and configurations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from kmeans_oracles import means, regret, rounding

import flash_kmeans as fk

pytestmark = pytest.mark.fuzz
METRICS = ("euclidean", "cosine", "dot")
checked = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
VALUES = st.floats(-1e6, 1e6, width=32)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Draw points, a start among them, weights and options."""
    batch, n, dim = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    x = torch.from_numpy(draw(arrays.arrays(np.float32, (batch, n, dim), elements=VALUES)))
    k = draw(st.integers(1, n))
    weights = st.none() | arrays.arrays(
        np.float32, (batch, n), elements=st.floats(0, 100, width=32)
    )
    return {
        "x": x * draw(st.sampled_from([1.0, 1e-3, 1e-6])),
        "n_clusters": k,
        "init": draw(st.sampled_from(["random", "k-means++", "rows"])),
        "metric": draw(st.sampled_from(METRICS)),
        "empty": draw(st.sampled_from(["keep", "farthest"])),
        "max_iter": draw(st.integers(1, 4)),
        "tol": draw(st.sampled_from([0.0, 1e-3])),
        "sample_weight": draw(weights),
        "max_size_ratio": draw(st.none() | st.floats(1, 3)),
    }


@checked
@given(problems())
def test_kmeans_returns_one_consistent_state(problem: dict[str, Any]) -> None:
    x, k = problem.pop("x"), problem.pop("n_clusters")
    if problem["init"] == "rows":
        problem["init"] = x[:, :k].clone()
    source = torch.Generator().manual_seed(0)
    result = fk.kmeans(x, k, generator=source, **problem)
    batch, n, _ = x.shape
    assert ((result.labels >= 0) & (result.labels < k)).all()
    counts = torch.stack([torch.bincount(row, minlength=k) for row in result.labels])
    assert torch.equal(result.sizes, counts.int())
    assert torch.equal(result.order, result.labels.sort(dim=1, stable=True).indices.int())
    assert torch.isfinite(result.centroids).all()
    assert torch.isfinite(result.inertia).all()
    if problem["metric"] != "dot":
        assert (result.inertia >= 0).all()
    if problem["max_size_ratio"] is not None:
        largest = max(math.ceil(n / k), math.floor(problem["max_size_ratio"] * n / k))
        assert int(result.sizes.max()) <= largest
    if problem["metric"] == "euclidean":
        weight = problem["sample_weight"]
        weight = None if weight is None else torch.from_numpy(weight)
        expected = means(x, result.labels, result.centroids, weight)
        size = x.double().abs().amax((1, 2), keepdim=True)
        assert ((result.centroids.double() - expected).abs() <= 1e-6 * size + 1e-30).all()
    for b in range(batch):
        if isinstance(problem["init"], torch.Tensor) and problem["tol"] == 0:
            weight = problem["sample_weight"]
            alone = {
                **problem,
                "init": problem["init"][b],
                "sample_weight": None if weight is None else weight[b],
            }
            assert torch.equal(fk.kmeans(x[b], k, **alone).labels, result.labels[b])


@checked
@given(problems())
def test_assign_is_best_up_to_rounding(problem: dict[str, Any]) -> None:
    x, k, metric = problem["x"], problem["n_clusters"], problem["metric"]
    centroids = x[:, -k:].flip(1) + 1
    labels = fk.assign(x, centroids, metric=metric)
    assert (regret(x, centroids, labels, metric) <= rounding(x, centroids, metric) + 1e-30).all()


@checked
@given(
    arrays.arrays(
        arrays.integer_dtypes() | arrays.unsigned_integer_dtypes() | arrays.floating_dtypes(),
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements={"min_value": 0, "max_value": 100},
    ),
    st.integers(1, 9),
    st.sampled_from(["C", "F", "reversed", "every other"]),
)
def test_kmeans_stream_reads_any_array(
    source: np.ndarray[Any, Any], rows: int, layout: str
) -> None:
    exact = torch.from_numpy(source.astype(np.float64))
    expected = fk.kmeans(exact, 1, init=exact[:1], max_iter=1)
    stored = {
        "C": source,
        "F": np.asfortranarray(source),
        "reversed": np.ascontiguousarray(source[::-1])[::-1],
        "every other": np.repeat(source, 2, axis=1)[:, ::2],
    }[layout]
    parts = fk.kmeans_stream(
        stored, 1, init=exact[:1], max_iter=1, chunk_rows=rows, device="cpu", progress=False
    )
    tolerance = 1e-3 if source.dtype.itemsize == 2 and source.dtype.kind == "f" else 1e-6
    torch.testing.assert_close(
        parts.centroids.double(), expected.centroids, rtol=tolerance, atol=1e-6
    )


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 6),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["auto", "no", "lloyd", "random", "", "k-means++", "euclidean"]),
    st.sampled_from([np.int64(3), np.float32(0.5), np.bool_(True), np.str_("random")]),
    st.lists(st.integers(), max_size=2),
)
PARAMETERS = (
    *("n_clusters", "init", "n_init", "max_iter", "tol", "verbose", "random_state", "copy_x"),
    *("algorithm", "metric", "empty", "max_size_ratio", "backend"),
)


@checked
@given(st.dictionaries(st.sampled_from(PARAMETERS), ODD, max_size=3))
def test_KMeans_fits_or_says_which_parameter_is_wrong(parameters: dict[str, Any]) -> None:
    x = np.random.default_rng(0).normal(size=(20, 2))
    model = fk.KMeans(**{"n_clusters": 3, "random_state": 0, **parameters})
    assert model.get_params().items() >= parameters.items() or any(
        value != value for value in parameters.values()
    )
    said = None
    try:
        model.fit(x)
    except (TypeError, ValueError, fk.UnsupportedError) as error:
        said = str(error)
    if said is not None:
        # Scikit-learn's words for more clusters than points, and ours for a backend, name others.
        names = [*parameters, "n_samples=20", "no backend can run this here"]
        assert any(name in said for name in names), said
        return
    assert model.labels_.shape == (20,)
    assert 0 <= model.labels_.min() <= model.labels_.max() < len(model.cluster_centers_)
    assert math.isfinite(model.inertia_)
    np.testing.assert_array_equal(model.predict(x).shape, (20,))
