"""One of two processes that share clips of pipelines placed in parts or compiled, on the CPU.

Prints how far the sparse clip of each is from that of one process, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tiny
import torch
import torch.distributed as dist
from processes import join_ranks

from svg_attention import SVG2, Schedule
from svg_models import parallelize, sparsify
from svg_models.loading.placement import compile_transformers

METHOD = SVG2(q_clusters=6, k_clusters=12, top_p=0.6, first_iterations=4)
SCHEDULE = Schedule(dense_steps=0.0, dense_layers=0.0)
# As `svg_models.loading.placement` does it on a GPU; accelerate's sequential offloading has no way
# to run on a CPU.
WAYS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda pipe: None,
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "group": lambda pipe: pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
    "compiled": compile_transformers,
}


def clip(pipe: Any) -> torch.Tensor:
    with sparsify(pipe, METHOD, SCHEDULE):
        return tiny.generate(pipe)


def main() -> None:
    join_ranks()
    alone = clip(tiny.pipeline())
    found = {}
    for name, place in WAYS.items():
        pipe = tiny.pipeline()
        place(pipe)
        parallelize(pipe)
        found[name] = [(clip(pipe) - alone).abs().max().item() for _ in range(2)]
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
