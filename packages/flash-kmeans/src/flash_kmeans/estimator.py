"""An estimator in scikit-learn's conventions; scikit-learn itself is not needed to use it."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import common
from ._validation import (
    ConvergenceWarning,
    NotFittedError,
    as_points,
    as_weights,
    random_state,
    sklearn_class,
)
from .checks import Backend, Empty, Metric
from .kmeans import assign, kmeans
from .result import KMeansResult


class KMeans:
    """Cluster points by k-means, with the methods and attributes scikit-learn users expect.

    Takes NumPy arrays (and anything array-like) or torch tensors, `[N, D]`. What comes back is of
    the kind that came in: NumPy for NumPy, tensors on the same device for tensors. Works in
    pipelines, with `clone`, `get_params`, `set_params` and pickle.

    Args:
        n_clusters: number of clusters K.
        init: "k-means++", "random", or starting centroids `[K, D]`.
        n_init: how many starts to try; the one of lowest inertia is kept.
        max_iter: most rounds per start.
        tol: stop once the summed squared movement of centroids is at most `tol` times the mean
            variance of the features.
        metric: "euclidean", "cosine" or "dot".
        empty: "farthest" or "keep", what becomes of clusters without points.
        random_state: None, an int, a NumPy `RandomState`/`Generator` or a `torch.Generator`.
        device: where to compute; the device of a tensor, or the CPU, when None.
        backend: "auto", "reference" or "triton".

    Attributes:
        cluster_centers_: `[K, D]`.
        labels_: `[N]`, what `predict` gives for the points of `fit`.
        inertia_: the objective over `labels_` and `cluster_centers_`.
        n_iter_: rounds that the kept start ran.
        n_features_in_: D.

    Example:
        >>> import numpy as np
        >>> from flash_kmeans import KMeans
        >>> points = np.array([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]])
        >>> labels = KMeans(n_clusters=2, random_state=0).fit_predict(points)
        >>> bool(labels[0] == labels[1] != labels[2] == labels[3])
        True
    """

    # What scikit-learn looks at to tell a clusterer from a classifier, in versions before tags.
    _estimator_type = "clusterer"

    cluster_centers_: Any
    labels_: Any
    inertia_: float
    n_iter_: int
    n_features_in_: int

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: str | Any = "k-means++",
        n_init: int = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        metric: Metric = "euclidean",
        empty: Empty = "farthest",
        random_state: Any = None,
        device: str | torch.device | None = None,
        backend: Backend = "auto",
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.metric = metric
        self.empty = empty
        self.random_state = random_state
        self.device = device
        self.backend = backend

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeans:
        """Find clusters.

        Args:
            X: points `[N, D]`.
            y: ignored; part of scikit-learn's convention.
            sample_weight: non-negative weights `[N]`.

        Returns:
            The estimator itself.

        Raises:
            ValueError: if the points are not finite, two-dimensional and at least K.
        """
        points = self._points(X, width=None)
        self.n_features_in_ = points.shape[1]
        if points.shape[0] < self.n_clusters:
            raise ValueError(
                f"n_samples={points.shape[0]} should be >= n_clusters={self.n_clusters}"
            )
        if self.n_init < 1:
            raise ValueError(f"n_init must be at least 1, got {self.n_init}")
        weight = as_weights(sample_weight, points)
        best = self._best_of(points, weight)
        labels = assign(points, best.centroids, metric=self.metric, backend=self.backend)
        batch = (points[None], best.centroids[None], labels[None], self.metric)
        inertia = common.inertia(*batch, None if weight is None else weight[None])
        distinct = int(labels.unique().numel())
        if distinct < self.n_clusters:
            warnings.warn(
                f"Number of distinct clusters ({distinct}) found smaller than n_clusters "
                f"({self.n_clusters}). Possibly due to duplicate points in X.",
                sklearn_class(ConvergenceWarning),
                stacklevel=2,
            )
        self.cluster_centers_ = self._like(best.centroids, X)
        self.labels_ = self._like(labels, X)
        self.inertia_ = float(inertia[0])
        self.n_iter_ = best.n_iter
        return self

    def _best_of(self, points: Tensor, weight: Tensor | None) -> KMeansResult:
        generator = random_state(self.random_state, points.device)
        init = self.init
        if not isinstance(init, str):
            init = torch.as_tensor(np.asarray(init)) if not isinstance(init, Tensor) else init
            init = init.to(device=points.device, dtype=points.dtype)
        results = (
            kmeans(
                points,
                self.n_clusters,
                metric=self.metric,
                init=init,
                max_iter=self.max_iter,
                # A tolerance of zero would mean a fixed number of rounds; here it means "settled".
                tol=self.tol or torch.finfo(torch.float32).tiny,
                generator=generator,
                sample_weight=weight,
                empty=self.empty,
                backend=self.backend,
            )
            for _ in range(1 if isinstance(init, Tensor) else self.n_init)
        )
        return min(results, key=lambda result: float(result.inertia))

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Find clusters and return the labels of the points, `[N]`."""
        return self.fit(X, y, sample_weight).labels_

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Find clusters and return the distances of the points to the centroids, `[N, K]`."""
        return self.fit(X, y, sample_weight).transform(X)

    def predict(self, X: Any) -> Any:
        """Return the label of the best centroid for each point, `[N]`."""
        points, centers = self._fitted(X)
        return self._like(assign(points, centers, metric=self.metric, backend=self.backend), X)

    def transform(self, X: Any) -> Any:
        """Return distances to all centroids, `[N, K]`.

        Euclidean distances; `1 - cos` for "cosine"; minus the inner product for "dot".
        """
        points, centers = self._fitted(X)
        out = common.distances(points, centers, self.metric)
        return self._like(out.to(points.dtype), X)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return minus the objective of the points under the fitted centroids."""
        points, centers = self._fitted(X)
        weight = as_weights(sample_weight, points)
        labels = assign(points, centers, metric=self.metric, backend=self.backend)
        batch = (points[None], centers[None], labels[None], self.metric)
        return -float(common.inertia(*batch, None if weight is None else weight[None])[0])

    def _points(self, X: Any, width: int | None) -> Tensor:
        return as_points(X, name=type(self).__name__, width=width, device=self.device)

    def _fitted(self, X: Any) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "cluster_centers_"):
            raise sklearn_class(NotFittedError)(
                f"This {type(self).__name__} instance is not fitted yet. Call 'fit' with "
                "appropriate arguments before using this estimator."
            )
        points = self._points(X, width=self.n_features_in_)
        centers = torch.as_tensor(self.cluster_centers_)
        return points.to(centers.dtype), centers.to(points.device)

    @staticmethod
    def _like(value: Tensor, source: Any) -> Any:
        if isinstance(source, Tensor):
            return value.to(source.device)
        return value.cpu().numpy()

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's arguments by name."""
        return {name: getattr(self, name) for name in _parameters(type(self))}

    def set_params(self, **params: Any) -> KMeans:
        """Set constructor arguments by name and return the estimator itself."""
        known = _parameters(type(self))
        for name, value in params.items():
            if name not in known:
                raise ValueError(
                    f"Invalid parameter {name!r} for estimator {self!r}. "
                    f"Valid parameters are: {known}."
                )
            setattr(self, name, value)
        return self

    def get_feature_names_out(self, input_features: Any = None) -> Any:
        """Return names for the columns of `transform`: `kmeans0`, `kmeans1`, ..."""
        if not hasattr(self, "cluster_centers_"):
            raise sklearn_class(NotFittedError)(
                f"This {type(self).__name__} instance is not fitted yet."
            )
        prefix = type(self).__name__.lower()
        return np.asarray([f"{prefix}{k}" for k in range(self.n_clusters)], dtype=object)

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        shown = [
            f"{name}={value!r}"
            for name, value in self.get_params().items()
            if isinstance(value, (np.ndarray, Tensor)) or value != defaults[name].default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __sklearn_tags__(self) -> Any:
        """Describe the estimator to scikit-learn, which is imported only when it asks."""
        from sklearn.utils import Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type="clusterer",
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=["float64", "float32"]),
        )


def _parameters(cls: type) -> list[str]:
    return sorted(inspect.signature(cls).parameters)
