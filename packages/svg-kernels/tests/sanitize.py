"""Launch the attention and planning kernels on small shapes; run by `nox -s sanitize`.

Results are checked by test_attention_gpu.py; here they only have to be finite.
"""

from __future__ import annotations

import torch
from attention_oracles import random_call

from svg_kernels import block_sparse_attention, permute_rows, planning


def attend(draw: torch.Generator, backend: str) -> None:
    """Run every head size and list of runs that takes a path of its own."""
    # Scores of a large magnitude have the compiled kernel raise its maxima.
    for dim, dtype, runs, summaries, granule, magnitude in (
        (128, torch.bfloat16, 40, 0, 1, 1.0),
        (128, torch.float16, 5, 130, 1, 1.0),
        (64, torch.bfloat16, 100, 9, 1, 100.0),
        (128, torch.bfloat16, 5, 0, 8, 100.0),
        (128, torch.float16, 5, 9, 8, 100.0),
    ):
        arguments, keywords = random_call(
            draw, dtype=dtype, queries=300, keys=437, runs=runs, dim=dim, summaries=summaries,
            ordered=True, key_heads=1, magnitude=magnitude, granule=granule,
        )  # fmt: skip
        keywords = {
            name: tuple(part.cuda() for part in x) if isinstance(x, tuple) else x.cuda()
            for name, x in keywords.items()
        }
        out, _ = block_sparse_attention(
            *(x.cuda() for x in arguments), return_lse=True, backend=backend, **keywords
        )
        assert torch.isfinite(out).all(), (backend, dim)


def plan(draw: torch.Generator) -> None:
    """Run the planning kernels one after another."""
    query = torch.randn(1, 2, 300, 64, generator=draw).cuda().half()
    order = torch.rand(1, 2, 300, generator=draw).argsort(-1).int().cuda()
    centroids = torch.randn(1, 1, 40, 64, generator=draw).cuda().half()
    sizes = torch.randint(0, 15, (1, 1, 40), generator=draw).int().cuda()
    means = planning.probe_means(query, order)
    mass = planning.probe_mass(means, centroids, sizes, length=300, scale=0.1)
    sizes = sizes.expand(1, 2, 40).contiguous()
    priority = mass / sizes.clamp(min=1)[:, :, None]
    budget = torch.full(mass.shape[:3], 90.0, device="cuda")
    for kept in (
        planning.keep_top_p(priority, mass, sizes, top_p=0.5, min_clusters=3),
        planning.keep_budget(priority, sizes, budget),
    ):
        ends = torch.nn.functional.pad(sizes.cumsum(-1), (0, 1)).int()
        ends[..., -1] = ends[..., -2] + 7
        starts, lengths = planning.merge_clusters(kept, ends)
        limit = ends[:, 0, -1].contiguous()
        planning.round_runs(starts, lengths, multiple=8, limit=limit)
    permute_rows(query, order)


def main() -> None:
    draw = torch.Generator().manual_seed(1)
    for backend in ("cuda", "triton"):
        attend(draw, backend)
    plan(draw)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
