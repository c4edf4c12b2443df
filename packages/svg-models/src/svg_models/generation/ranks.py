"""Clips made by several processes, each with a GPU and the model of its own.

Nothing here imports torch before a process has its environment, which says what its GPU is.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from svg_models.errors import MachineError, SettingError, about_memory
from svg_models.generation.request import GenerateRequest
from svg_models.launch import Place, Rank
from svg_models.loading.device import gpu_names

if TYPE_CHECKING:
    from svg_models.generation.clip import Clip
    from svg_models.loading import LoadedPipeline
    from svg_models.parallel import SharedRun

__all__ = ["clip_maker", "places_of"]


def places_of(request: GenerateRequest) -> tuple[Place, ...]:
    """Return where the processes of a request run.

    Raises:
        MachineError: if there are fewer GPUs than were asked for, or this is Windows.
    """
    if sys.platform == "win32":
        raise MachineError("several processes are started on Linux and macOS alone; use --gpus 1")
    if request.device == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        share = str(max(1, (cores or 1) // request.gpus))
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", share)}
        return tuple(
            Place(name=f"process {number}", environment=threads) for number in range(request.gpus)
        )
    return tuple(
        # A process that sees one GPU cannot take another's.
        Place(name=f"the process of GPU {name}", environment={"CUDA_VISIBLE_DEVICES": name})
        for name in gpu_names(request.gpus)
    )


def clip_maker(rank: Rank) -> Callable[[GenerateRequest], Clip | None]:
    """Return what makes clips in one of several processes; see `launch.Work`.

    The model is loaded for the first clip and kept. Only rank 0 returns a clip.
    """
    loaded: LoadedPipeline | None = None
    shared: SharedRun | None = None

    def make(request: GenerateRequest) -> Clip | None:
        nonlocal loaded, shared
        from svg_models.generation.sample import clip_of, prepare

        device = "cpu" if request.device == "cpu" else "cuda"
        if loaded is None:
            if rank.size > 1:
                _meet(rank, device)
            wanted = request.replace(device=device, gpus=1, progress=rank.report)
        else:
            wanted = request.with_model(loaded).replace(progress=rank.report)
        ready, settings, media = prepare(wanted, wanted.spec)
        if loaded is None:
            if rank.size > 1:
                shared = _share(ready, rank.size)
            loaded = ready
        clip = clip_of(wanted, ready, settings, media)
        if shared is not None:
            clip = dataclasses.replace(clip, stats=shared.merged(clip.stats))
        return dataclasses.replace(clip, gpus=rank.size) if rank.number == 0 else None

    return _naming_its_gpu(make)


def _naming_its_gpu(
    make: Callable[[GenerateRequest], Clip | None],
) -> Callable[[GenerateRequest], Clip | None]:
    """Have the sentence about memory say which GPU it is of; for its process each is GPU 0."""

    def told(request: GenerateRequest) -> Clip | None:
        import torch

        try:
            return make(request)
        except torch.OutOfMemoryError as error:
            raise MachineError(
                f"the memory of GPU {os.environ.get('CUDA_VISIBLE_DEVICES', '0')} was not enough "
                f"({about_memory(error)}); take fewer frames, a smaller size, or --offload"
            ) from error

    return told


def _meet(rank: Rank, device: str) -> None:
    """Join the process group of all ranks."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=dist.TCPStore("127.0.0.1", rank.store_port, is_master=False),
        rank=rank.number,
        world_size=rank.size,
        device_id=None if device == "cpu" else torch.device("cuda", 0),
    )


def _share(loaded: LoadedPipeline, ranks: int) -> SharedRun:
    """Have the ranks compute a share of each clip.

    Returns:
        What they share.

    Raises:
        SettingError: if so many cannot.
    """
    from svg_attention import UnsupportedError
    from svg_models.parallel import parallelize

    try:
        return parallelize(loaded.pipe)
    except UnsupportedError as error:
        raise SettingError(
            f"{loaded.name} cannot be made by {ranks} processes together "
            f"({'; '.join(error.reasons.values())}); use fewer --gpus"
        ) from error
