"""Which device and which precision a pipeline runs in."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from svg_models.errors import MachineError, SettingError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPES",
    "check_device",
    "check_dtype",
    "check_gpus",
    "gpu_names",
    "pick_device",
    "pick_dtype",
]

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,4})?")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = Path("/dev")
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_device(device: str) -> None:
    """Refuse what is no device that this package runs on, without looking whether it is there.

    Raises:
        SettingError: says what there is.
    """
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        raise SettingError(f"device must be auto, cpu, cuda or cuda:N, got '{device}'")


def check_dtype(dtype: str) -> None:
    """Refuse a precision that no pipeline runs in.

    Raises:
        SettingError: says which there are.
    """
    if not isinstance(dtype, str) or _SHORT.get(dtype, dtype) not in DTYPES:
        raise SettingError(f"dtype must be one of {', '.join(DTYPES)}, got '{dtype}'")


def check_gpus(gpus: int, device: str) -> None:
    """Refuse several GPUs beside a device that is one of them, without looking what is there.

    Raises:
        SettingError: says how to choose GPUs.
    """
    if gpus > 1 and device.startswith("cuda:"):
        raise SettingError(
            f"device {device} is one GPU, and {gpus} were asked for; leave --device out, and "
            "choose among the GPUs by the environment variable CUDA_VISIBLE_DEVICES"
        )


def gpu_names(gpus: int) -> tuple[str, ...]:
    """Return what `CUDA_VISIBLE_DEVICES` calls the first GPUs, before torch is imported.

    Args:
        gpus: how many.

    Raises:
        MachineError: if there are fewer.
    """
    names = _visible_gpus()
    if len(names) < gpus:
        raise MachineError(
            f"{gpus} GPUs were asked for, and there {'is' if len(names) == 1 else 'are'} "
            f"{len(names) or 'none'} here; use --device cpu to try it with processes of the CPU, "
            "or ask svg doctor why"
        )
    return tuple(names[:gpus])


def _visible_gpus() -> list[str]:
    if sys.platform == "linux" and not (DEVICES / "dxg").exists():  # of Windows' own Linux
        count = sum(1 for _ in DEVICES.glob("nvidia[0-9]*"))
    else:
        import torch

        count = torch.cuda.device_count()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(index) for index in range(count)]
    names = []
    for name in chosen.split(","):  # CUDA, too, stops at the first that it does not know
        if not name.strip() or (name.strip().lstrip("-").isdigit() and not 0 <= int(name) < count):
            break
        names.append(name.strip())
    return names if count else []


def pick_device(device: str) -> str:
    """Return the torch device that `device` means on this machine.

    Raises:
        SettingError: if it is no device.
        MachineError: if it is a GPU that is not there.
    """
    check_device(device)
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device)
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
    check_dtype(dtype)
    import torch

    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    kind: torch.dtype = getattr(torch, _SHORT.get(dtype, dtype))
    return kind
