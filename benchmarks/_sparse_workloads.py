"""The workloads of the sparse attention benchmark, their data, and how results are checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg_attention import SparsePlan, TokenLayout
from svg_attention.tiles import match_heads
from svg_kernels.attention.reference import read_mask

HEAD_DIM = 128


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One model's self-attention, and how many clusters of queries and keys it is given."""

    name: str
    heads: int
    layout: TokenLayout
    clusters: tuple[int, int] = (300, 1000)


WORKLOADS = (
    Workload(name="Wan 720p", heads=40, layout=TokenLayout(grid=(21, 45, 80))),
    Workload(name="Wan 720p", heads=40, layout=TokenLayout(grid=(21, 45, 80)), clusters=(100, 500)),
    Workload(
        name="HunyuanVideo 720p", heads=24, layout=TokenLayout(grid=(33, 45, 80), text_tokens=256)
    ),
    Workload(name="Wan 480p", heads=40, layout=TokenLayout(grid=(21, 30, 52)), clusters=(100, 500)),
)


def structured(work: Workload, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, keys and values whose attention follows the place in the clip."""
    draw = torch.Generator(device="cuda").manual_seed(seed)
    layout = work.layout
    axes = [torch.arange(n, device="cuda") / n for n in layout.grid]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3)
    shape = (1, work.heads, layout.tokens, HEAD_DIM)
    query, key, value = (
        torch.randn(shape, device="cuda", generator=draw).to(torch.bfloat16) for _ in range(3)
    )
    video = slice(layout.video_start, layout.video_start + layout.video_tokens)
    for head in range(work.heads):
        frequency = torch.randn(3, HEAD_DIM, device="cuda", generator=draw) * (2 + head % 8)
        phase = torch.rand(HEAD_DIM, device="cuda", generator=draw) * 2 * math.pi
        base = 1.5 * torch.cos(place @ frequency * math.pi + phase)
        for x in (query, key):
            x[0, head, video] = (base + 0.7 * x[0, head, video].float()).to(x.dtype)
    return query, key, value


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend to everything with cuDNN's kernel."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value)


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend in fp64; `[N, D]` each."""
    return F.scaled_dot_product_attention(
        query[None].double(), key[None].double(), value[None].double()
    )[0]


def check_close(name: str, got: Tensor, want: Tensor, limit: float = 5e-3) -> None:
    """Raise RuntimeError unless the relative error of a kernel is below `limit`."""
    error = ((got.double() - want).norm() / want.norm()).item()
    if not error < limit:
        raise RuntimeError(f"{name}: relative error {error:.2e} against fp64, limit {limit:.0e}")


def check_plan(
    name: str, query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan, out: Tensor
) -> None:
    """Compare sampled tiles of a plan with fp64."""
    token = torch.arange(plan.key_length, device=query.device)
    for head in (0, plan.heads - 1):
        for tile in (0, plan.tiles // 2, plan.tiles - 1):
            rows = slice(tile * plan.tile_rows, (tile + 1) * plan.tile_rows)
            order = token if plan.query_order is None else plan.query_order[0, head].long()
            tokens = order[rows]
            starts, lengths = (x[0, head, tile] for x in (plan.run_starts, plan.run_lengths))
            read = read_mask(starts, lengths, plan.key_length)
            keys = token
            if plan.key_order is not None:
                keys = match_heads(plan.key_order, plan.heads)[0, head].long()
            keys = keys[read]
            want = exact(query[0, head, tokens], key[0, head, keys], value[0, head, keys])
            check_close(f"{name}, head {head}, tile {tile}", out[0, head, tokens], want)
