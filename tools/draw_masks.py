"""Draw `docs/assets/masks.png`: true attention and what SVG1 and SVG2 compute of it.

Three made-up heads: one looks within its frame, one along time, one at things that look alike
wherever they are. Run with matplotlib and the checkout's packages installed.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from svg_attention import SVG1, SVG2, LayerMemory, SparsePlan, TokenLayout, recall

LAYOUT = TokenLayout(grid=(12, 8, 16))
DENSITY = 0.3
TARGET = Path(__file__).resolve().parents[1] / "docs" / "assets" / "masks.png"


def head(group: Tensor, gain: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make a head in which tokens of one group attend to each other."""
    draw = torch.Generator().manual_seed(seed)
    codes = F.normalize(torch.randn(int(group.max()) + 1, 64, generator=draw), dim=-1)
    noise = torch.randn(3, len(group), 64, generator=draw)
    query = gain * codes[group] + 0.5 * noise[0]
    key = gain * codes[group] + 0.5 * noise[1]
    return query[None, None], key[None, None], noise[2][None, None]


def regions(seed: int) -> Tensor:
    """Paint the clip with smooth moving regions of eleven kinds."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 11, 4, 4, 6, generator=draw)
    fine = F.interpolate(coarse, size=LAYOUT.grid, mode="trilinear", align_corners=True)
    return fine[0].argmax(dim=0).flatten()


def make_plan(method: SVG1 | SVG2, data: tuple[Tensor, Tensor, Tensor]) -> SparsePlan:
    """Plan with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return method.plan(*data, layout=LAYOUT, memory=LayerMemory(), generator=generator)


def attention(data: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the true attention weights of the one head, `[S, S]`."""
    return torch.softmax(data[0] @ data[1].mT / 8.0, dim=-1)[0, 0]


def panel(axes: plt.Axes, image: Tensor, title: str, *, weights: bool) -> None:
    """Show one matrix; weights on a logarithmic scale, masks in black."""
    if weights:
        image = F.max_pool2d(image[None, None], 4)[0, 0].clamp_min(1e-5).log10()
        axes.imshow(image, cmap="magma", vmin=-4.5, vmax=-1.5, interpolation="nearest")
    else:
        image = F.avg_pool2d(image.float()[None, None], 4)[0, 0]
        axes.imshow(image, cmap="Greys", vmin=0, vmax=1.3, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def main() -> None:
    """Draw the picture."""
    token = torch.arange(LAYOUT.video_tokens)
    frame, patch = token // LAYOUT.frame_tokens, token % LAYOUT.frame_tokens
    spatial, temporal = head(frame, 9.0, 0), head(patch, 12.0, 1)
    semantic = head(regions(2), 8.0, 2)
    svg1 = SVG1(density=DENSITY)
    svg2 = SVG2(q_clusters=12, k_clusters=48, density=DENSITY)
    plans = [make_plan(svg1, spatial), make_plan(svg1, temporal), make_plan(svg2, semantic)]
    figure, axes = plt.subplots(2, 4, figsize=(12, 6.6), layout="constrained")
    names = ["a spatial head", "a temporal head", "a head that follows content"]
    for column, (name, data, plan) in enumerate(
        zip(names, (spatial, temporal, semantic), plans, strict=True)
    ):
        method = "SVG1" if column < 2 else "SVG2"
        kept = float(recall(*data[:2], plan))
        panel(axes[0, column], attention(data), f"{name}: true attention", weights=True)
        title = f"what {method} computes: {float(plan.density()):.0%}, keeps {kept:.0%}"
        panel(axes[1, column], plan.to_mask()[0, 0], title, weights=False)
    orders = plans[2].query_order, plans[2].key_order
    rows, columns = (slice(None) if order is None else order[0, 0].long() for order in orders)
    panel(
        axes[0, 3],
        attention(semantic)[rows][:, columns],
        "the same, sorted by cluster",
        weights=True,
    )
    panel(
        axes[1, 3],
        plans[2].to_mask()[0, 0][rows][:, columns],
        "SVG2 reads runs of keys",
        weights=False,
    )
    for side in axes[:, 0]:
        side.set_ylabel("queries")
    for side in axes[1]:
        side.set_xlabel("keys")
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(TARGET, dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
