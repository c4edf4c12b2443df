from __future__ import annotations

import pytest
import torch

import svg_kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = [
    pytest.param("reference", id="reference"),
    pytest.param("triton", marks=pytest.mark.gpu, id="triton"),
]
# Half a step of e4m3, three bits after the point, and a little for the arithmetic before it.
STEP = 2.0**-4 * 1.001


def normal(shape, dtype, device, generator, mean=0.0):
    return (torch.randn(shape, device=device, generator=generator) + mean).to(dtype)


def exact_norm(y, eps=1e-6):
    y = y.double()
    centred = y - y.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)


def check(q, row_scale, exact, dtype):
    assert (q.dtype, row_scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert q.shape == exact.shape
    assert row_scale.shape == (*exact.shape[:-1], 1)
    assert q.is_contiguous()
    # What stands in between is rounded as well.
    unit = torch.finfo(dtype).eps
    size = exact.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(row_scale.double(), size / 448, rtol=2 * unit + 1e-5, atol=1e-8)
    allowed = torch.maximum(exact.abs() * (STEP + unit), 2.0**-10 * 1.02 * row_scale.double())
    allowed += 1e-5 * size
    assert ((q.double() * row_scale.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 130, 1536, 5120])
@pytest.mark.parametrize("tokens", [1, 19])
def test_layer_norm_modulate_fp8_is_within_half_a_step(
    backend, dtype, width, tokens, device, generator
):
    x = normal((3, 19, width), dtype, device, generator, 2.0)
    scale, shift = normal((2, 3, tokens, width), torch.float32, device, generator).unbind(0)
    weight, bias = normal((2, width), dtype, device, generator).unbind(0)
    found = svg_kernels.layer_norm_modulate_fp8(x, scale, shift, backend=backend)
    exact = exact_norm(x) * (1 + scale.double()) + shift.double()
    check(*found, exact, dtype)
    found = svg_kernels.layer_norm_modulate_fp8(
        x, scale, shift, weight=weight, bias=bias, eps=1e-3, backend=backend
    )
    exact = exact_norm(x, 1e-3) * weight.double() + bias.double()
    check(*found, exact * (1 + scale.double()) + shift.double(), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 130, 1536, 5120, 9000])
def test_gate_residual_norm_fp8_writes_the_sum_and_its_norm(
    backend, dtype, width, device, generator
):
    residual, x = normal((2, 3, 7, width), dtype, device, generator, 1.0).unbind(0)
    gate, scale, shift = normal((3, 3, 1, width), torch.float32, device, generator).unbind(0)
    weight, bias = normal((2, width), torch.float32, device, generator).unbind(0)
    ways = (
        ((), dict(scale=scale, shift=shift), 1 + scale.double(), shift.double()),
        ((gate,), dict(weight=weight, bias=bias), weight.double(), bias.double()),
    )
    for gates, given, gain, lift in ways:
        y, *found = svg_kernels.gate_residual_norm_fp8(
            residual, x, *gates, backend=backend, **given
        )
        wanted, _ = svg_kernels.gate_residual_norm(residual, x, *gates, backend=backend, **given)
        assert torch.equal(y, wanted)
        check(*found, exact_norm(y) * gain + lift, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_to_fp8_are_the_norm_and_the_rounding(backend, device, generator):
    residual, x = normal((2, 2, 70, 3072), torch.bfloat16, device, generator).unbind(0)
    gate, scale, shift = normal((3, 2, 1, 3072), torch.float32, device, generator).unbind(0)
    given = dict(scale=scale, shift=shift, backend=backend)
    _, z = svg_kernels.gate_residual_norm(residual, x, gate, **given)
    pairs = [
        (svg_kernels.gate_residual_norm_fp8(residual, x, gate, **given)[1:], z),
        (
            svg_kernels.layer_norm_modulate_fp8(x, **given),
            svg_kernels.layer_norm_modulate(x, **given),
        ),
    ]
    for (q, row_scale), z in pairs:
        wanted, wanted_scale = svg_kernels.quantize_rows(z, backend=backend)
        # A compiler may join a product and a sum in one kernel and not in the other.
        assert (q.float() != wanted.float()).float().mean() < 1e-3
        torch.testing.assert_close(row_scale, wanted_scale, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_to_fp8_take_any_strides(backend, device, generator):
    residual = normal((4, 80, 7), torch.bfloat16, device, generator).transpose(1, 2)[:, :, ::2]
    x = normal((4, 7, 60), torch.float32, device, generator)[:, :, :40]
    table = normal((4, 7, 6, 40), torch.float32, device, generator)
    shift, scale, gate = (t.squeeze(2) for t in table[:, :, :3].chunk(3, dim=2))
    given = dict(scale=scale, shift=shift, backend=backend)
    y, *found = svg_kernels.gate_residual_norm_fp8(residual, x, gate, **given)
    check(*found, exact_norm(y) * (1 + scale.double()) + shift.double(), torch.bfloat16)
    found = svg_kernels.layer_norm_modulate_fp8(residual, **given)
    check(*found, exact_norm(residual) * (1 + scale.double()) + shift.double(), torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_to_fp8_keep_nan_and_infinity_in_their_row(backend, device, generator):
    x = normal((2, 9, 130), torch.bfloat16, device, generator)
    row = torch.zeros(2, 130, device=device)
    spoiled = x.clone()
    spoiled[0, 3, 5], spoiled[1, 8, 7] = torch.nan, torch.inf
    bad = torch.zeros(2, 9, dtype=torch.bool, device=device)
    bad[0, 3] = bad[1, 8] = True
    clean = svg_kernels.layer_norm_modulate_fp8(x, row, row, backend=backend)
    ways = (
        svg_kernels.layer_norm_modulate_fp8(spoiled, row, row, backend=backend),
        svg_kernels.gate_residual_norm_fp8(torch.zeros_like(x), spoiled, backend=backend)[1:],
    )
    for q, scale in ways:
        assert torch.equal(q.float()[~bad], clean[0].float()[~bad])
        assert torch.equal(scale[~bad], clean[1][~bad])
        product = (q.float() * scale) @ torch.ones(130, 2, device=device)
        assert torch.equal(product.isfinite().all(-1), ~bad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)])
def test_norms_to_fp8_of_empty_tensors(backend, shape, device):
    x, row = torch.empty(shape, device=device), torch.empty(shape[0], shape[2], device=device)
    q, scale = svg_kernels.layer_norm_modulate_fp8(x, row, row, backend=backend)
    assert (q.shape, scale.shape) == (shape, (*shape[:2], 1))
    y, q, scale = svg_kernels.gate_residual_norm_fp8(x, x, backend=backend)
    assert (y.shape, q.shape, scale.shape) == (shape, shape, (*shape[:2], 1))


def test_norms_to_fp8_refuse_what_does_not_fit():
    x, row = torch.ones(2, 5, 8), torch.ones(2, 8)
    with pytest.raises(ValueError, match="scale and shift go together"):
        svg_kernels.gate_residual_norm_fp8(x, x, row, scale=row)
    with pytest.raises(ValueError, match=r"x must be \[2, 5, 8\] like residual"):
        svg_kernels.gate_residual_norm_fp8(x, x[:1], row)
    with pytest.raises(ValueError, match="shift must be"):
        svg_kernels.layer_norm_modulate_fp8(x, row, torch.ones(2, 3, 8))
    with pytest.raises(ValueError, match=r"x must be \[batch, tokens, width\]"):
        svg_kernels.layer_norm_modulate_fp8(x[0], row, row)
    with pytest.raises(TypeError, match="fp16, bf16 or fp32"):
        svg_kernels.layer_norm_modulate_fp8(x.int(), row, row)
    for call in (
        lambda: svg_kernels.layer_norm_modulate_fp8(x, row, row, backend="cuda"),
        lambda: svg_kernels.gate_residual_norm_fp8(x, x, backend="cuda"),
    ):
        with pytest.raises(svg_kernels.UnsupportedError, match="there is no compiled kernel"):
            call()


def test_norms_to_fp8_compile_whole(generator):
    x, row = torch.randn(2, 5, 16, generator=generator), torch.randn(2, 16, generator=generator)

    def function(x):
        q, scale = svg_kernels.layer_norm_modulate_fp8(x, row, row)
        y, other, rest = svg_kernels.gate_residual_norm_fp8(x, x, row, weight=row[0])
        return q.float() * scale, y, other.float() * rest

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x), function(x), strict=True):
        torch.testing.assert_close(got, want)


def test_norms_to_fp8_of_meta_tensors_have_the_right_shapes():
    x = torch.empty(2, 3, 8, device="meta", dtype=torch.bfloat16)
    row = torch.empty(2, 8, device="meta")
    ops = torch.ops.svg_kernels
    found = [
        *ops.layer_norm_modulate_fp8(x, row, row, None, None, 1e-6, "auto"),
        *ops.gate_residual_norm_fp8(x, x, None, None, None, None, None, 1e-6, "auto"),
    ]
    rows = [((2, 3, 8), torch.float8_e4m3fn), ((2, 3, 1), torch.float32)]
    wanted = [*rows, ((2, 3, 8), torch.bfloat16), *rows]
    assert [(tuple(t.shape), t.dtype) for t in found] == wanted


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [40, 1024, 2600])
def test_norm_rows_kernel_scales_rows(dtype, width, monkeypatch):
    # The interpreter loses the carry where rounding to e4m3 reaches the next power of two, so the
    # kernel writes what it would round.
    monkeypatch.setattr(torch, "float8_e4m3fn", torch.float32)
    generator = torch.Generator().manual_seed(1)
    residual, x = normal((2, 2, 5, width), dtype, "cpu", generator, 1.0).unbind(0)
    gate, scale, shift = torch.randn(3, 2, width, generator=generator).unbind(0)
    given = dict(scale=scale, shift=shift)
    found = [
        (
            svg_kernels.layer_norm_modulate_fp8(x, **given, backend="triton"),
            svg_kernels.layer_norm_modulate(x, **given, backend="reference"),
        )
    ]
    y, *rows = svg_kernels.gate_residual_norm_fp8(residual, x, gate, **given, backend="triton")
    wanted, z = svg_kernels.gate_residual_norm(residual, x, gate, **given, backend="reference")
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y, wanted, rtol=2 * unit, atol=4 * unit)
    for (q, row_scale), exact in [*found, (rows, z)]:
        torch.testing.assert_close(
            q * row_scale, exact.float(), rtol=2 * unit, atol=1e-5 + 4 * unit
        )
        torch.testing.assert_close(q.abs().amax(-1), torch.full((2, 5), 448.0), rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_norms_to_fp8_address_more_than_two_to_the_31_values(device):
    tokens = 2**31 // 5120 + 200
    x = torch.arange(5120, device=device, dtype=torch.bfloat16).expand(1, tokens, 5120)
    row = torch.zeros(1, 5120, device=device)
    q, scale = svg_kernels.layer_norm_modulate_fp8(x, row, row)
    assert torch.equal(q[0, -1].float(), q[0, 0].float())
    assert scale[0, -1] == scale[0, 0] > 0
    del q
    y, q, scale = svg_kernels.gate_residual_norm_fp8(x, x)
    assert torch.equal(y[0, -300:], 2 * x[0, -300:])
    assert torch.equal(q[0, -1].float(), q[0, 0].float())
    assert scale[0, -1] == scale[0, 0] > 0
