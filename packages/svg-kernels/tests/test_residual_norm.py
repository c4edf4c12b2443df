from __future__ import annotations

import pytest
import torch

import svg_kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = [
    pytest.param("reference", id="reference"),
    pytest.param("triton", marks=pytest.mark.gpu, id="triton"),
]


def normal(shape, dtype, device, generator, mean=0.0):
    return (torch.randn(shape, device=device, generator=generator) + mean).to(dtype)


def rows(dtype, width, tokens, device, generator, mean=0.0):
    """Return residual, what is added, gate, scale and shift."""
    residual = normal((3, 19, width), dtype, device, generator, mean)
    x = normal((3, 19, width), dtype, device, generator)
    gate, scale, shift = normal((3, 3, tokens, width), torch.float32, device, generator).unbind(0)
    return residual, x, gate, scale, shift


def exact_norm(y, eps=1e-6):
    y = y.double()
    centred = y - y.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 130, 1536, 5120])
@pytest.mark.parametrize("tokens", [1, 19])
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_gate_residual_norm_is_as_exact_as_torch(
    backend, dtype, width, tokens, mean, device, generator, assert_accurate
):
    residual, x, gate, scale, shift = rows(dtype, width, tokens, device, generator, mean)
    y, z = svg_kernels.gate_residual_norm(
        residual, x, gate, scale=scale, shift=shift, backend=backend
    )
    plain = (residual.float() + x * gate).to(dtype)
    assert_accurate(y, plain, residual.double() + x.double() * gate.double())
    plain = torch.nn.functional.layer_norm(y.float(), (width,), eps=1e-6) * (1 + scale) + shift
    exact = exact_norm(y) * (1 + scale.double()) + shift.double()
    assert z.dtype == dtype
    assert_accurate(z, plain.to(dtype), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_residual_norm_without_gate_applies_weight_and_bias(
    backend, dtype, device, generator, assert_accurate
):
    residual, x, *_ = rows(dtype, 48, 1, device, generator)
    weight, bias = normal((2, 48), dtype, device, generator).unbind(0)
    y, z = svg_kernels.gate_residual_norm(
        residual, x, weight=weight, bias=bias, eps=1e-5, backend=backend
    )
    torch.testing.assert_close(y, (residual.float() + x.float()).to(dtype), rtol=0, atol=0)
    plain = torch.nn.functional.layer_norm(
        y.float(), (48,), weight.float(), bias.float(), eps=1e-5
    ).to(dtype)
    assert_accurate(z, plain, exact_norm(y, 1e-5) * weight.double() + bias.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "mixed", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_gate_residual_norm_of_a_batch_reads_chunks_in_place(backend, mixed, device, generator):
    # A kernel that reads one row of scale for the whole batch passes any test with batch 1.
    residual = normal((4, 80, 7), mixed[0], device, generator).transpose(1, 2)[:, :, ::2]
    x = normal((4, 7, 60), mixed[1], device, generator)[:, :, :40]
    table = normal((4, 7, 6, 40), torch.float32, device, generator)
    shift, scale, gate = (t.squeeze(2) for t in table[:, :, :3].chunk(3, dim=2))
    whole = svg_kernels.gate_residual_norm(
        residual, x, gate, scale=scale, shift=shift, backend=backend
    )
    assert all(part.is_contiguous() and part.dtype == mixed[0] for part in whole)
    for b in range(4):
        one = slice(b, b + 1)
        tensors = (t[one].contiguous() for t in (residual, x, gate))
        alone = svg_kernels.gate_residual_norm(
            *tensors, scale=scale[one].contiguous(), shift=shift[one].contiguous(), backend=backend
        )
        for part, every in zip(alone, whole, strict=True):
            # Rows that lie apart are added up in another order.
            unit = torch.finfo(every.dtype).eps
            torch.testing.assert_close(part, every[one], rtol=2 * unit, atol=4 * unit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_residual_norm_keeps_nan_to_its_row(backend, dtype, device, generator):
    residual, x, gate, *_ = rows(dtype, 130, 1, device, generator)
    spoiled = x.clone()
    spoiled[0, 3, 5], spoiled[1, 8, 7] = torch.nan, torch.inf
    bad = torch.zeros(3, 19, dtype=torch.bool, device=device)
    bad[0, 3] = bad[1, 8] = True
    got = svg_kernels.gate_residual_norm(residual, spoiled, gate, backend=backend)
    clean = svg_kernels.gate_residual_norm(residual, x, gate, backend=backend)
    known = svg_kernels.gate_residual_norm(residual, spoiled, gate, backend="reference")
    for part, good, same in zip(got, clean, known, strict=True):
        assert torch.equal(part[~bad], good[~bad])
        assert torch.equal(part.isnan(), same.isnan())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)])
def test_gate_residual_norm_of_empty_tensors(backend, shape, device):
    x = torch.empty(shape, device=device)
    for part in svg_kernels.gate_residual_norm(x, x, backend=backend):
        assert part.shape == shape


def test_gate_residual_norm_refuses_what_does_not_fit():
    x, row = torch.ones(2, 5, 8), torch.ones(2, 8)
    with pytest.raises(ValueError, match="scale and shift go together"):
        svg_kernels.gate_residual_norm(x, x, row, scale=row)
    with pytest.raises(ValueError, match=r"x must be \[2, 5, 8\] like residual"):
        svg_kernels.gate_residual_norm(x, x[:1], row)
    with pytest.raises(ValueError, match=r"gate must be .* for residual \[2, 5, 8\], got"):
        svg_kernels.gate_residual_norm(x, x, torch.ones(2, 3, 8))
    with pytest.raises(ValueError, match=r"residual must be \[batch, tokens, width\], got"):
        svg_kernels.gate_residual_norm(x[0], x[0])
    with pytest.raises(ValueError, match="bias must be on cpu like residual, got meta"):
        svg_kernels.gate_residual_norm(x, x, bias=torch.ones(8, device="meta"))
    with pytest.raises(TypeError, match="residual"):
        svg_kernels.gate_residual_norm(x.int(), x)
    with pytest.raises(svg_kernels.UnsupportedError, match="there is no compiled kernel"):
        svg_kernels.gate_residual_norm(x, x, backend="cuda")


def test_gate_residual_norm_compiles_whole(generator):
    residual, x, gate, scale, shift = rows(torch.float32, 16, 1, "cpu", generator)

    def function(residual, x):
        return svg_kernels.gate_residual_norm(residual, x, gate, scale=scale, shift=shift)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(residual, x), function(residual, x), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_gate_residual_norm_addresses_more_than_two_to_the_31_values(device):
    tokens = 2**31 // 5120 + 200
    residual = torch.zeros(1, tokens, 5120, dtype=torch.bfloat16, device=device)
    x = torch.arange(5120, device=device).to(residual.dtype).expand(1, tokens, 5120)
    y, z = svg_kernels.gate_residual_norm(residual, x)
    assert torch.equal(y[0, -300:], x[0, -300:])
    assert torch.equal(z[0, -1], z[0, 0])
