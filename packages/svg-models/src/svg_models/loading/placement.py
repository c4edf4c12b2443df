"""Put a pipeline on its device, whole or in parts."""

from __future__ import annotations

from typing import Any

from svg_models.errors import SettingError

__all__ = ["OFFLOAD", "check_offload", "compile_transformers", "place"]

OFFLOAD: dict[str, str] = {
    "none": "everything stays on the GPU",
    "model": "the component that runs is on the GPU; fast, and needs room for the largest one",
    "group": "layers come to the GPU while the ones before them compute; little memory",
    "sequential": "one layer at a time; least memory, slow",
}


def check_offload(offload: str, device: str, *, compiled: bool = False) -> None:
    """Refuse an offloading that does not exist or makes no sense.

    Args:
        offload: a key of `OFFLOAD`.
        device: where the pipeline runs.
        compiled: whether the transformer will be compiled.

    Raises:
        SettingError: if it is unknown, or there is no GPU to keep free, or it moves layers that
            are compiled.
    """
    if offload not in OFFLOAD:
        raise SettingError(f"offload must be one of {', '.join(OFFLOAD)}, got '{offload}'")
    if offload != "none" and device == "cpu":
        raise SettingError(
            f"offload '{offload}' moves weights between a GPU and memory, and this runs on the "
            "CPU; leave --offload out"
        )

    if compiled and offload in ("group", "sequential"):
        raise SettingError(
            f"offload '{offload}' moves layers between calls, which compiled blocks cannot; "
            "leave --compile out, or take --offload model"
        )


def compile_transformers(pipe: Any) -> None:
    """Compile the blocks of each transformer, or all of it where it names no blocks."""
    for name in ("transformer", "transformer_2"):
        network = getattr(pipe, name, None)
        if network is None:
            continue
        if getattr(network, "_repeated_blocks", None):
            network.compile_repeated_blocks(fullgraph=True)
        else:
            network.compile()


def place(pipe: Any, device: str, offload: str = "none") -> None:
    """Put a pipeline on its device.

    Args:
        pipe: a diffusers pipeline in CPU memory.
        device: where it runs.
        offload: a key of `OFFLOAD`.
    """
    import torch

    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(
            torch.device(device),
            offload_type="leaf_level",
            use_stream=torch.device(device).type == "cuda",
        )
    else:
        pipe.to(device)
