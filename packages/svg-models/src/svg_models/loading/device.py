"""Which device and which precision a pipeline runs in."""

from __future__ import annotations

import torch

from svg_models.errors import MachineError, SettingError

__all__ = ["pick_device", "pick_dtype"]


def pick_device(device: str) -> str:
    """Return the torch device that `device` means on this machine.

    Raises:
        SettingError: if it is no device.
        MachineError: if it is a GPU that is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise SettingError(f"device must be auto, cpu, cuda or cuda:N, got '{device}'") from None
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise MachineError(
            f"device {device} was asked for, but torch sees {count or 'no'} CUDA GPU"
            f"{'s' if count > 1 else ''} here; use --device cpu, or ask svg doctor why"
        )
    return str(kind)


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """Return the torch dtype that `dtype` means on `device`.

    Raises:
        SettingError: if it is none of those a pipeline runs in.
    """
    names = {
        "auto": torch.float32 if device == "cpu" else torch.bfloat16,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(dtype, dtype)
    if short not in names:
        raise SettingError(f"dtype must be one of {', '.join(names)}, got '{dtype}'")
    return names[short]
