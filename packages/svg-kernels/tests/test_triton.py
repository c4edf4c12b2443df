"""The Triton backend against the reference, interpreted on a CPU (fp32 and fp16 only)."""

from __future__ import annotations

import pytest
import torch

import svg_kernels

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("triton_interpreter")
DTYPES = [torch.float32, torch.float16]


def normal(shape, dtype, generator, mean=0.0):
    return (torch.randn(shape, generator=generator) + mean).to(dtype)


def both(function, *args, **kwargs):
    got = function(*args, backend="triton", **kwargs)
    want = function(*args, backend="reference", **kwargs)
    for a, b in zip(
        *[(r,) if isinstance(r, torch.Tensor) else r for r in (got, want)], strict=True
    ):
        assert a.dtype == b.dtype
        tolerance = 2e-6 if a.dtype == torch.float32 else 1e-3
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1), (37, 130), (2, 3, 64), (3, 1, 1536), (2, 5200)])
def test_rms_norm_and_layer_norm_in_triton(dtype, shape, generator):
    x = normal(shape, dtype, generator, 3.0)
    weight, bias = normal((2, shape[-1]), torch.float32, generator).unbind(0)
    both(svg_kernels.rms_norm, x)
    both(svg_kernels.rms_norm, x, weight.half(), eps=1e-2, out_dtype=torch.float32)
    both(svg_kernels.layer_norm, x, weight, bias)
    both(svg_kernels.layer_norm, x.transpose(0, -1).contiguous().transpose(0, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_layer_norm_modulate_and_gate_residual_in_triton(dtype, tokens, generator):
    x = normal((2, 7, 70), dtype, generator, 3.0)
    scale = normal((2, tokens, 70), torch.float32, generator)
    shift = normal((2, 70), torch.float32, generator)
    both(svg_kernels.layer_norm_modulate, x, scale, shift, bias=shift[0])
    both(svg_kernels.gate_residual, x, x[:, :, :70], scale, out_dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("width", [70, 2600])
def test_gate_residual_norm_in_triton(dtype, tokens, width, generator):
    residual, x = normal((2, 2, 7, width), dtype, generator, 3.0).unbind(0)
    gate, scale = normal((2, 2, tokens, width), torch.float32, generator).unbind(0)
    weight = normal((width,), dtype, generator)
    both(svg_kernels.gate_residual_norm, residual, x, gate, scale=scale, shift=gate, weight=weight)
    both(svg_kernels.gate_residual_norm, residual, x.float(), bias=weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("across", [False, True])
def test_rope_and_qk_norm_rope_in_triton(dtype, pairing, across, generator):
    dim, heads = 12, 3
    theta = torch.rand(5, dim // 2, generator=generator) * 6
    tables = (theta.cos(), theta.sin())
    x = normal((2, 9, heads * dim), dtype, generator)
    weight = normal((heads * dim if across else dim,), torch.float32, generator)
    both(svg_kernels.rope, x.unflatten(-1, (heads, dim)).transpose(1, 2), *tables,
         pairing=pairing, start=2)  # fmt: skip
    both(svg_kernels.qk_norm_rope, x, x, weight, weight, *tables,
         heads=heads, pairing=pairing, start=3)  # fmt: skip
    both(svg_kernels.qk_norm_rope, x, x, weight, weight, heads=heads)
    y, z = (x.unflatten(-1, (heads, dim)).transpose(1, 2).clone() for _ in range(2))
    svg_kernels.rope(y, *tables, inplace=True, backend="triton")
    svg_kernels.rope(z, *tables, inplace=True, backend="reference")
    torch.testing.assert_close(y, z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("inplace", [False, True])
def test_rope_of_a_pair_in_triton(dtype, pairing, inplace, generator):
    query = normal((2, 9, 3 * 12), dtype, generator).unflatten(-1, (3, 12)).transpose(1, 2)
    key = normal((2, 1, 9, 12), dtype, generator)
    theta = torch.rand(2, 5, 6, generator=generator) * 6
    tables = (theta.cos(), theta.sin())
    common = dict(pairing=pairing, start=3, backend="triton")
    wanted = [svg_kernels.rope(x, *tables, **common) for x in (query, key)]
    found = svg_kernels.rope((query, key), *tables, inplace=inplace, **common)
    for y, x, want in zip(found, (query, key), wanted, strict=True):
        assert (y is x) == inplace
        assert torch.equal(y, want)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
def test_permute_rows_and_unpermute_rows_in_triton(dtype, generator):
    x = torch.randint(0, 100, (2, 3, 19, 10), generator=generator).to(dtype)
    order = torch.rand(2, 3, 19, generator=generator).argsort(-1).int()
    y = svg_kernels.permute_rows(x, order, backend="triton")
    assert torch.equal(y, svg_kernels.permute_rows(x, order, backend="reference"))
    assert torch.equal(svg_kernels.unpermute_rows(y, order, backend="triton"), x)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_in_triton_keep_nan_where_the_reference_has_it(dtype, generator):
    x = normal((2, 9, 3 * 12), dtype, generator)
    scale = normal((2, 36), torch.float32, generator)
    weight = normal((12,), torch.float32, generator)
    theta = torch.rand(9, 6, generator=generator)
    tables = theta.cos(), theta.sin()
    order = torch.rand(2, 3, 9, generator=generator).argsort(-1).int()
    for spoil in (torch.nan, torch.inf):
        x[0, 4, 5] = x[1, 8, 30] = spoil
        heads = x.unflatten(-1, (3, 12)).transpose(1, 2)
        both(svg_kernels.rms_norm, x)
        both(svg_kernels.layer_norm, x)
        both(svg_kernels.layer_norm_modulate, x, scale, scale)
        both(svg_kernels.gate_residual, x, x, scale)
        for pairing in ("interleaved", "half"):
            both(svg_kernels.rope, heads, *tables, pairing=pairing)
            both(svg_kernels.qk_norm_rope, x, x, weight, weight, *tables, heads=3,
                 pairing=pairing)  # fmt: skip
        both(svg_kernels.permute_rows, heads, order)
