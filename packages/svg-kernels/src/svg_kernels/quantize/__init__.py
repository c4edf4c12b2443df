"""Rows in fp8 with a scale each, as matrix products with scaled rows take them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from svg_kernels import _dispatch
from svg_kernels._checks import check_rows
from svg_kernels._dispatch import define_op, select_backend

__all__ = ["quantize_rows"]

Activation = Literal["none", "gelu", "gelu_tanh"]
ACTIVATIONS = ("none", "gelu", "gelu_tanh")
LARGEST_E4M3 = 448.0
SMALLEST = 1e-12  # largest value of a row that is scaled as if it were this


def quantize_rows(
    x: Tensor,
    *,
    activation: Activation = "none",
    largest: float = LARGEST_E4M3,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Apply an activation and round each row to e4m3, its largest value scaled to `largest`.

    `y = activation(x)`, `scale = max(|y|) / largest`, `q = round(y / scale)`; all in fp32, `q`
    rounded once. A row of zeros gets the scale of 1e-12. What is NaN or infinite makes its own row
    NaN in a product, and no other.

    e4m3 repeats itself from one power of two to the next, so every `largest` between 224 and 448
    gives as small an error, but another one: the mean over several of them is nearer to `x`.

    Args:
        x: `[..., C]`, fp16, bf16 or fp32, any strides.
        activation: `"none"`, `"gelu"` (by the error function) or `"gelu_tanh"` (its approximation).
        largest: what the largest value of a row becomes, above 0 and at most 448, e4m3's own.
        backend: `"auto"`, `"triton"` or `"reference"`; there is no compiled one, since Triton's
            moves as many bytes a second as a copy does.

    Returns:
        e4m3 `[..., C]` and fp32 `[..., 1]`, contiguous: `x` is about `q * scale`. For inference: no
        gradient flows through it.

    Raises:
        TypeError: if the dtype is none of the three.
        ValueError: if the activation is unknown, or `largest` is out of its range.
        UnsupportedError: if `backend` cannot run on this device; it lists each backend's reason.

    Source: the format is Micikevicius et al. 2022, arXiv:2209.05433, section 3.
    """
    check_rows("x", x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if not 0 < largest <= LARGEST_E4M3:
        raise ValueError(f"largest must be above 0 and at most {LARGEST_E4M3:.0f}, got {largest!r}")
    q, scale = _quantize_rows(x, activation, largest, backend)
    return q, scale


def unsupported(name: str, device: torch.device) -> str | None:
    """Return in a sentence why the backend `name` cannot run on `device`, None if it can."""
    if name == "cuda":
        return "rows are quantised by Triton, there is no compiled kernel"
    if name == "triton" and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            return f"e4m3 needs compute capability 8.9 or newer, this GPU has {major}.{minor}"
    return _dispatch.unsupported(name, device)


def _run(x: Tensor, activation: str, largest: float, backend: str) -> tuple[Tensor, Tensor]:
    module = select_backend(__name__, backend, x.device, unsupported=unsupported)
    q, scale = module.quantize_rows(x, activation, largest)
    return q, scale


def _fake(x: Tensor, activation: str, largest: float, backend: str) -> tuple[Tensor, Tensor]:
    return empty_rows(x)


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 shaped as `x` and an fp32 scale a row, contiguous; rows of no values are done."""
    q = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return q, scale if x.shape[-1] else scale.fill_(SMALLEST / LARGEST_E4M3)


_quantize_rows = define_op(
    "quantize_rows",
    "(Tensor x, str activation, float largest, str backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)
