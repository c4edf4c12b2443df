"""Whether a model fits this machine, from the number of its parameters."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING

from svg_models.errors import MachineError

if TYPE_CHECKING:
    import torch

__all__ = ["GIB", "check_memory", "machine_memory", "weight_bytes"]

GIB = 1024**3
_LARGEST_CPU_TRANSFORMER = 2e9  # parameters; beyond it one clip takes days on a CPU


def weight_bytes(
    sizes: dict[str, int], dtype: torch.dtype, precise: Collection[str] = ()
) -> dict[str, int]:
    """Return the bytes each component's weights take in `dtype`, those of `precise` in float32."""
    return {n: count * (4 if n in precise else dtype.itemsize) for n, count in sizes.items()}


def check_memory(
    name: str,
    sizes: dict[str, int],
    device: str,
    dtype: torch.dtype,
    *,
    precise: Collection[str] = (),
    explicit_cpu: bool = False,
    offload: str = "none",
) -> None:
    """Refuse a model that this machine cannot hold, before any weight is read.

    Args:
        name: of the model.
        sizes: parameters per component.
        device: where it would run.
        dtype: of the weights.
        precise: components that stay in float32.
        explicit_cpu: the person asked for the CPU, so only memory counts, not time.
        offload: a key of `svg_models.loading.placement.OFFLOAD`: what has to fit the GPU.

    Raises:
        MachineError: with an estimate of what is needed.
    """
    import torch

    billions = max((n for part, n in sizes.items() if "transformer" in part), default=0) / 1e9
    gpu_bytes = weight_bytes(sizes, torch.bfloat16 if device == "cpu" else dtype, precise)
    what = f"{name} has {billions:.1f} billion parameters"
    if device == "cpu":
        if billions * 1e9 > _LARGEST_CPU_TRANSFORMER and not explicit_cpu:
            raise MachineError(
                f"{what} and needs a CUDA GPU with about {_gib(sum(gpu_bytes.values()))} for its "
                "weights, but this machine has none; run it on one, or leave --model out to use "
                "the embedded model"
            )
        need, have = sum(weight_bytes(sizes, dtype, precise).values()), machine_memory()
        if need > 0.9 * have:
            raise MachineError(
                f"{what}, whose weights take {_gib(need)} in {str(dtype).removeprefix('torch.')}, "
                f"and this machine has {_gib(have)} of memory; leave --model out to use the "
                "embedded model"
            )
        return
    total = torch.cuda.get_device_properties(device).total_memory
    need = {
        "none": sum(gpu_bytes.values()),
        "model": max(gpu_bytes.values(), default=0),
    }.get(offload, 0)  # the others hold a few layers at a time
    if need > 0.95 * total:
        hint = "group" if offload == "model" or max(gpu_bytes.values()) > 0.95 * total else "model"
        hint = f"add --offload {hint}, or use a larger GPU"
        raise MachineError(
            f"{what}, which take {_gib(need)}, and the GPU has {_gib(total)}; {hint}"
        )


def _gib(size: float) -> str:
    return f"{size / GIB:.0f} GiB" if size >= 10 * GIB else f"{size / GIB:.1f} GiB"


def machine_memory() -> int:
    """Return the bytes of memory of this machine."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 16 * GIB  # no portable way to ask
