from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import svg_kernels
from svg_kernels import UnsupportedError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = [
    pytest.param("reference", id="reference"),
    pytest.param("triton", marks=pytest.mark.gpu, id="triton"),
]
EXACT = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
# Half a step of e4m3, three bits after the point, and a little for the arithmetic before it.
STEP = 2.0**-4 * 1.001


def check(x, activation, backend, **largest):
    q, scale = svg_kernels.quantize_rows(x, activation=activation, backend=backend, **largest)
    assert q.dtype == torch.float8_e4m3fn
    assert q.shape == x.shape
    assert q.is_contiguous()
    assert scale.dtype == torch.float32
    assert scale.shape == (*x.shape[:-1], 1)
    exact = EXACT[activation](x.double())
    size = exact.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    wanted = size / largest.get("largest", 448)
    torch.testing.assert_close(scale.double(), wanted, rtol=1e-5, atol=0)
    # Below 2^-6 of e4m3's values the step is constant, 2^-9.
    allowed = torch.maximum(exact.abs() * STEP, 2.0**-10 * 1.01 * scale.double())
    assert ((q.double() * scale.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("width", [1, 16, 130, 5120])
def test_quantize_rows_is_within_half_a_step(backend, dtype, activation, width, device, generator):
    x = torch.randn(3, 7, width, device=device, generator=generator)
    x = x * torch.logspace(-3, 3, 7, device=device)[:, None]
    check(x.to(dtype), activation, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize_rows_by_several_grids_is_right_on_average(backend, device, generator):
    x = torch.randn(9, 640, device=device, generator=generator)
    found = []
    for largest in (448.0, 400.1, 350.7, 300.3, 260.9, 224.5):
        check(x, "none", backend, largest=largest)
        q, scale = svg_kernels.quantize_rows(x, largest=largest, backend=backend)
        torch.testing.assert_close(
            q.float().abs().amax(-1), torch.full_like(x[:, 0], largest), rtol=STEP, atol=0
        )
        found.append(q.double() * scale.double() - x.double())
    errors = [error.norm() for error in found]
    assert max(errors) < 1.1 * min(errors)
    assert torch.stack(found).mean(0).norm() < 0.5 * min(errors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize_rows_takes_any_strides(backend, device, generator):
    x = torch.randn(2, 64, 9, 3, device=device, generator=generator)
    for view in (x[..., 0].mT, x[:, 3], x[0, :, :, 1].t(), x[:0, 0]):
        if view.numel() == 0:
            q, scale = svg_kernels.quantize_rows(view, backend=backend)
            assert q.shape == view.shape
            assert scale.shape == (*view.shape[:-1], 1)
        else:
            check(view, "none", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize_rows_keeps_nan_and_infinity_in_their_row(backend, device, generator):
    x = torch.randn(4, 32, device=device, generator=generator)
    clean = svg_kernels.quantize_rows(x, backend=backend)
    x[1, 5], x[2, 7] = torch.nan, -torch.inf
    q, scale = svg_kernels.quantize_rows(x, backend=backend)
    for row in (0, 3):
        assert torch.equal(q[row].float(), clean[0][row].float())
        assert torch.equal(scale[row], clean[1][row])
    product = (q.float() * scale) @ torch.ones(32, 2, device=device)
    assert product.isfinite().all(dim=1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize_rows_of_zeros(backend, device):
    q, scale = svg_kernels.quantize_rows(torch.zeros(2, 48, device=device), backend=backend)
    assert (q.float() == 0).all()
    assert (scale > 0).all()


def test_quantize_rows_refuses_what_it_cannot(device):
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="activation must be one of"):
        svg_kernels.quantize_rows(x, activation="relu")
    for largest in (0.0, 449.0, float("nan")):
        with pytest.raises(ValueError, match="largest must be above 0 and at most 448, got"):
            svg_kernels.quantize_rows(x, largest=largest)
    with pytest.raises(TypeError, match="fp16, bf16 or fp32"):
        svg_kernels.quantize_rows(x.long())
    with pytest.raises(UnsupportedError, match="there is no compiled kernel"):
        svg_kernels.quantize_rows(x, backend="cuda")


def test_quantize_rows_of_meta_tensors_has_the_right_shapes():
    q, scale = torch.ops.svg_kernels.quantize_rows(
        torch.empty(2, 3, 8, device="meta"), "none", 448.0, "auto"
    )
    assert (q.shape, q.dtype) == ((2, 3, 8), torch.float8_e4m3fn)
    assert (scale.shape, scale.dtype) == ((2, 3, 1), torch.float32)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("largest", [448.0, 300.0])
def test_quantize_rows_kernel_scales_rows(activation, largest, monkeypatch):
    # The interpreter loses the carry where rounding to e4m3 reaches the next power of two, so the
    # kernel writes what it would round.
    monkeypatch.setattr(torch, "float8_e4m3fn", torch.float32)
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1))
    q, scale = svg_kernels.quantize_rows(
        x, activation=activation, largest=largest, backend="triton"
    )
    exact = EXACT[activation](x.double())
    torch.testing.assert_close(q.double() * scale, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(q.abs().amax(-1), torch.full((2, 5), largest), rtol=1e-5, atol=0)
