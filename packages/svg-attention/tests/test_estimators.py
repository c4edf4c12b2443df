"""Every estimator of a call against exact attention in fp64, on data made to break it.

Closed forms of each stand beside its own tests; here all of them meet the same data: attention that
is nowhere not finite, and never farther from exact than plain compensation is, but for noise.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from test_bias import LAYOUT, draw
from test_residual import uncorrected
from torch import Tensor

from svg_attention import SVG2, LayerMemory, SparsePlan, sparse_attention
from svg_attention.methods.base import AttentionCall
from svg_attention.planning.clusters import mean_values
from svg_attention.planning.dispatch import LARGEST_BIAS
from svg_attention.planning.probe_sums import probe_sums
from svg_attention.planning.probes import probe_means

PLAIN: dict[str, Any] = {
    "q_clusters": 12, "k_clusters": 40, "first_iterations": 8, "density": 0.2, "compensate": True,
}  # fmt: skip
ERROR = {**PLAIN, "route": "error"}
BIAS = {**ERROR, "correct_bias": True}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "routed by error": ERROR,
    "routed by scores": {**PLAIN, "route": "scores"},
    "bias": BIAS,
    "residual": {**BIAS, "correct_residual": True},
    "repair": {**PLAIN, "repair_rows": 64},
    "response": {**ERROR, "metric": "response"},
    "shared budget": {**BIAS, "spend": "call"},
    "all": {**BIAS, "metric": "response", "repair_rows": 64, "spend": "call"},
}
KINDS = ["clustered", "random", "offset", "skewed", "dominant", "equal", "large", "few", "eighty"]
# A few directions are few to draw: one draw's error says little, the mean of some does.
DRAWS = {"few": 4, "eighty": 4}
Tensors = tuple[Tensor, Tensor, Tensor]


@functools.cache
def hard(kind: str, seed: int = 0) -> Tensors:
    """Return queries, keys and values of two heads: `draw`'s, and two kinds more.

    "few" has 3 different keys for 40 clusters, so that most are empty. "eighty" has keys in a few
    directions whose scores are 80 or -80 for some queries and anything between for others.
    """
    if kind not in ("few", "eighty"):
        return draw(kind)
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, 2, LAYOUT.tokens, 16, generator=generator)
    if kind == "few":
        key = key[:, :, torch.randint(3, (LAYOUT.tokens,), generator=generator)]
        return query, key, value
    ends = torch.randn(1, 2, 6, 16, generator=generator)
    ends = ends / ends.norm(dim=-1, keepdim=True) * 320**0.5
    owner = torch.randint(6, (LAYOUT.tokens,), generator=generator)
    signs = torch.randint(2, (LAYOUT.tokens, 1), generator=generator) * 2.0 - 1
    near = 1 + 0.02 * query
    return ends[:, :, owner] * near, ends[:, :, owner.roll(9)] * signs * (1 + 0.02 * key), value


@functools.cache
def exact(kind: str, seed: int = 0) -> Tensor:
    """Return dense attention in fp64."""
    query, key, value = (x.double() for x in hard(kind, seed))
    return torch.softmax(query @ key.transpose(-1, -2) * 16**-0.5, -1) @ value


def plan_of(kind: str, seed: int, **options: Any) -> SparsePlan:
    return SVG2(**options).plan(
        *hard(kind, seed), layout=LAYOUT, memory=LayerMemory(),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip


def error(kind: str, seed: int, plan: SparsePlan) -> float:
    """Return the mean square error of a call, in variances of what is exact."""
    out, want = sparse_attention(*hard(kind, seed), plan).double(), exact(kind, seed)
    assert out.isfinite().all()
    return float((out - want).square().mean() / want.var())


@functools.cache
def plain_error(kind: str, seed: int) -> float:
    return error(kind, seed, plan_of(kind, seed, **PLAIN))


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_estimator_is_worse_than_plain_compensation(kind: str, name: str) -> None:
    seeds = range(DRAWS.get(kind, 1))
    plans = [plan_of(kind, seed, **ESTIMATORS[name]) for seed in seeds]
    found = sum(error(kind, seed, plan) for seed, plan in zip(seeds, plans, strict=True))
    if name == "residual":
        # Its probes take rows of tiles, which on six tiles outweighs what they correct.
        plain = sum(
            error(kind, seed, uncorrected(plan)) for seed, plan in zip(seeds, plans, strict=True)
        )
    else:
        plain = sum(plain_error(kind, seed) for seed in seeds)
    assert found <= 1.02 * plain + 1e-6


def test_scores_of_eighty_reach_eighty() -> None:
    query, key, _ = hard("eighty")
    scores = query @ key.transpose(-1, -2) * 16**-0.5
    assert 79 < float(scores.max()) < 95
    assert -95 < float(scores.min()) < -79


@pytest.mark.parametrize("kind", KINDS)
def test_probe_sums_of_clusters_are_those_of_their_keys(kind: str) -> None:
    """Hold error, bias, output and log-sum-exp of real clusters to sums over keys in fp64."""
    query, key, value = hard(kind)
    method = SVG2(**BIAS)
    call = AttentionCall(
        query=query, key=key, value=value, layout=LAYOUT, memory=LayerMemory(),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    queries, keys = method.cluster(call)
    query, key, value = call.video(query), call.video(key), call.video(value)
    rows, count = query.shape[2], 40
    means = probe_means(query, queries.order)
    value_means = mean_values(value, keys)
    found = probe_sums(
        means, key, value, keys.order, keys.centroids, value_means, keys.sizes,
        length=rows, scale=0.25, return_output=True,
    )  # fmt: skip
    for h in range(2):
        owner = torch.nn.functional.one_hot(keys.labels[0, h].long(), count).double()
        v = value[0, h].double() - value[0, h].double().mean(0)
        logits = means[0, h].double() @ key[0, h].double().T * 0.25
        centre = means[0, h].double() @ keys.centroids[0, h].double().T * 0.25
        lse = torch.logsumexp(logits, -1, keepdim=True)
        v_means = value_means[0, h].double() - value[0, h].double().mean(0)
        gap = (
            torch.exp(centre - lse)[:, keys.labels[0, h].long()][..., None]
            * v_means[keys.labels[0, h].long()]
            - torch.exp(logits - lse)[..., None] * v
        )
        sums = gap.square().sum(-1) @ owner / keys.sizes[0, h].clamp(min=1)
        tiles = sums.unflatten(0, (-1, 8)).mean(1)
        size = float(tiles.max())
        torch.testing.assert_close(
            found.error[0, h].double(), tiles, rtol=5e-3, atol=1e-5 * size + 1e-12
        )
        torch.testing.assert_close(found.lse[0, h].double(), lse[:, 0], rtol=1e-5, atol=1e-4)
        want = torch.softmax(logits, -1) @ value[0, h].double()
        torch.testing.assert_close(found.output[0, h].double(), want, rtol=1e-3, atol=1e-4)
        mass = torch.exp(logits - lse) @ owner
        weight = torch.stack(
            [torch.logsumexp(logits.masked_fill(mine == 0, -torch.inf), -1) for mine in owner.T],
            dim=-1,
        )
        bias = (weight - keys.sizes[0, h].clamp(min=1).log() - centre).clamp(0, LARGEST_BIAS)
        bias = torch.where(keys.sizes[0, h] > 0, bias, 0.0)
        weighed = (mass * bias).unflatten(0, (-1, 8)).sum(1) / mass.unflatten(0, (-1, 8)).sum(1)
        heavy = mass.unflatten(0, (-1, 8)).mean(1) > 1e-6
        got = found.bias[0, h].double()
        torch.testing.assert_close(got[heavy], weighed[heavy], rtol=5e-3, atol=1e-3)
        assert got.isfinite().all()
        assert (got[:, keys.sizes[0, h] == 0] == 0).all()
