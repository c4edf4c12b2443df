"""What a causal 3D convolution reads: group norm, SiLU, upsampling and padding in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svg_kernels import _dispatch
from svg_kernels._checks import FLOATS, check_companion, check_tensor
from svg_kernels._dispatch import define_op, select_backend

__all__ = ["conv_input"]

_AXES, _SIDES = 3, 6


def conv_input(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    groups: int = 0,
    eps: float = 1e-6,
    offset: Tensor | None = None,
    silu: bool = False,
    upsample: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0, 0, 0, 0),
    backend: str = "auto",
) -> Tensor:
    """Normalise a video, activate, enlarge and pad it, as a decoder does before each convolution.

    Group norm (over all positions of a group of channels), then SiLU, then every position repeated,
    then the border repeated outwards. Of the time axis the first frame is repeated once only, since
    a causal decoder makes one picture of it. Computed in fp32 and rounded once; variances are sums
    of squared deviations, so that a mean far from 0 costs no accuracy. The positions are read once
    for the moments and once for the result.

    Args:
        x: `[B, C, T, H, W]`, fp16, bf16 or fp32, any strides (channels that do not lie side by side
            are copied first).
        weight: `[C]`, fp16, bf16 or fp32, or None for ones.
        bias: `[C]` or None for zeros.
        groups: into how many groups the channels are parted, of equal size; 0 does not normalise.
        eps: added to the variance, in the unit of `x^2`.
        offset: `[C]`, added to `x` before the norm, such as the bias that the convolution before
            has left out; None for zeros.
        silu: whether `x / (1 + exp(-x))` follows.
        upsample: how often time, rows and columns are repeated.
        padding: positions on the left, right, top, bottom, before and after in time, as
            `torch.nn.functional.pad` takes them.
        backend: `"auto"`, `"triton"` or `"reference"`; there is no compiled one, since Triton's
            moves as many bytes a second as a copy does.

    Returns:
        `[B, C, T', H', W']` in the dtype of `x`, with channels side by side in memory
        (`torch.channels_last_3d`), the layout in which convolutions of Tensor Cores read. T' is
        `1 + (T - 1) * upsample[0]` and the padding. For inference: no gradient flows through it.

    Raises:
        TypeError: if a dtype is none of the three.
        ValueError: if a shape or a number does not fit; it says which and what was expected.
        UnsupportedError: if `backend` cannot run on this device; it lists each backend's reason.

    Source: Wu & He 2018, arXiv:1803.08494, eq. 1 and 2.
    """
    _check(x, weight, bias, offset, groups, upsample, padding)
    y: Tensor = _conv_input(
        x, weight, bias, offset, groups, eps, silu, list(upsample), list(padding), backend
    )
    return y


def output_shape(
    shape: Sequence[int], upsample: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """Return the shape of the result for an input `[B, C, T, H, W]`."""
    batch, channels, frames, height, width = shape
    left, right, top, bottom, before, after = padding
    return (
        batch,
        channels,
        1 + (frames - 1) * upsample[0] + before + after,
        height * upsample[1] + top + bottom,
        width * upsample[2] + left + right,
    )


def unsupported(name: str, device: torch.device) -> str | None:
    """Return in a sentence why the backend `name` cannot run on `device`, None if it can."""
    if name == "cuda":
        return "inputs of convolutions are made by Triton, there is no compiled kernel"
    return _dispatch.unsupported(name, device)


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None,
    groups: int,
    upsample: Sequence[int],
    padding: Sequence[int],
) -> None:
    check_tensor("x", x)
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be fp16, bf16 or fp32, got {x.dtype}; convert it first")
    if x.ndim != 2 + _AXES or 0 in x.shape[2:]:
        raise ValueError(
            "x must be [batch, channels, frames, height, width] with at least one position, got "
            f"{list(x.shape)}"
        )
    channels = x.shape[1]
    if groups < 0 or (groups and (channels == 0 or channels % groups)):
        raise ValueError(
            f"groups must be 0 or divide the {channels} channels of x, got groups={groups}"
        )
    for name, vector in (("weight", weight), ("bias", bias), ("offset", offset)):
        if vector is None:
            continue
        check_tensor(name, vector)
        if not groups:
            raise ValueError(f"{name} belongs to the norm; give groups, or leave {name} out")
        if vector.shape != (channels,):
            raise ValueError(
                f"{name} must be [{channels}] to match the channels of x, got {list(vector.shape)}"
            )
        check_companion(name, vector, x)
    if len(upsample) != _AXES or min(upsample) < 1:
        raise ValueError(
            "upsample must be three numbers of at least 1, for time, rows and columns, got "
            f"{tuple(upsample)}"
        )
    if len(padding) != _SIDES or min(padding) < 0:
        raise ValueError(
            "padding must be six numbers of at least 0 (left, right, top, bottom, before, after), "
            f"got {tuple(padding)}"
        )


def _run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    upsample: list[int],
    padding: list[int],
    backend: str,
) -> Tensor:
    module = select_backend(__name__, backend, x.device, unsupported=unsupported)
    y = _empty(x, upsample, padding)
    module.conv_input(x, weight, bias, offset, y, groups, eps, silu, upsample, padding)
    return y


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    upsample: list[int],
    padding: list[int],
    backend: str,
) -> Tensor:
    return _empty(x, upsample, padding)


def _empty(x: Tensor, upsample: list[int], padding: list[int]) -> Tensor:
    shape = output_shape(x.shape, upsample, padding)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


_conv_input = define_op(
    "conv_input",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? offset, int groups, float eps, bool silu,"
    " int[] upsample, int[] padding, str backend) -> Tensor",
    _run,
    _fake,
)
