"""One of two processes that wrap a transformer as trainers and servers do.

Started by `test_wrappers.py`, which reads one line for each way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import tiny
import torch
import torch.distributed as dist
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from processes import join_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from svg_attention import SVG2, Dense, Schedule
from svg_models import sparsify

EVERYWHERE = Schedule(dense_steps=0.0, dense_layers=0.0)
SPARSE = SVG2(q_clusters=6, k_clusters=12, top_p=0.6, first_iterations=4)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def fsdp(model: nn.Module) -> nn.Module:
    # Wan asks its parameters for their dtype, so they must be there, as they are.
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def sharded_in_place(model: nn.Module) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    sharded: nn.Module = fully_shard(model, mesh=mesh)
    return sharded


def checkpointed(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, WanTransformerBlock))
    return model


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "DDP of a compiled one": lambda model: DistributedDataParallel(compiled(model)),
    "FSDP": fsdp,
    "FSDP, then compiled": lambda model: compiled(fsdp(model)),
    "FSDP 2": sharded_in_place,
    "checkpointed blocks": checkpointed,
}


def check(wrap: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """Run a wrapped transformer dense and sparse, beside one without wrapper."""
    model, inputs = tiny.transformer(), tiny.forward_inputs()

    def forward(called: Any) -> torch.Tensor:
        with model.cache_context("cond", step_index=1, num_inference_steps=4):
            out: torch.Tensor = called(**inputs)[0]
            return out

    with torch.no_grad():
        stock = forward(model)
        with sparsify(model, SPARSE, EVERYWHERE):
            alone = forward(model)
        wrapped = wrap(model)
        with sparsify(wrapped, Dense(), EVERYWHERE):
            dense = forward(wrapped)
        with sparsify(wrapped, SPARSE, EVERYWHERE) as run:
            sparse = forward(wrapped)
        restored = forward(wrapped)
    return {
        "dense": torch.equal(dense, stock),
        "sparse": torch.equal(sparse, alone) and not torch.equal(sparse, stock),
        "restored": torch.equal(restored, stock),
        "calls": [record.method for record in run.stats().records],
        "messages": run.messages,
    }


if __name__ == "__main__":
    join_ranks()
    for name, way in WAYS.items():
        found = [None, None]
        dist.all_gather_object(found, check(way))
        if dist.get_rank() == 0:
            print(json.dumps([name, found]))
    dist.destroy_process_group()
