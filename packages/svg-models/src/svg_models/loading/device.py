"""Which device and which precision a pipeline runs in."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from svg_models.errors import MachineError, SettingError

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "check_device", "check_dtype", "pick_device", "pick_dtype"]

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,4})?")
DTYPES = ("auto", "float32", "bfloat16", "float16")
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
