"""GELU, written where the caller wants it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from svg_kernels import _dispatch
from svg_kernels._checks import check_rows
from svg_kernels._dispatch import define_op, select_backend

__all__ = ["gelu"]

APPROXIMATIONS = ("none", "tanh")


def gelu(
    x: Tensor,
    *,
    approximate: Literal["none", "tanh"] = "none",
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute `x Phi(x)`, Phi the normal distribution function.

    With `approximate="tanh"` it is `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`. Computed in
    fp32, rounded once. What torch's own needs twice the time for is a result with gaps between its
    rows, as one half of a wider tensor has.

    Args:
        x: `[..., C]`, fp16, bf16 or fp32, any strides.
        approximate: `"none"` or `"tanh"`.
        out: where to write the result: shaped and typed as `x`, its last axis contiguous, its other
            axes of any strides; None allocates. It may be `x`, but not overlap it otherwise.
        backend: `"auto"`, `"triton"` or `"reference"`; there is no compiled one, since Triton's
            moves as many bytes a second as a copy does.

    Returns:
        `out`, or a contiguous tensor. For inference: no gradient flows through it.

    Raises:
        TypeError: if the dtype is none of the three.
        ValueError: if the approximation is unknown or `out` does not fit.
        UnsupportedError: if `backend` cannot run on this device; it lists each backend's reason.

    Source: Hendrycks & Gimpel 2016, arXiv:1606.08415.
    """
    check_rows("x", x)
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate must be one of {APPROXIMATIONS}, got {approximate!r}")
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    elif (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device) or (
        out.stride(-1) != 1 and out.shape[-1] > 1
    ):
        raise ValueError(
            f"out must be {list(x.shape)} in {x.dtype} on {x.device} with its last axis "
            f"contiguous, got {list(out.shape)} in {out.dtype} on {out.device}, strides "
            f"{list(out.stride())}"
        )
    _gelu(x, out, approximate, backend)
    return out


def unsupported(name: str, device: torch.device) -> str | None:
    """Return in a sentence why the backend `name` cannot run on `device`, None if it can."""
    if name == "cuda":
        return "GELU is computed by Triton, there is no compiled kernel"
    return _dispatch.unsupported(name, device)


def _run(x: Tensor, out: Tensor, approximate: str, backend: str) -> None:
    module = select_backend(__name__, backend, x.device, unsupported=unsupported)
    module.gelu(x, out, approximate)


def _fake(x: Tensor, out: Tensor, approximate: str, backend: str) -> None:
    return None


_gelu = define_op(
    "gelu", "(Tensor x, Tensor(a!) out, str approximate, str backend) -> ()", _run, _fake
)
