"""What this machine can run, as data: `svg doctor` prints it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from svg_kernels import _backends, _build, _library
from svg_kernels._backends import Tier


@dataclass(frozen=True, kw_only=True)
class Status:
    """The tiers on one device, which of them `auto` takes, and where the library came from.

    Attributes:
        device: the device asked about.
        tiers: one `Tier` per backend, best first.
        auto: the backend that `"auto"` takes.
        library: file of the compiled library, or None if none is loaded.
        nvcc: the compiler a first-use build would take, or None.
    """

    device: str
    tiers: tuple[Tier, ...]
    auto: str
    library: str | None
    nvcc: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def status(device: torch.device | str | None = None) -> Status:
    """Say which backends can run on `device` and why the others cannot.

    Asking about a GPU loads the compiled library, or builds it where nvcc is found.

    Args:
        device: the current GPU if there is one, else the CPU, by default.

    Returns:
        A `Status`; `status().to_dict()` is plain data.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    tiers = tuple(_backends.probe(name, device) for name in _backends.ORDER)
    library, nvcc = _library.path(), _build.find_nvcc()
    return Status(
        device=str(device),
        tiers=tiers,
        auto=_backends.auto(device),
        library=None if library is None else str(library),
        nvcc=None if nvcc is None else str(nvcc),
    )
