"""What this machine can run, as data: `svg doctor` prints it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from svg_kernels import _build, _dispatch, _library
from svg_kernels._dispatch import BackendStatus


@dataclass(frozen=True, kw_only=True)
class Status:
    """The backends on one device, which of them `auto` takes, and where the library came from.

    Attributes:
        device: the device asked about.
        backends: one `BackendStatus` each, best first.
        auto: the backend that `"auto"` takes.
        library: file of the compiled library, or None if none is loaded.
        nvcc: the compiler a first-use build would take, or None.
    """

    device: str
    backends: tuple[BackendStatus, ...]
    auto: str
    library: str | None
    nvcc: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def status(device: torch.device | str | None = None) -> Status:
    """Return which backends can run on `device` and why the others cannot.

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
    backends = tuple(_dispatch.backend_status(name, device) for name in _dispatch.ORDER)
    library = _library.path(device) if device.type == "cuda" else None
    nvcc = _build.find_nvcc()
    return Status(
        device=str(device),
        backends=backends,
        auto=_dispatch.auto_backend(device),
        library=None if library is None else str(library),
        nvcc=None if nvcc is None else str(nvcc),
    )
