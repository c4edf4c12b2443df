"""Make a video transformer of your own sparse: a session, and one line in its attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svg_attention import SVG2, Schedule, Session, TokenLayout


class Block(nn.Module):
    """A block of a small DiT; `attend` is what computes its self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.attend = F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        x = x + self.out(self.attend(query, key, value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


def denoise(blocks: nn.ModuleList, x: Tensor, steps: int, session: Session | None) -> Tensor:
    """Run a toy denoising loop, dense or, with a session, sparse after its first steps."""
    for layer, block in enumerate(blocks):
        if session is not None:
            block.attend = lambda *qkv, layer=layer: session.attend(*qkv, layer=layer)
        else:
            block.attend = F.scaled_dot_product_attention
    for step in range(steps):
        h = x
        if session is None:
            for block in blocks:
                h = block(h)
        else:
            with session.step(step):  # with guidance, one for each branch: branch="uncond"
                for block in blocks:
                    h = block(h)
        x = x + (h - x) / steps
    return x


@torch.inference_mode()
def main() -> None:
    """Compare a toy transformer, sparse, with itself, dense."""
    torch.manual_seed(0)
    layout = TokenLayout(grid=(6, 12, 16))  # latent frames, rows, columns of tokens
    blocks = nn.ModuleList(Block(width=64, heads=2) for _ in range(3))
    groups = 3 * torch.randn(16, 64)[torch.randint(16, (layout.tokens,))]
    noise = groups[None] + 0.3 * torch.randn(1, layout.tokens, 64)

    steps = 10
    session = Session(
        SVG2(density=0.3, q_clusters=16, k_clusters=32, compensate=True),
        Schedule(dense_steps=0.2, dense_layers=0.0),
        layout=layout,
        num_steps=steps,
        num_layers=len(blocks),
    )
    sparse = denoise(blocks, noise, steps, session)
    dense = denoise(blocks, noise, steps, None)

    records = session.records()
    computed = sum(record.density for record in records) / len(records)
    print(f"attention computed {computed:.2f}")
    print(f"relative error {((sparse - dense).norm() / dense.norm()):.4f}")


if __name__ == "__main__":
    main()
