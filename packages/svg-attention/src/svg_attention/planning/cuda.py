"""Planning by the compiled kernels of `svg_kernels`, where they are installed and fit the call."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from svg_attention.planning.dispatch import LARGEST_BIAS


def unsupported(means: Tensor, key: Tensor, value: Tensor, probe_rows: int) -> str | None:
    """Return in a sentence why the compiled kernel cannot probe these tensors, None if it can."""
    if means.device.type != "cuda":
        return f"needs tensors on a CUDA device, these are on {means.device.type!r}"
    if importlib.util.find_spec("svg_kernels") is None:
        return "svg-kernels is not installed; pip install 'svg-attention[kernels]'"
    if means.dtype != key.dtype:
        return f"means must be {key.dtype} like key, got {means.dtype}"
    from svg_kernels.probe_sums import unsupported

    widths = (key.shape[-1], value.shape[-1])
    return unsupported("cuda", means.device, key.dtype, widths, probe_rows)


def probe_sums(
    means: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    centroids: Tensor,
    value_means: Tensor,
    sizes: Tensor,
    length: int,
    probe_rows: int,
    scale: float,
    return_output: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call the kernel of `svg_kernels`."""
    from svg_kernels import probe_sums

    found = probe_sums(
        means,
        key,
        value,
        order,
        centroids,
        value_means,
        sizes,
        length=length,
        probe_rows=probe_rows,
        scale=scale,
        return_output=return_output,
        largest_bias=LARGEST_BIAS,
        backend="cuda",
    )
    if found.output is None or found.lse is None:
        none = torch.empty(0, device=means.device)
        return found.error, found.bias, none, none
    return found.error, found.bias, found.output, found.lse
