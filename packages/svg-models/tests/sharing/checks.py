"""What is checked of a shared transformer, and by which name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from composition.player import Player
from torch import Tensor

from svg_attention import SVG1, SVG2, Method, RandomBlocks, Schedule, SparsePlan, session
from svg_models import sparsify

EVERYWHERE = Schedule(dense_steps=0.0, dense_layers=0.0)
CLUSTERS: dict[str, Any] = dict(q_clusters=4, k_clusters=12, first_iterations=2)
METHODS: dict[str, Method] = {
    "SVG1": SVG1(density=0.5),
    "SVG2": SVG2(top_p=0.6, **CLUSTERS),
    "random blocks": RandomBlocks(density=0.5),
    "SVG2, corrected": SVG2.corrected(0.5, spend="call", repair_rows=8, **CLUSTERS),
}
WAYS = ("dense", *METHODS)


@contextmanager
def plans() -> Iterator[list[SparsePlan]]:
    """Collect the plans of all sparse calls."""
    found: list[SparsePlan] = []
    computed = session.sparse_attention

    def keep(query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan, **options: Any) -> Any:
        found.append(plan)
        return computed(query, key, value, plan, **options)

    session.sparse_attention = keep
    try:
        yield found
    finally:
        session.sparse_attention = computed


Seen = tuple[Tensor, list[Tensor]]


def play(player: Player, method: Method | None) -> Seen:
    """Return what a player's transformer makes, and which pairs each sparse call computes."""
    if method is None:
        return player.play(), []
    with plans() as found, sparsify(player, method, EVERYWHERE):
        video = player.play()
    return video, [plan.to_mask() for plan in found]


def compare(alone: Seen, team: list[Seen]) -> None:
    """Raise unless every rank of a team made the video of one process, by the same plans."""
    video, masks = alone
    for made, _ in team:
        assert torch.equal(made, team[0][0]), "ranks made different videos"
    for number, mask in enumerate(masks):
        heads = torch.cat([seen[number] for _, seen in team], dim=1)
        assert torch.equal(heads, mask), f"sparse call {number} has another plan"
        assert not mask.all(), f"call {number} is not sparse"
    torch.testing.assert_close(
        team[0][0], video, rtol=0.0, atol=1e-5 * float(video.abs().max().clamp(min=1.0))
    )
