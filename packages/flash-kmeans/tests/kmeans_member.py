"""What one process of a group does in the tests; a module of its own, so that it can be spawned."""

from __future__ import annotations

import torch
from kmeans_oracles import blobs

import flash_kmeans as fk


def member(rank: int, world: int, where: str, metric: str, results: str, device: str) -> None:
    """Cluster this rank's share of the points and store what came out."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{where}",
        rank=rank,
        world_size=world,
    )
    x = blobs(1, 500, 6, 5)[0].to(device)
    weight = (torch.arange(500) % 4 + 0.5).to(device)
    mine = slice(0, 200) if rank == 0 else slice(200, 500)
    given = fk.kmeans_distributed(
        x[mine], 5, init=x[:5], metric=metric, max_iter=4, sample_weight=weight[mine]
    )
    drawn = fk.kmeans_distributed(
        x[mine],
        5,
        metric=metric,
        max_iter=50,
        tol=1e-6 if metric == "euclidean" else 0.0,
        # Only the first process's draws count.
        generator=torch.Generator().manual_seed(3 + rank),
    )
    torch.save({"given": vars(given), "drawn": vars(drawn)}, f"{results}.{rank}")
    torch.distributed.destroy_process_group()


def refused_member(rank: int, world: int, where: str, results: str) -> None:
    """Cluster with a bad weight, then with a bad point, on process 1; store what was said."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{where}", rank=rank, world_size=world
    )
    x = blobs(1, 40, 3, 4)[0]
    said = {}
    for name in ("weights", "points"):
        points, weight = x.clone(), torch.ones(40)
        if rank == 1:
            (weight if name == "weights" else points)[5] = torch.nan
        try:
            fk.kmeans_distributed(points, 3, init=x[:3], max_iter=2, sample_weight=weight)
        except ValueError as error:
            said[name] = str(error)
    torch.save(said, f"{results}.{rank}")
    torch.distributed.destroy_process_group()
