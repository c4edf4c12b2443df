from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import svg_kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = [
    pytest.param("reference", id="reference"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="cuda"),
    pytest.param("triton", marks=pytest.mark.gpu, id="triton"),
]


def normal(shape, dtype, device, generator, mean=0.0):
    return (torch.randn(shape, device=device, generator=generator) + mean).to(dtype)


def exact_modulate(x, scale, shift, eps):
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return y * (1 + scale.double()) + shift.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 130, 1536, 5120])
@pytest.mark.parametrize("tokens", [1, 19])
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_layer_norm_modulate_is_as_exact_as_torch(
    backend, dtype, width, tokens, mean, device, generator, assert_accurate
):
    x = normal((3, 19, width), dtype, device, generator, mean)
    scale = normal((3, tokens, width), torch.float32, device, generator)
    shift = normal((3, 1, width), torch.float32, device, generator)
    actual = svg_kernels.layer_norm_modulate(x, scale, shift, backend=backend)
    assert actual.dtype == dtype
    plain = (F.layer_norm(x.float(), (width,), eps=1e-6) * (1 + scale) + shift).to(dtype)
    assert_accurate(actual, plain, exact_modulate(x, scale, shift, 1e-6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_norm_modulate_applies_weight_and_bias_first(
    backend, device, generator, assert_accurate
):
    x = normal((2, 5, 24), torch.float32, device, generator)
    weight, bias = normal((2, 24), torch.float32, device, generator).unbind(0)
    scale, shift = normal((2, 2, 24), torch.float32, device, generator).unbind(0)
    actual = svg_kernels.layer_norm_modulate(
        x, scale, shift, weight=weight, bias=bias, backend=backend
    )
    plain = F.layer_norm(x, (24,), weight, bias, eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    exact = exact_modulate(x, torch.zeros_like(scale[:, None]), torch.zeros_like(x), 1e-6)
    exact = exact * weight.double() + bias.double()
    exact = exact * (1 + scale[:, None].double()) + shift[:, None].double()
    assert_accurate(actual, plain, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 130, 5120])
@pytest.mark.parametrize("tokens", [1, 19])
def test_gate_residual_is_as_exact_as_torch(
    backend, dtype, width, tokens, device, generator, assert_accurate
):
    residual = normal((3, 19, width), dtype, device, generator)
    x = normal((3, 19, width), dtype, device, generator)
    gate = normal((3, tokens, width), torch.float32, device, generator)
    actual = svg_kernels.gate_residual(residual, x, gate, backend=backend)
    plain = (residual.float() + x * gate).to(dtype)
    assert_accurate(actual, plain, residual.double() + x.double() * gate.double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_norm_modulate_and_gate_residual_of_a_batch(backend, device, generator):
    # A kernel that reads one row of scale for the whole batch passes any test with batch 1.
    x = normal((4, 6, 32), torch.float32, device, generator)
    scale, shift, gate = normal((3, 4, 32), torch.float32, device, generator).unbind(0)
    whole = svg_kernels.layer_norm_modulate(x, scale, shift, backend=backend)
    gated = svg_kernels.gate_residual(x, whole, gate, backend=backend)
    for b in range(4):
        one = slice(b, b + 1)
        part = svg_kernels.layer_norm_modulate(x[one], scale[one], shift[one], backend=backend)
        torch.testing.assert_close(part, whole[one], rtol=0, atol=0)
        alone = svg_kernels.gate_residual(x[one], part, gate[one], backend=backend)
        torch.testing.assert_close(alone, gated[one], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_norm_modulate_and_gate_residual_read_chunks_in_place(backend, device, generator):
    x = normal((2, 7, 40), torch.bfloat16, device, generator)
    table = normal((2, 7, 6, 40), torch.float32, device, generator)
    shift, scale, gate = (t.squeeze(2) for t in table[:, :, :3].chunk(3, dim=2))
    assert not scale.is_contiguous()
    actual = svg_kernels.layer_norm_modulate(x, scale, shift, backend=backend)
    expected = svg_kernels.layer_norm_modulate(
        x, scale.contiguous(), shift.contiguous(), backend=backend
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    gated = svg_kernels.gate_residual(x, actual, gate, backend=backend)
    expected = svg_kernels.gate_residual(x, actual, gate.contiguous(), backend=backend)
    torch.testing.assert_close(gated, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 130, 1536])
def test_layer_norm_modulate_and_gate_residual_keep_nan_to_its_row(
    backend, dtype, width, device, generator
):
    x = normal((2, 9, width), dtype, device, generator)
    scale, shift, gate = normal((3, 2, width), torch.float32, device, generator).unbind(0)
    spoiled = x.clone()
    spoiled[0, 3, 5], spoiled[1, 8, 7] = torch.nan, torch.inf
    rows = torch.zeros(2, 9, dtype=torch.bool, device=device)
    rows[0, 3] = rows[1, 8] = True

    def modulate(x, backend):
        return svg_kernels.layer_norm_modulate(x, scale, shift, backend=backend)

    def add(x, backend):
        return svg_kernels.gate_residual(x, x, gate, backend=backend)

    for function in (modulate, add):
        got = function(spoiled, backend)
        assert torch.equal(got[~rows], function(x, backend)[~rows])
        assert torch.equal(got.isnan(), function(spoiled, "reference").isnan())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gate_residual_may_stay_in_fp32(backend, device, generator):
    residual = normal((2, 5, 48), torch.float32, device, generator)
    x = normal((2, 5, 48), torch.bfloat16, device, generator)
    gate = normal((2, 48), torch.bfloat16, device, generator)
    y = svg_kernels.gate_residual(residual, x, gate, backend=backend)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, residual + x.float() * gate.float()[:, None])
    y = svg_kernels.gate_residual(x, residual, gate, out_dtype=torch.float32, backend=backend)
    torch.testing.assert_close(y, x.float() + residual * gate.float()[:, None])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)])
def test_layer_norm_modulate_and_gate_residual_of_empty_tensors(backend, shape, device):
    x = torch.empty(shape, device=device)
    gate = torch.empty(shape[0], shape[2], device=device)
    assert svg_kernels.gate_residual(x, x, gate, backend=backend).shape == shape
    assert svg_kernels.layer_norm_modulate(x, gate, gate, backend=backend).shape == shape


def test_check_modulation_refuses_shapes_that_do_not_fit():
    x = torch.ones(2, 5, 8)
    with pytest.raises(ValueError, match=r"scale must be \[2, 8\]"):
        svg_kernels.layer_norm_modulate(x, torch.ones(5, 8), torch.ones(2, 8))
    with pytest.raises(ValueError, match="gate must be"):
        svg_kernels.gate_residual(x, x, torch.ones(2, 3, 8))
    with pytest.raises(ValueError, match=r"x must be \[2, 5, 8\] like residual"):
        svg_kernels.gate_residual(x, torch.ones(1, 5, 8), torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"x must be \[batch, tokens, width\]"):
        svg_kernels.layer_norm_modulate(torch.ones(5, 8), torch.ones(8), torch.ones(8))
