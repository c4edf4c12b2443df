from __future__ import annotations

import importlib

import pytest
import torch
from attention_data import DATA, offset_rows, outlier_rows, random_rows, relative_error

from svg_kernels import UnsupportedError, quantize_key
from svg_kernels.rotation import rotate

BACKENDS = [
    pytest.param("reference", id="reference"),
    pytest.param("triton", marks=pytest.mark.gpu, id="triton"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DATA)
def test_quantize_key_is_within_half_a_step(name, backend, generator):
    _, key, _ = DATA[name](generator, 2, 300)
    got = quantize_key(key, backend=backend)
    torch.testing.assert_close(got.mean, key.mean(2), rtol=1e-4, atol=1e-4)
    rotated = rotate((key - got.mean[:, :, None]) / got.channel_scale[:, :, None])
    torch.testing.assert_close(got.row_scale, rotated.abs().amax(-1) / 127, rtol=1e-3, atol=0)
    assert got.key.abs().amax(-1).eq(127).all()
    # Half a step, and what fp16 adds to the rotation.
    apart = (got.key.float() - rotated / got.row_scale[..., None]).abs()
    assert apart.max() < (0.501 if backend == "reference" else 0.6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize_key_takes_out_what_is_put_back(backend, generator):
    _, key, _ = offset_rows(generator, 2, 400)
    got = quantize_key(key, backend=backend).dequantized()
    # Errors are those of the rows about their mean, which is ten deviations away.
    deviation = key - key.mean(2, keepdim=True)
    assert (got - key).norm() < 0.01 * deviation.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize_key_gives_short_keys_beside_long_ones_all_digits(backend, generator):
    _, key, _ = random_rows(generator, 1, 500)
    key[:, :, ::50] *= 100
    got = quantize_key(key, backend=backend).dequantized()
    centred = (key - key.mean(2, keepdim=True)).norm(dim=-1)
    assert ((got - key).norm(dim=-1) < 0.015 * centred).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize_key_permutes_rows(backend, device, generator):
    _, key, _ = random_rows(generator, 3, 130)
    order = torch.rand(1, 3, 130, device=device, generator=generator).argsort(-1).int()
    order = order[:, :, :70]
    got = quantize_key(key, order, backend=backend)
    plain = quantize_key(key, backend=backend)
    index = order.long()
    assert torch.equal(got.key, plain.key.gather(2, index[..., None].expand(-1, -1, -1, 128)))
    assert torch.equal(got.row_scale, plain.row_scale.gather(2, index))
    assert torch.equal(got.channel_scale, plain.channel_scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantize_key_takes_strided_rows_of_16_bits(backend, dtype, generator):
    key = random_rows(generator, 4, 65)[1].to(dtype)
    view = key.view(2, 2, 65, 128).transpose(1, 2).contiguous().transpose(1, 2)
    got = quantize_key(view, backend=backend).dequantized()
    want = quantize_key(view.contiguous(), backend="reference").dequantized()
    assert relative_error(got, want.double()) < 2e-3  # ties fall either way


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize_key_of_rows_that_are_all_alike(backend, device):
    key = torch.full((1, 1, 33, 128), 1.7, device=device)
    torch.testing.assert_close(quantize_key(key, backend=backend).dequantized(), key)


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize_key_keeps_what_is_not_finite_to_its_row(backend, generator):
    _, key, _ = random_rows(generator, 1, 300)
    clean = quantize_key(key, backend=backend).dequantized()
    key[0, 0, 0, 5], key[0, 0, 17, 1], key[0, 0, 90, 2] = torch.nan, torch.inf, -torch.inf
    got = quantize_key(key, backend=backend)
    spoiled = torch.zeros(300, dtype=torch.bool, device=key.device)
    spoiled[[0, 17, 90]] = True
    assert torch.equal(got.row_scale[0, 0].isnan(), spoiled)
    # The mean has lost three elements.
    found, want = got.dequantized()[0, 0, ~spoiled], clean[0, 0, ~spoiled]
    assert relative_error(found, want.double()) < 0.02


def test_quantize_key_shares_an_outlier_channel_with_the_queries(generator):
    _, key, _ = outlier_rows(generator, 1, 500)
    scale = quantize_key(key).channel_scale[0, 0]
    deviation = key[0, 0].std(0, correction=0)
    want = (deviation[17] / (2 * deviation.mean())).sqrt()
    torch.testing.assert_close(scale[17], want)
    assert want > 4
    assert (scale == 1).sum() == 127


def test_quantize_key_refuses_what_it_cannot():
    x = torch.zeros(1, 2, 5, 128)
    with pytest.raises(ValueError, match=r"must be \[batch, heads, tokens, 128\]"):
        quantize_key(x[..., :64])
    with pytest.raises(TypeError, match="key must be fp16, bf16 or fp32"):
        quantize_key(x.double())
    with pytest.raises(TypeError, match="order must be int32"):
        quantize_key(x, torch.zeros(1, 2, 5).long())
    with pytest.raises(ValueError, match="order must expand to"):
        quantize_key(x, torch.zeros(1, 3, 5).int())
    with pytest.raises(UnsupportedError, match="no compiled kernel"):
        quantize_key(x, backend="cuda")


def test_quantize_key_of_meta_tensors_has_the_right_shapes():
    x = torch.empty(2, 3, 50, 128, device="meta")
    order = torch.empty(2, 3, 40, dtype=torch.int32, device="meta")
    found = torch.ops.svg_kernels.quantize_key(x, order, "auto")
    assert [tuple(t.shape) for t in found] == [
        (2, 3, 40, 128),
        (2, 3, 40),
        (2, 3, 128),
        (2, 3, 128),
    ]
    assert [t.dtype for t in found] == [torch.int8] + [torch.float32] * 3


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("ordered", [False, True])
def test_kernels_round_as_the_reference_does(name, ordered, generator, interpreted, monkeypatch):
    # More rows than a chunk or a program has.
    triton = importlib.import_module("svg_kernels.key_int8.triton")
    monkeypatch.setattr(triton, "CHUNK_ROWS", 128)
    _, key, _ = DATA[name](generator, 2, 300)
    order = None
    if ordered:
        order = torch.rand(1, 2, 300, device=key.device, generator=generator).argsort(-1).int()
        order = order[:, :, :270]
    got = quantize_key(key, order, backend="triton")
    want = quantize_key(key, order, backend="reference")
    apart = (got.key.int() - want.key.int()).abs()
    assert apart.max() <= 1  # fp16 before the rotation
    assert (apart > 0).float().mean() < 0.03
    for found, exact in zip(got.tensors[1:], want.tensors[1:], strict=True):
        torch.testing.assert_close(found, exact, rtol=2e-3, atol=1e-4)
