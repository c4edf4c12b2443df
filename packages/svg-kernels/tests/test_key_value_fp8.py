from __future__ import annotations

import importlib

import pytest
import torch
from fp8_oracles import DATA, offset_rows, outlier_rows, random_rows, relative_error

from svg_kernels import UnsupportedError, quantize_key_value
from svg_kernels.key_value_fp8.rows import rotate, signed_hadamard, unrotate

BACKENDS = [
    pytest.param("reference", id="reference"),
    pytest.param("triton", marks=pytest.mark.gpu, id="triton"),
]


def test_rotate_keeps_dot_products_and_unrotate_undoes_it(generator):
    x, y = torch.randn(2, 9, 128, generator=generator).double()
    torch.testing.assert_close(rotate(x) @ rotate(y).T, x @ y.T)
    torch.testing.assert_close(unrotate(rotate(x)), x)


def test_rotate_spreads_a_channel_and_a_constant():
    # Without signs, rows of equal channels would all end up in one.
    one_channel = torch.zeros(128)
    one_channel[5] = 1.0
    for x in (one_channel, torch.ones(128)):
        assert rotate(x).abs().max() < 0.4 * x.norm()


def test_signed_hadamard_is_the_butterfly_of_the_compiled_kernel(generator):
    x = torch.randn(3, 128, generator=generator)
    signs = signed_hadamard(x.device, x.dtype)[0]  # the first row of the matrix is all ones
    y = x * signs
    half = 1
    while half < 128:
        pairs = y.view(3, -1, 2, half)
        y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        half *= 2
    torch.testing.assert_close(y.reshape(3, 128), rotate(x) * 128**0.5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DATA)
def test_quantize_key_value_is_within_half_a_step(name, backend, generator):
    _, key, value = DATA[name](generator, 2, 300)
    got = quantize_key_value(key, value, backend=backend)
    torch.testing.assert_close(got.key_mean, key.mean(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.value_mean, value.mean(2), rtol=1e-4, atol=1e-4)
    rotated = rotate((key - got.key_mean[:, :, None]) / got.key_scale[:, :, None])
    torch.testing.assert_close(
        rotated.square().mean((2, 3)), torch.ones(1, 2, device=key.device), rtol=2e-2, atol=0
    )
    centred = (value - got.value_mean[:, :, None]) / got.value_scale[:, :, None]
    assert (centred.abs().amax(2) - 448).abs().max() < 0.1
    # Half a step of e4m3, or of its subnormals, and what fp16 adds to the rotation.
    for found, exact in ((got.key.float(), rotated), (got.value.float(), centred)):
        allowed = torch.maximum(exact.abs() * 2.0**-4 * 1.02, torch.tensor(2.0**-10 * 1.5))
        assert ((found - exact).abs() <= allowed + 4e-3).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize_key_value_takes_out_what_is_put_back(backend, generator):
    _, key, value = offset_rows(generator, 2, 400)
    got_key, got_value = quantize_key_value(key, value, backend=backend).dequantized()
    # Errors are those of the rows about their mean, which is ten and three deviations away.
    deviation = key - key.mean(2, keepdim=True)
    assert (got_key - key).norm() < 0.03 * deviation.norm()
    deviation = value - value.mean(2, keepdim=True)
    assert (got_value - value).norm() < 0.03 * deviation.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize_key_value_permutes_rows(backend, device, generator):
    _, key, value = random_rows(generator, 3, 130)
    order = torch.rand(1, 3, 130, device=device, generator=generator).argsort(-1).int()
    got = quantize_key_value(key, value, order[:, :, :70], backend=backend)
    plain = quantize_key_value(key, value, backend=backend)
    index = order[:, :, :70].long()[..., None].expand(-1, -1, -1, 128)
    for found, rows in ((got.key, plain.key), (got.value, plain.value)):
        assert torch.equal(found.float(), rows.float().gather(2, index))
    assert torch.equal(got.key_scale, plain.key_scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantize_key_value_takes_strided_rows_of_16_bits(backend, dtype, device, generator):
    _, key, value = (x.to(dtype) for x in random_rows(generator, 4, 65))
    views = [
        x.view(2, 2, 65, 128).transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value)
    ]
    got = quantize_key_value(*views, backend=backend)
    want = quantize_key_value(*(x.contiguous() for x in views), backend="reference")
    for found, exact in zip(got.dequantized(), want.dequantized(), strict=True):
        assert relative_error(found, exact.double()) < 5e-3  # ties fall either way


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize_key_value_of_rows_that_are_all_alike(backend, device):
    key = torch.full((1, 1, 33, 128), 1.7, device=device)
    got_key, got_value = quantize_key_value(key, key, backend=backend).dequantized()
    torch.testing.assert_close(got_key, key)
    torch.testing.assert_close(got_value, key)


def test_quantize_key_value_shares_an_outlier_channel_with_the_queries(generator):
    _, key, value = outlier_rows(generator, 1, 500)
    got = quantize_key_value(key, value)
    others = torch.arange(128) != 17
    ratio = got.key_scale[0, 0, 17] / got.key_scale[0, 0, others].mean()
    torch.testing.assert_close(ratio.item(), 50**0.5, rtol=0.05, atol=0)


def test_quantize_key_value_refuses_what_it_cannot(device):
    x = torch.zeros(1, 2, 5, 128)
    with pytest.raises(ValueError, match=r"must be \[batch, heads, tokens, 128\]"):
        quantize_key_value(x[..., :64], x[..., :64])
    with pytest.raises(ValueError, match="one shape and device"):
        quantize_key_value(x, x[:, :, :4])
    with pytest.raises(TypeError, match="must both be"):
        quantize_key_value(x, x.half())
    with pytest.raises(TypeError, match="order must be int32"):
        quantize_key_value(x, x, torch.zeros(1, 2, 5).long())
    with pytest.raises(ValueError, match="order must expand to"):
        quantize_key_value(x, x, torch.zeros(1, 3, 5).int())
    with pytest.raises(UnsupportedError, match="no compiled kernel"):
        quantize_key_value(x, x, backend="cuda")


def test_quantize_key_value_of_meta_tensors_has_the_right_shapes():
    x = torch.empty(2, 3, 50, 128, device="meta")
    order = torch.empty(2, 3, 40, dtype=torch.int32, device="meta")
    found = torch.ops.svg_kernels.quantize_key_value(x, x, order, "auto")
    assert [tuple(t.shape) for t in found] == [(2, 3, 40, 128)] * 2 + [(2, 3, 128)] * 4
    assert [t.dtype for t in found] == [torch.float8_e4m3fn] * 2 + [torch.float32] * 4


@pytest.mark.usefixtures("interpreted")
def test_quantize_key_value_kernels_do_what_the_reference_does(generator, monkeypatch):
    # The interpreter loses the carry where rounding to e4m3 reaches the next power of two, so the
    # kernel writes what it would round.
    monkeypatch.setattr("svg_kernels.key_value_fp8.triton.DTYPE", torch.float32)
    _, key, value = offset_rows(generator, 2, 100)
    order = torch.rand(1, 2, 70, generator=generator).argsort(-1).int()
    got = quantize_key_value(key, value, order, backend="triton")
    want = quantize_key_value(key, value, order, backend="reference")
    for name in ("key_scale", "key_mean", "value_scale", "value_mean"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-3, atol=1e-4)
    index = order.long()[..., None].expand(-1, -1, -1, 128)
    for found, exact in zip(got.dequantized(), (key, value), strict=True):
        exact = exact.gather(2, index)
        deviation = exact - exact.mean(2, keepdim=True)
        assert (found - exact).norm() < 1e-3 * deviation.norm()  # fp16 before the rotation


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("ordered", [False, True])
def test_kernels_compute_what_the_reference_rounds(
    name, ordered, generator, interpreted, monkeypatch
):
    # The interpreter has no e4m3, so neither side rounds; more rows than a chunk or a program has.
    triton, reference = (
        importlib.import_module(f"svg_kernels.key_value_fp8.{part}")
        for part in ("triton", "reference")
    )
    monkeypatch.setattr(triton, "DTYPE", torch.float32)
    monkeypatch.setattr(reference, "DTYPE", torch.float32)
    monkeypatch.setattr(triton, "CHUNK_ROWS", 128)
    _, key, value = DATA[name](generator, 2, 300)
    order = None
    if ordered:
        order = torch.rand(1, 2, 300, device=key.device, generator=generator).argsort(-1).int()
        order = order[:, :, :270]
    got = triton.quantize_key_value(key, value, order)
    want = reference.quantize_key_value(key, value, order)
    for found, exact in zip(got, want, strict=True):
        torch.testing.assert_close(found, exact, rtol=2e-3, atol=8e-3)  # fp16
