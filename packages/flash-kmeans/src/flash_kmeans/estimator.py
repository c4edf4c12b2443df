"""An estimator in scikit-learn's conventions; scikit-learn itself is not needed to use it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks, common
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
        init: "k-means++" (greedy), "random", starting centroids `[K, D]`, or a function
            `init(X, n_clusters, random_state)` that returns them.
        n_init: how many starts to try; the one of lowest inertia is kept. "auto" is 10 for "random"
            and for a function, else 1.
        max_iter: most rounds per start.
        tol: stop once the summed squared movement of centroids is at most `tol` times the mean
            variance of the features.
        verbose: at 1 or more print a line per start.
        random_state: None, an int, a NumPy `RandomState`/`Generator` or a `torch.Generator`.
        copy_x: no effect; the points are never written to.
        algorithm: "lloyd" or "elkan"; both give what Lloyd's algorithm gives, and that is what
            runs.
        metric: "euclidean", "cosine" or "dot".
        empty: "farthest" or "keep", what becomes of clusters without points.
        max_size_ratio: the most points a cluster of `labels_` may hold, relative to the mean
            `N / K`; see `flash_kmeans.kmeans`. No bound when None. `predict` knows no bound.
        device: where to compute; the device of a tensor, or the CPU, when None.
        backend: "auto", "reference" or "triton".

    Attributes:
        cluster_centers_: `[K, D]`.
        labels_: `[N]`, what `predict` gives for the points of `fit` (unless sizes are bounded).
        inertia_: the objective over `labels_` and `cluster_centers_`.
        n_iter_: rounds that the kept start ran.
        n_features_in_: D.

    Examples:
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
        init: Any = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        verbose: int = 0,
        random_state: Any = None,
        copy_x: bool = True,
        algorithm: str = "lloyd",
        metric: Metric = "euclidean",
        empty: Empty = "farthest",
        max_size_ratio: float | None = None,
        device: str | torch.device | None = None,
        backend: Backend = "auto",
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose
        self.random_state = random_state
        self.copy_x = copy_x
        self.algorithm = algorithm
        self.metric = metric
        self.empty = empty
        self.max_size_ratio = max_size_ratio
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
            TypeError: if a parameter is of the wrong type.
            ValueError: if the points are not finite, two-dimensional and at least K, or a parameter
                or weight has a wrong value.
        """
        points = self._points(X, width=None)
        self.n_features_in_ = points.shape[1]
        n_clusters = checks.integer("n_clusters", self.n_clusters, 1)
        if points.shape[0] < n_clusters:
            raise ValueError(f"n_samples={points.shape[0]} should be >= n_clusters={n_clusters}")
        weight = as_weights(sample_weight, points)
        self._check()
        source = random_state(self.random_state)
        runs = (
            self._run(points, start, source, weight) for start in self._starts(X, points, source)
        )
        best = min(runs, key=lambda result: float(result.inertia))
        labels = best.labels
        if self.max_size_ratio is None:
            labels = assign(points, best.centroids, metric=self.metric, backend=self.backend)
        batch = (points[None], best.centroids[None], labels[None], self.metric)
        inertia = common.inertia(*batch, None if weight is None else weight[None])
        distinct = int(labels.unique().numel())
        if distinct < n_clusters:
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

    def _check(self) -> None:
        """Raise for parameters that nothing else looks at."""
        if self.algorithm not in ("lloyd", "elkan"):
            raise ValueError(f"algorithm must be 'lloyd' or 'elkan', got {self.algorithm!r}")
        if not isinstance(self.verbose, (bool, np.bool_)):
            checks.integer("verbose", self.verbose, 0)
        checks.flag("copy_x", self.copy_x)

    def _starts(self, X: Any, points: Tensor, source: torch.Generator) -> Iterator[Any]:
        """Yield what `kmeans` takes as `init`, once per start."""
        init = self.init
        if isinstance(self.n_init, str) and self.n_init == "auto":
            drawn = callable(init) or (isinstance(init, str) and init == "random")
            count = 10 if drawn else 1
        else:
            count = checks.integer("n_init", self.n_init, 1)
        if callable(init):
            given = X if isinstance(X, Tensor) else points.cpu().numpy()
            for _ in range(count):
                seed = int(torch.randint(2**31, (1,), generator=source).item())
                yield init(given, self.n_clusters, random_state=np.random.RandomState(seed))
        elif isinstance(init, str):
            yield from [init] * count
        else:
            yield init  # the same start again would give the same result

    def _run(
        self, points: Tensor, start: Any, source: torch.Generator, weight: Tensor | None
    ) -> KMeansResult:
        if not isinstance(start, str):
            start = checks.numeric(start, "init", points.device).to(points.device)
        result = kmeans(
            points,
            self.n_clusters,
            metric=self.metric,
            init=start,
            max_iter=self.max_iter,
            # A tolerance of zero would mean a fixed number of rounds; here it means "settled".
            tol=checks.real("tol", self.tol, 0.0) or torch.finfo(torch.float32).tiny,
            generator=source,
            sample_weight=weight,
            empty=self.empty,
            max_size_ratio=self.max_size_ratio,
            backend=self.backend,
        )
        if self.verbose:
            print(f"{result.n_iter} rounds, inertia {float(result.inertia):.6g}")
        return result

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
