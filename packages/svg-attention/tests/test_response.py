"""Clustering in the response metric."""

from __future__ import annotations

import pytest
import torch
from test_bias import CLUSTERS, LAYOUT, draw, error
from torch import Tensor

from svg_attention import SVG2, LayerMemory, sparse_attention
from svg_attention.methods.call import AttentionCall
from svg_attention.planning.response import RIDGE, respond, response_root


def moment(x: Tensor, groups: int) -> Tensor:
    """Return the second moment of each group's rows in fp64, scaled to a mean eigenvalue of 1."""
    x = x.double().unflatten(1, (groups, -1)).flatten(2, 3)
    found = x.transpose(-1, -2) @ x
    mean = found.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return found / mean + RIDGE * torch.eye(x.shape[-1])


@pytest.mark.parametrize("kind", ["random", "offset", "narrow", "tiny", "huge", "one"])
def test_response_root_squares_to_the_second_moment(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 300, 16, generator=generator)
    if kind == "offset":
        x = x + 20
    elif kind == "narrow":
        x = x * torch.logspace(-4, 0, 16)
    elif kind in ("tiny", "huge"):
        x = x * (1e-30 if kind == "tiny" else 1e30)
    elif kind == "one":
        x = x[:, :, :1]
    root = response_root(x, 4)
    assert root.dtype == torch.float32
    torch.testing.assert_close(root.double() @ root.double(), moment(x, 4), rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(root, root.transpose(-1, -2), rtol=1e-3, atol=1e-3)
    shared = response_root(x, 2).double()
    torch.testing.assert_close(shared @ shared, moment(x, 2), rtol=1e-3, atol=2e-3)


def test_response_root_of_zeros_and_of_rows_that_are_not_finite_is_finite() -> None:
    x = torch.zeros(1, 2, 10, 4)
    x[0, 1, 3, 2] = torch.nan
    x[0, 1, 4, 0] = torch.inf
    x[0, 1, 5, 1] = 2.0
    assert response_root(x, 2).isfinite().all()
    assert respond(x[:, :1], response_root(x, 2)[:, :1], unit=True).isfinite().all()


def test_distance_in_the_metric_is_the_mean_square_change_of_a_score() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 1, 200, 8, generator=generator) * torch.linspace(0.1, 3, 8)
    keys = torch.randn(1, 1, 5, 8, generator=generator)
    rows = respond(keys, response_root(queries, 1))[0, 0]
    changes = (queries[0, 0] @ keys[0, 0].T).double()
    factor = None
    for i in range(4):
        distance = (rows[i] - rows[i + 1]).double().square().sum()
        change = (changes[:, i] - changes[:, i + 1]).square().mean()
        factor = change / distance if factor is None else factor
        torch.testing.assert_close(change, distance * factor, rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", ["clustered", "random", "skewed", "dominant", "equal", "large"])
def test_clusters_of_the_response_metric_have_means_of_their_own_space(kind: str) -> None:
    query, key, value = draw(kind)
    memory = LayerMemory()
    method = SVG2(**CLUSTERS, metric="response", correct_bias=True)
    for _ in range(2):  # the second call starts from what the first remembered
        call = AttentionCall(
            query=query, key=key, value=value, layout=LAYOUT, memory=memory,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        found = method.cluster(call)
        for clusters, x in zip(found, (query, key), strict=True):
            for h in range(2):
                for c in torch.nonzero(clusters.sizes[0, h]).flatten()[:5].tolist():
                    mine = clusters.labels[0, h] == c
                    want = x[0, h, : LAYOUT.video_tokens][mine].mean(0)
                    torch.testing.assert_close(
                        clusters.centroids[0, h, c], want, rtol=1e-4, atol=1e-4
                    )
    plan = method.plan_clusters(call, *found)
    assert sparse_attention(query, key, value, plan).isfinite().all()


def test_the_response_metric_helps_where_few_channels_carry_the_scores() -> None:
    query, key, value = draw("clustered")
    generator = torch.Generator().manual_seed(5)
    loud = torch.randn(1, 2, LAYOUT.tokens, 8, generator=generator) * 6
    query = torch.cat([query[..., :8], torch.zeros_like(loud)], dim=-1)
    key = torch.cat([key[..., :8], loud], dim=-1)
    plain, response = (
        error(SVG2(**CLUSTERS, metric=metric), (query, key, value))
        for metric in ("euclidean", "response")
    )
    assert response < 0.5 * plain
