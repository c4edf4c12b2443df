"""The bias of centroids in a whole call: exact where rows equal their probe, never harmful."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svg_attention import SVG2, LayerMemory, TokenLayout, sparse_attention
from svg_attention.methods.base import AttentionCall

LAYOUT = TokenLayout(grid=(4, 12, 16), text_tokens=24)
CLUSTERS: dict[str, Any] = {
    "q_clusters": 12, "k_clusters": 40, "first_iterations": 8, "density": 0.2, "compensate": True,
    "route": "error",
}  # fmt: skip


def draw(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of two heads."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(2, 1, 2, 30, 16, generator=generator)
    owner = torch.randint(30, (LAYOUT.tokens,), generator=generator)
    noise = 0.6 * torch.randn(3, 1, 2, LAYOUT.tokens, 16, generator=generator)
    query, key = 1.5 * base[0][:, :, owner] + noise[0], 1.5 * base[0][:, :, owner] + noise[1]
    value = base[1][:, :, owner] + noise[2]
    if kind == "random":
        query, key, value = torch.randn(3, 1, 2, LAYOUT.tokens, 16, generator=generator)
    elif kind == "offset":
        key, value = key + 5.0, value + 5.0
    elif kind == "skewed":
        key = key * torch.rand(LAYOUT.tokens, 1, generator=generator).pow(-0.5).clamp(max=6)
    elif kind == "dominant":
        key[:, :, 100] = 80 * query[:, :, 0] / query[:, :, 0].square().sum(-1, keepdim=True) * 4
    elif kind == "equal":
        key = key[:, :, :1].expand_as(key).contiguous()
    elif kind == "large":
        query = query * 8
    return query, key, value


def error(method: SVG2, tensors: tuple[Tensor, Tensor, Tensor]) -> float:
    plan = method.plan(
        *tensors,
        layout=LAYOUT,
        memory=LayerMemory(),
        generator=torch.Generator().manual_seed(1),
    )
    out = sparse_attention(*tensors, plan)
    assert out.isfinite().all()
    exact = F.scaled_dot_product_attention(*tensors)
    return float((out - exact).square().mean() / exact.var())


@pytest.mark.parametrize("probe_rows", [4, 16])
@pytest.mark.parametrize(
    "kind", ["clustered", "random", "offset", "skewed", "dominant", "equal", "large"]
)
def test_correct_bias_lowers_the_error(kind: str, probe_rows: int) -> None:
    tensors = draw(kind)
    plain = error(SVG2(**CLUSTERS, probe_rows=probe_rows), tensors)
    corrected = error(SVG2(**CLUSTERS, probe_rows=probe_rows, correct_bias=True), tensors)
    assert corrected <= plain + 1e-6


def test_correct_bias_lowers_the_error_of_large_scores_by_a_quarter() -> None:
    tensors = draw("large")
    plain = error(SVG2(**CLUSTERS), tensors)
    assert error(SVG2(**CLUSTERS, correct_bias=True), tensors) < 0.78 * plain


def test_the_weight_of_a_centroid_is_what_its_keys_weigh_where_rows_equal_their_probe() -> None:
    query, key, value = draw("clustered")
    query = query[:, :, :1].expand_as(query).contiguous()
    method = SVG2(**CLUSTERS, correct_bias=True)
    call = AttentionCall(
        query=query, key=key, value=value, layout=LAYOUT, memory=LayerMemory(),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    query_clusters, key_clusters = method.cluster(call)
    plan = method.plan_clusters(call, query_clusters, key_clusters)
    assert plan.summary is not None
    weights = plan.summary.log_weights[0, :, 0]
    for h in range(2):
        labels = key_clusters.labels[0, h]
        logits = key[0, h, : LAYOUT.video_tokens] @ query[0, h, 0] * 16**-0.5
        for c in torch.nonzero(weights[h].isfinite()).flatten().tolist():
            mine = labels == c
            want = torch.logsumexp(logits[mine], 0)
            got = weights[h, c] + plan.summary.keys[0, h, c] @ query[0, h, 0] * 16**-0.5
            torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


def test_probe_density_counts_scores_by_half() -> None:
    options = {"layout": LAYOUT, "memory": LayerMemory(), "generator": None}
    plan = SVG2(**CLUSTERS).plan(*draw("random"), **options)
    assert plan.probe_density == 0.5 * 48 * LAYOUT.video_tokens / LAYOUT.tokens**2
    assert SVG2(**{**CLUSTERS, "route": "mass"}).plan(*draw("random"), **options).probe_density == 0


def test_correct_bias_needs_error_routing() -> None:
    with pytest.raises(ValueError, match="set route='error'"):
        SVG2(compensate=True, correct_bias=True)
