"""The estimator, by scikit-learn's own checks and a few of ours."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from kmeans_oracles import blobs

from flash_kmeans import KMeans

# Checks that cannot apply, and why.
CANNOT_APPLY = {
    # A random start draws among rows, so repeating a row changes the draws: scikit-learn's own
    # KMeans declares the same. With a given start weights do equal repetition, tested below.
    "check_sample_weight_equivalence_on_dense_data": "the random start depends on the rows",
}
# Checks that scikit-learn itself skips in this environment.
SKIPPED_BY_SKLEARN = {"check_sample_weights_pandas_series", "check_array_api_input"}


def test_KMeans_passes_scikit_learns_checks() -> None:
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = checks.check_estimator(
            KMeans(n_clusters=3), expected_failed_checks=CANNOT_APPLY, on_fail=None, on_skip=None
        )
    outcome = {r["check_name"]: r["status"] for r in results}
    failed = {name: r for name, r in outcome.items() if r not in ("passed", "xfail")}
    assert set(failed) <= SKIPPED_BY_SKLEARN, failed
    assert sum(status == "passed" for status in outcome.values()) >= 45
    assert {name for name, status in outcome.items() if status == "xfail"} == set(CANNOT_APPLY)


def test_KMeans_agrees_with_scikit_learn_from_the_same_start() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    x = blobs(1, 500, 6, 5)[0].double().numpy()
    start = x[:5].copy()
    ours = KMeans(5, init=start, tol=1e-4).fit(x)
    theirs = cluster.KMeans(5, init=start, n_init=1, tol=1e-4).fit(x)
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-6)
    np.testing.assert_allclose(ours.inertia_, theirs.inertia_, rtol=1e-6)
    np.testing.assert_allclose(ours.transform(x), theirs.transform(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.score(x), theirs.score(x), rtol=1e-6)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_KMeans_labels_are_what_predict_and_transform_say(metric: str) -> None:
    x = blobs(1, 300, 5, 4)[0]
    model = KMeans(4, metric=metric, random_state=3).fit(x)
    assert isinstance(model.labels_, torch.Tensor)
    assert torch.equal(model.labels_, model.predict(x))
    assert torch.equal(model.transform(x).argmin(1).int(), model.labels_)
    expected = model.transform(x).gather(1, model.labels_.long()[:, None])
    total = expected.square().sum() if metric == "euclidean" else expected.sum()
    assert model.inertia_ == pytest.approx(float(total), rel=1e-4)
    assert model.score(x) == pytest.approx(-model.inertia_, rel=1e-6)


def test_KMeans_with_weights_equals_repeated_points_from_the_same_start() -> None:
    x = blobs(1, 60, 3, 4)[0].numpy()
    weight = np.arange(60) % 3
    one = KMeans(4, init=x[1:5]).fit(x, sample_weight=weight)
    two = KMeans(4, init=x[1:5]).fit(np.repeat(x, weight, axis=0))
    np.testing.assert_allclose(one.cluster_centers_, two.cluster_centers_, rtol=1e-5)


def test_KMeans_costs_no_more_with_more_starts_and_a_seed_fixes_it() -> None:
    x = blobs(1, 400, 2, 9)[0].numpy()
    single = KMeans(9, init="random", n_init=1, random_state=0).fit(x)
    many = KMeans(9, init="random", n_init=5, random_state=0).fit(x)
    assert many.inertia_ <= single.inertia_
    again = KMeans(9, init="random", n_init=1, random_state=0).fit(x)
    np.testing.assert_array_equal(single.cluster_centers_, again.cluster_centers_)


def test_KMeans_survives_pickle_clone_and_a_pipeline() -> None:
    base = pytest.importorskip("sklearn.base")
    pipeline = pytest.importorskip("sklearn.pipeline")
    scaling = pytest.importorskip("sklearn.preprocessing")
    x = blobs(1, 100, 3, 3)[0].numpy()
    model = KMeans(3, random_state=1).fit(x)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(x), model.predict(x))
    copy = base.clone(model.set_params(n_clusters=4))
    assert copy.get_params() == model.get_params()
    assert not hasattr(copy, "labels_")
    chain = pipeline.make_pipeline(scaling.StandardScaler(), KMeans(3, random_state=1))
    assert chain.fit_transform(x).shape == (100, 3)
    with pytest.raises(ValueError, match="Invalid parameter"):
        model.set_params(clusters=3)
    assert repr(KMeans(3)) == "KMeans(n_clusters=3)"


def test_KMeans_works_where_scikit_learn_is_missing() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import importlib.util, numpy as np\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'sklearn' else find(n, *a)\n"
        "import flash_kmeans as fk\n"
        "model = fk.KMeans(2)\n"
        "try:\n    model.predict(np.zeros((2, 1)))\n"
        "except ValueError as error:\n    assert 'not fitted yet' in str(error)\n"
        "print(model.fit(np.array([[0.0], [1.0], [9.0]])).labels_.shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(3,)", done.stderr


def test_KMeans_takes_what_scikit_learn_users_write(capsys: pytest.CaptureFixture[str]) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    x = blobs(1, 90, 2, 3)[0].numpy()
    search = selection.GridSearchCV(KMeans(random_state=0), {"n_clusters": np.arange(2, 5)}, cv=3)
    assert search.fit(x).best_params_["n_clusters"] in (2, 3, 4)
    assert all(KMeans(k, random_state=np.int64(0)).fit(x).n_iter_ for k in np.arange(2, 4))
    quiet = KMeans(3, n_init="auto", verbose=0, copy_x=True, algorithm="elkan", random_state=0)
    loud = KMeans(3, verbose=np.int32(1), random_state=0)
    np.testing.assert_array_equal(quiet.fit(x).labels_, loud.fit(x).labels_)
    assert "rounds, inertia" in capsys.readouterr().out


@pytest.mark.parametrize("tensor", [False, True])
def test_KMeans_calls_a_function_for_its_starts(tensor: bool) -> None:
    given: list[object] = []

    def start(X, n_clusters, random_state):  # type: ignore[no-untyped-def]
        given.append((type(X), n_clusters))
        return X[random_state.permutation(len(X))[:n_clusters]]

    points = blobs(1, 90, 2, 3)[0]
    x = points if tensor else points.numpy()
    model = KMeans(3, init=start, random_state=0).fit(x)
    assert given == [(type(x), 3)] * 10
    again = KMeans(3, init=start, random_state=0, n_init=2).fit(x)
    assert len(given) == 12
    assert model.inertia_ <= again.inertia_


def test_KMeans_inertia_rivals_scikit_learn_from_one_start() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    ours = theirs = 0.0
    for seed in range(12):
        x = blobs(1, 400, 2, 20, seed=seed)[0].numpy()
        ours += KMeans(20, random_state=seed).fit(x).inertia_
        theirs += cluster.KMeans(20, n_init=1, random_state=seed).fit(x).inertia_
    assert ours < 1.05 * theirs


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_KMeans_transform_is_right_far_from_the_origin(offset: float) -> None:
    x = (np.random.default_rng(0).normal(size=(200, 8)) + offset).astype(np.float32)
    model = KMeans(5, random_state=0).fit(x)
    exact = np.linalg.norm(
        x[:, None].astype(float) - model.cluster_centers_[None].astype(float), axis=-1
    )
    np.testing.assert_allclose(model.transform(x), exact, rtol=1e-6)
    np.testing.assert_array_equal(model.transform(x).argmin(1), model.labels_)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n_clusters": 2.5}, TypeError, "n_clusters must be an integer"),
        ({"n_clusters": True}, TypeError, "n_clusters must be an integer"),
        ({"n_clusters": 0}, ValueError, "n_clusters must be at least 1"),
        ({"n_init": "many"}, TypeError, "n_init must be an integer"),
        ({"n_init": 0}, ValueError, "n_init must be at least 1"),
        ({"max_iter": 2.5}, TypeError, "max_iter must be an integer"),
        ({"tol": "no"}, TypeError, "tol must be a number"),
        ({"tol": -1.0}, ValueError, "tol must be finite"),
        ({"verbose": "no"}, TypeError, "verbose must be an integer"),
        ({"copy_x": "no"}, TypeError, "copy_x must be True or False"),
        ({"algorithm": "full"}, ValueError, "algorithm must be 'lloyd' or 'elkan'"),
        ({"random_state": "no"}, TypeError, "random_state must be an integer"),
        ({"metric": 3}, ValueError, "metric must be one of"),
        ({"init": "pca"}, ValueError, "init must be"),
        ({"init": np.zeros((2, 3))}, ValueError, "init must be"),
        ({"init": np.full((2, 2), np.nan)}, ValueError, "init must be finite"),
        ({"max_size_ratio": 0}, ValueError, "max_size_ratio"),
    ],
)
def test_KMeans_names_bad_parameters(change: dict[str, object], error: type, words: str) -> None:
    x = blobs(1, 30, 2, 3)[0].numpy()
    with pytest.raises(error, match=words):
        KMeans(**{"n_clusters": 2, **change}).fit(x)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0, 1e39])
def test_KMeans_refuses_bad_weights(bad: float) -> None:
    x = blobs(1, 20, 2, 3)[0].numpy()
    weight = np.ones(20)
    weight[3] = bad
    for call in (KMeans(2).fit, KMeans(2).fit(x).score):
        with pytest.raises(ValueError, match=r"sample_weight"):
            call(x, sample_weight=weight)
    with pytest.raises(ValueError, match="Every sample weight is zero"):
        KMeans(2).fit(x, sample_weight=0)


def test_KMeans_bounds_sizes() -> None:
    x = np.r_[np.random.default_rng(0).normal(size=(90, 2)) / 100, np.eye(2) * 50]
    model = KMeans(4, random_state=0, max_size_ratio=1.5).fit(x)
    assert np.bincount(model.labels_).max() <= 1.5 * 92 / 4
