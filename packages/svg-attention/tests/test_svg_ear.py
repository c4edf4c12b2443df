"""SVG-EAR as published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_bias import CLUSTERS, LAYOUT, draw

from svg_attention import SVG2, SVGEAR, LayerMemory
from svg_attention.methods.base import AttentionCall
from svg_attention.planning.probes import probe_means
from svg_attention.planning.scores import score_error

COUNTS: dict[str, Any] = {"q_clusters": 12, "k_clusters": 40, "first_iterations": 8}


@pytest.mark.parametrize("kind", ["clustered", "dominant", "large"])
@pytest.mark.parametrize("rows", [32, 128])
def test_score_error_is_the_squared_error_of_the_weights(kind: str, rows: int) -> None:
    query, key, value = draw(kind)
    call = AttentionCall(
        query=query, key=key, value=value, layout=LAYOUT,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    queries, keys = SVGEAR(**COUNTS).cluster(call)
    video = LAYOUT.video_tokens
    means = probe_means(query[:, :, :video], queries.order, probe_rows=rows)
    got = score_error(means, key[:, :, :video], keys, length=video, probe_rows=rows, scale=0.25)
    for head in range(2):
        for tile in (0, 5):
            want = torch.zeros(40, dtype=torch.float64)
            for probe in range(tile * 128 // rows, (tile + 1) * 128 // rows):
                q = means[0, head, probe].double()
                logits = key[0, head, :video].double() @ q * 0.25
                weights = torch.softmax(logits, dim=-1)
                centre = (keys.centroids[0, head].double() @ q * 0.25 - logits.logsumexp(0)).exp()
                for c in range(40):
                    mine = keys.labels[0, head] == c
                    if mine.any():
                        want[c] += (centre[c] - weights[mine]).square().mean() * rows / 128
            torch.testing.assert_close(
                got[0, head, tile].double(), want, rtol=1e-3, atol=float(want.max()) * 1e-5
            )


def test_svg_ear_reads_what_svg2_would_at_the_same_top_p() -> None:
    tensors = draw("clustered")
    found = {}
    for method in (SVGEAR(**COUNTS, top_p=0.7), SVG2(**COUNTS, top_p=0.7, probe_rows=128)):
        plan = method.plan(
            *tensors, layout=LAYOUT, memory=LayerMemory(),
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        found[type(method)] = plan
    ear, plain = found[SVGEAR], found[SVG2]
    assert float(ear.density().mean()) <= float(plain.density().mean()) + 1e-6
    assert float(ear.density().mean()) > 0.9 * float(plain.density().mean())
    assert not torch.equal(ear.run_starts, plain.run_starts)
    assert ear.summary is not None
    assert ear.probe_density == 0.5 * 6 * LAYOUT.video_tokens / LAYOUT.tokens**2


def test_svg_ear_is_svg2_with_the_published_settings() -> None:
    assert SVGEAR(density=0.2).to_dict()["route"] == "scores"
    assert repr(SVGEAR(density=0.2)) == "SVGEAR(density=0.2)"
    tensors, options = draw("clustered"), {**CLUSTERS, "route": "scores", "probe_rows": 128}
    plans = [
        method.plan(*tensors, layout=LAYOUT, generator=torch.Generator().manual_seed(1))
        for method in (SVGEAR(**COUNTS, density=0.2), SVG2(**options))
    ]
    assert torch.equal(plans[0].run_starts, plans[1].run_starts)
    with pytest.raises(ValueError, match="set compensate=True"):
        SVGEAR(compensate=False)
