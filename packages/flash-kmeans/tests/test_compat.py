"""The reference library's names run on this package."""

from __future__ import annotations

import pytest
import torch
from kmeans_oracles import blobs

import flash_kmeans as fk
from flash_kmeans import compat


@pytest.mark.parametrize(
    ("function", "metric"),
    [
        (compat.batch_kmeans_Euclid, "euclidean"),
        (compat.batch_kmeans_Cosine, "cosine"),
        (compat.batch_kmeans_Dot, "dot"),
    ],
)
def test_positional_arguments_and_results(function, metric: str) -> None:  # type: ignore[no-untyped-def]
    x = blobs(2, 80, 4, 3)
    labels, centroids, rounds = function(x, 3, 5, -1.0, x[:, :3], False)
    expected = fk.kmeans(x, 3, init=x[:, :3], max_iter=5, metric=metric)
    assert rounds == 5
    assert torch.equal(labels, expected.labels)
    assert torch.equal(centroids, expected.centroids)
    assert function.__name__ not in fk.__all__


def test_the_class_trains_and_predicts() -> None:
    x = blobs(1, 90, 4, 3)[0]
    state = torch.get_rng_state()
    model = compat.FlashKMeans(4, 3, niter=10, seed=1, chunk_size_data=7)
    with pytest.raises(RuntimeError, match="train"):
        model.predict(x)
    labels = model.fit_predict(x)
    assert torch.equal(state, torch.get_rng_state())
    assert labels.dtype == torch.int64
    assert labels.shape == (90,)
    assert model.centroids_b is not None
    assert torch.equal(labels, fk.assign(x, model.centroids_b[0]).long())
    with pytest.raises(TypeError, match="chunks"):
        compat.FlashKMeans(4, 3, chunks=1)
    with pytest.raises(ValueError, match="features"):
        model.predict(x[:, :3])
