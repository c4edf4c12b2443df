"""Launch the planning kernels on small shapes; run by `nox -s sanitize`.

Their values are checked by the tests of each operation; here they only have to be finite.
"""

from __future__ import annotations

import torch

from svg_attention.planning.order import long_tiles_first
from svg_attention.planning.pattern_error import pattern_error
from svg_attention.planning.probe_sums import probe_sums
from svg_attention.planning.probes import probe_mass, probe_means
from svg_attention.planning.runs import merge_clusters, round_runs
from svg_attention.planning.selection import keep_budget, keep_top_p


def main() -> None:
    """Run the planning kernels one after another."""
    draw = torch.Generator().manual_seed(1)
    query = torch.randn(1, 2, 300, 64, generator=draw).cuda().half()
    order = torch.rand(1, 2, 300, generator=draw).argsort(-1).int().cuda()
    centroids = torch.randn(1, 1, 40, 64, generator=draw).cuda().half()
    sizes = torch.randint(0, 15, (1, 1, 40), generator=draw).int().cuda()
    value = torch.randn(1, 1, 300, 32, generator=draw).cuda().half()
    means = probe_means(query, order)
    mass = probe_mass(means, centroids, sizes, length=300, scale=0.1)
    sizes = sizes.expand(1, 2, 40).contiguous()
    priority = mass / sizes.clamp(min=1)[:, :, None]
    budget = torch.full(mass.shape[:3], 90.0, device="cuda")
    for kept in (
        keep_top_p(priority, mass, sizes, top_p=0.5, min_clusters=3),
        keep_budget(priority, sizes, budget),
    ):
        ends = torch.nn.functional.pad(sizes.cumsum(-1), (0, 1)).int()
        ends[..., -1] = ends[..., -2] + 7
        starts, lengths = merge_clusters(kept, ends)
        limit = ends[:, 0, -1].contiguous()
        round_runs(starts, lengths, multiple=8, limit=limit)
        long_tiles_first(lengths)
    sizes = torch.full((1, 1, 40), 7, dtype=torch.int32, device="cuda")
    sizes[..., -1] += 20
    errors, biases, *_ = probe_sums(
        *(means, query[:, :1], value, order[:, :1], centroids, centroids[..., :32], sizes),
        length=300,
        scale=0.1,
    )
    reads = torch.full((1, 5, 300), 7, dtype=torch.uint8, device="cuda")
    lost = pattern_error(query[:, :, :5], query[:, :1], value, reads, scale=0.1)
    torch.cuda.synchronize()
    assert torch.isfinite(errors).all()
    assert torch.isfinite(biases).all()
    assert torch.isfinite(lost).all()
    print("every kernel ran")


if __name__ == "__main__":
    main()
