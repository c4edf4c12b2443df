from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from svg_models.copies import copy_bits, packed
from svg_models.copies.engines import _Copy2D, rectangle


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [128, 12, 3])
def test_copy_bits_keeps_every_bit_of_strided_tensors(width: int, dtype: torch.dtype) -> None:
    pairs = torch.randint(-(2**15), 2**15, (2, 9, 6, 2 * width), dtype=torch.int16)
    x = pairs.view(dtype)  # NaN of every kind among them
    target = torch.zeros_like(x)

    copy_bits(target[:, 1:7, 1:4], x[:, 2:8, 2:5])
    parcel = packed(x.transpose(1, 2)[:, 1:3])

    bits = target.view(torch.int16)
    assert torch.equal(bits[:, 1:7, 1:4], pairs[:, 2:8, 2:5])
    assert not bits[:, 7:].any()
    assert not bits[:, :1].any()
    assert parcel.is_contiguous()
    assert torch.equal(parcel.view(torch.int16), pairs.transpose(1, 2)[:, 1:3])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [16, 6, 3])
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("chosen", [False, True])
def test_copy_rows_keeps_every_bit_of_strided_tensors(
    dtype: torch.dtype, width: int, by_head: bool, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton: Any = pytest.importorskip("svg_models.copies.triton")
    monkeypatch.setattr(triton, "BLOCK_ROWS", 4)
    words = width * dtype.itemsize // 2
    bits = torch.randint(-(2**15), 2**15, (2, 11, 7, words), dtype=torch.int16)
    x = bits.view(dtype)
    if by_head:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    order = torch.tensor([5, 0, 3]) if chosen else None
    target = torch.zeros(2, 3, 20, width, dtype=dtype).transpose(1, 2)

    triton.copy_rows(target[:, 4:15], x if chosen else x[:, :, 2:5], order, 3)

    found = target.transpose(1, 2).view(torch.int16).transpose(1, 2)
    assert torch.equal(found[:, 4:15], bits[:, :, order if chosen else slice(2, 5)])
    assert not found[:, :4].any()
    assert not found[:, 15:].any()


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("by_head", [False, True])
def test_rectangle_is_the_rows_of_bytes_that_an_engine_copies(by_head: bool, swapped: bool) -> None:
    def strided(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1) if by_head else x

    bits = torch.randint(-(2**15), 2**15, (9, 6, 8), dtype=torch.int16)
    source = strided(bits)[2:7, 1:4]
    target = strided(torch.zeros(11, 5, 8, dtype=torch.int16))[3:8, 2:5]
    if swapped:
        source, target = source.transpose(0, 1), target.transpose(0, 1)

    found = rectangle(target, source)
    assert found is not None
    width, height, target_pitch, source_pitch = found
    for row in range(height):
        ctypes.memmove(
            target.data_ptr() + row * target_pitch, source.data_ptr() + row * source_pitch, width
        )

    assert torch.equal(target, source)
    other_ways = source.contiguous(), source.transpose(0, 1).contiguous().transpose(0, 1)
    assert {rectangle(target, x) is None for x in other_ways} == {True, False}


def test_copy2d_is_laid_out_as_the_driver_wants_it() -> None:
    places = {name: getattr(_Copy2D, name).offset for name, _ in _Copy2D._fields_}
    assert ctypes.sizeof(_Copy2D) == 128
    assert (places["src_type"], places["src_device"], places["src_pitch"]) == (16, 32, 48)
    assert (places["dst_type"], places["dst_device"], places["dst_pitch"]) == (72, 88, 104)
    assert (places["width"], places["height"]) == (112, 120)
