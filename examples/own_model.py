"""Sparse attention in a model of your own, without diffusers: plan once, attend, measure."""

from __future__ import annotations

import torch

from svg_attention import (
    SVG2,
    TokenLayout,
    dense_attention,
    recall,
    sparse_attention,
)


def clip(layout: TokenLayout, heads: int = 2, head_dim: int = 64) -> list[torch.Tensor]:
    """Draw queries, keys and values whose tokens fall into groups, as those of a video do."""
    generator = torch.Generator().manual_seed(0)
    groups = 1.5 * torch.randn(16, head_dim, generator=generator)
    which = torch.randint(16, (layout.tokens,), generator=generator)
    noise = torch.randn(3, 1, heads, layout.tokens, head_dim, generator=generator)
    return list(groups[which] + 0.25 * noise)


def main() -> None:
    """Compare sparse attention with dense attention on one made-up clip."""
    layout = TokenLayout(grid=(8, 12, 16), text_tokens=32)
    query, key, value = clip(layout)

    method = SVG2(q_clusters=24, k_clusters=48, density=0.25)
    plan = method.plan(query, key, value, layout=layout)
    out = sparse_attention(query, key, value, plan)

    exact = dense_attention(query, key, value)
    error = (out - exact).norm() / exact.norm()
    print(f"density {plan.density().mean():.2f}")
    print(f"share of the attention kept {recall(query, key, plan).mean():.3f}")
    print(f"relative error {error:.3f}")


if __name__ == "__main__":
    main()
