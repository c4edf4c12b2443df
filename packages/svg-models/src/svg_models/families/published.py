"""Settings that somebody published, as data."""

from __future__ import annotations

from dataclasses import dataclass

from svg_attention import Schedule

__all__ = ["SHARED", "Published"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Settings that somebody published for one checkpoint at one size.

    Attributes:
        title: checkpoint, size and steps, for people.
        task: see `Family.task`.
        tokens: video tokens of that size.
        schedule: dense warm-up steps and layers.
        q_clusters: query clusters of SVG2 per head.
        k_clusters: key clusters of SVG2 per head.
        svg1_density: share of the keys that SVG1 keeps.
        source: where it was published.
        width: channels of that checkpoint's transformer; 0 if it does not matter.
        top_p: share of the estimated attention mass that SVG2 keeps.
        min_keep: share of the key clusters that SVG2 keeps at least.
    """

    title: str
    task: str
    tokens: int
    schedule: Schedule
    q_clusters: int
    k_clusters: int
    svg1_density: float
    source: str
    width: int = 0
    top_p: float = 0.9
    min_keep: float = 0.1


SHARED = Published(
    title="most models at 720p",
    task="t2v",
    tokens=75_600,
    schedule=Schedule(dense_steps=0.2, dense_layers=0.03),
    q_clusters=300,
    k_clusters=1000,
    svg1_density=0.3,
    source="Sparse-VideoGen 5ce7b01, scripts/wan/wan_t2v_720p_sap.sh",
    width=5120,
)
"""What a family without published settings gets."""
