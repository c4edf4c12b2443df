"""Tables of rotary angles in the forms models keep them, brought to one.

A form is complex or a pair of real tables, `[length, ...]`, `[B or 1, length, ...]` or diffusers'
`[1, length, 1, ...]`, with one value per pair or with each value given for both channels of a pair.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from svg_kernels._checks import check_device, check_tensor

Pairing = Literal["interleaved", "half"]


def is_half(pairing: str) -> bool:
    """Return whether pairs are `(i, i + D/2)`; raise ValueError if `pairing` is unknown."""
    if pairing not in ("interleaved", "half"):
        raise ValueError(f"pairing must be 'interleaved' or 'half', got {pairing!r}")
    return pairing == "half"


def check_tables(cos: Tensor, sin: Tensor | None, x: Tensor, dim: int) -> int:
    """Return how many tokens the tables cover; raise unless they fit heads of `dim` channels."""
    check_tensor("cos", cos)
    if sin is not None:
        check_tensor("sin", sin)
    shape = cos.shape
    complex_table = cos.dtype.is_complex
    if sin is None:
        if not complex_table:
            raise ValueError("sin may be left out only when cos is complex (cos + i sin)")
    elif sin.shape != shape or complex_table:
        raise ValueError(
            f"cos and sin must be real and match, got {list(shape)} {cos.dtype} and "
            f"{list(sin.shape)} {sin.dtype}"
        )
    batch, token, _ = _axes(cos)
    pairs = dim // 2
    if (
        token < 0
        or not (shape[-1] == pairs or (shape[-1] == dim and not complex_table))
        or (batch >= 0 and shape[batch] not in (1, x.shape[0]))
    ):
        widths = f"[length, {pairs}]" if complex_table else f"[length, {dim}] or [length, {pairs}]"
        raise ValueError(
            f"cos must be {widths}, with a leading axis of 1 or {x.shape[0]} if any, "
            f"got {list(shape)}"
        )
    check_device("cos", cos, x)
    if sin is not None:
        check_device("sin", sin, x)
    return int(shape[token])


def check_range(start: int, length: int, tokens: int) -> None:
    """Raise unless the table's tokens are tokens of x."""
    if start < 0 or start + length > tokens:
        raise ValueError(
            f"the tables cover tokens {start} to {start + length - 1}, but x has {tokens}; "
            "slice the tables or change start"
        )


def pair_views(cos: Tensor, sin: Tensor | None, dim: int, half: bool) -> tuple[Tensor, Tensor]:
    """Return both tables in fp32 as views `[1 or B, length, dim/2]`, one value per pair."""
    if sin is None:
        both = torch.view_as_real(cos.to(torch.complex64))
        cos, sin = both[..., 0], both[..., 1]
    return _view(cos, dim, half, 0), _view(sin, dim, half, 1)


def pending(cos: Tensor | None, sin: Tensor | None) -> bool:
    """Return whether torch still owes the tables a conjugation or a change of sign."""
    if cos is None:
        return False
    if sin is None:
        return cos.is_conj()
    return sin.is_neg() or cos.is_neg()


def resolve(cos: Tensor, sin: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the tables with nothing `pending`."""
    if sin is None:
        return cos.resolve_conj(), None
    return cos.resolve_neg(), sin.resolve_neg()


def single(cos: Tensor, sin: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return complex64, or two fp32 tables of equal strides, which is what the kernels read."""
    if sin is None:
        return cos.to(torch.complex64), None
    cos, sin = _single(cos), _single(sin)
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


def _axes(table: Tensor) -> tuple[int, int, int]:
    """Return the axes of batch (-1: none), token (-1: no such form) and pair."""
    shape = table.shape
    dims = len(shape)
    if dims == 2:
        return -1, 0, 1
    if dims == 3:
        return 0, 1, 2
    if dims == 4 and 1 in shape[1:3]:
        return 0, (1 if shape[2] == 1 else 2), 3
    return -1, -1, dims - 1


def _view(table: Tensor, dim: int, half: bool, offset: int) -> Tensor:
    if table.ndim == 4:
        table = table.squeeze(2) if table.shape[2] == 1 else table.squeeze(1)
    elif table.ndim == 2:
        table = table[None]
    if table.shape[2] == dim:
        table = table[..., : dim // 2] if half else table[..., offset::2]
    return _single(table)


def _single(table: Tensor) -> Tensor:
    return table if table.dtype == torch.float32 else table.float()
