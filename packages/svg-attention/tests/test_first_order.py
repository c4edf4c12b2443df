"""The first-order term of clusters that are not read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_bias import CLUSTERS, LAYOUT, draw

from svg_attention import SVG2, LayerMemory, sparse_attention
from svg_attention.methods.base import AttentionCall
from svg_attention.planning.clusters import mean_slope

MASS: dict[str, Any] = {**CLUSTERS, "route": "mass", "first_order": True}


def test_mean_slope_is_the_covariance_within_clusters() -> None:
    query, key, value = draw("clustered")
    method = SVG2(**MASS)
    call = AttentionCall(query=query, key=key, value=value, layout=LAYOUT)
    _, clusters = method.cluster(call)
    key, value = call.video(key), call.video(value)
    got = mean_slope(key, value, clusters)
    for head in range(2):
        want = torch.zeros(16, 16, dtype=torch.float64)
        for c in range(40):
            mine = clusters.labels[0, head] == c
            if mine.any():
                k, v = key[0, head, mine].double(), value[0, head, mine].double()
                want += (k - k.mean(0)).T @ (v - v.mean(0))
        torch.testing.assert_close(got[0, head].double(), want / 768, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("route", ["mass", "error"])
def test_the_output_of_a_row_has_the_first_order_term_of_what_its_tile_does_not_read(
    route: str,
) -> None:
    query, key, value = draw("clustered")
    plan = SVG2(**{**MASS, "route": route}).plan(
        query, key, value, layout=LAYOUT, memory=LayerMemory(),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    summary, order = plan.summary, plan.query_order
    assert summary is not None
    assert summary.slope is not None
    assert order is not None
    got = sparse_attention(query, key, value, plan).double()
    reads = plan.to_mask()
    for position in (0, 300, 700, LAYOUT.tokens - 1):
        for head in range(2):
            token = int(order[0, head, position])
            q = query[0, head, token].double() * 0.25
            mine = reads[0, head, token]
            weights = summary.log_weights[0, head, position // 128].double()
            left = weights.isfinite()
            logits = torch.cat(
                [
                    key[0, head, mine].double() @ q,
                    summary.keys[0, head, left].double() @ q + weights[left],
                ]
            )
            sloped = summary.values[0, head, left].double() + q @ summary.slope[0, head].double()
            want = torch.softmax(logits, -1) @ torch.cat([value[0, head, mine].double(), sloped])
            torch.testing.assert_close(got[0, head, token], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["clustered", "random", "offset", "skewed", "dominant", "equal", "large"]
)
def test_a_first_order_tail_is_finite(kind: str) -> None:
    tensors = draw(kind)
    plan = SVG2(**MASS, repair_rows=16).plan(*tensors, layout=LAYOUT)
    assert sparse_attention(*tensors, plan).isfinite().all()


def test_first_order_names_wrong_settings() -> None:
    with pytest.raises(ValueError, match="set compensate=True"):
        SVG2(first_order=True)
    with pytest.raises(ValueError, match="correct_residual=False"):
        SVG2(**CLUSTERS, first_order=True, correct_residual=True)
