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
CAUSAL = (1, 1, 1, 1, 2, 0)
SHAPES = [(1, 64, 5, 6, 7), (2, 130, 1, 3, 40), (1, 512, 3, 5, 5), (2, 6, 4, 1, 1)]


def by_torch(x, weight=None, bias=None, *, groups=0, eps=1e-6, silu=False, upsample, padding):
    """Compute it step by step, as a decoder of diffusers does."""
    if groups:
        x = F.group_norm(x, groups, weight, bias, eps)
    if silu:
        x = F.silu(x)
    first, others = x[:, :, :1], x[:, :, 1:]
    first = F.interpolate(first, scale_factor=(1, *map(float, upsample[1:])), mode="nearest")
    if others.shape[2]:
        others = F.interpolate(others, scale_factor=tuple(map(float, upsample)), mode="nearest")
    x = torch.cat((first, others), 2) if others.shape[2] else first
    return F.pad(x, padding, mode="replicate")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_conv_input_is_as_exact_as_torch(
    backend, dtype, shape, mean, device, generator, assert_accurate
):
    x = (torch.randn(shape, device=device, generator=generator) + mean).to(dtype)
    weight, bias = torch.randn(2, shape[1], device=device, generator=generator).to(dtype).unbind(0)
    settings = {"groups": 2, "silu": True, "upsample": (1, 1, 1), "padding": CAUSAL}
    found = svg_kernels.conv_input(x, weight, bias, backend=backend, **settings)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    exact = by_torch(x.double(), weight.double(), bias.double(), **settings)
    assert_accurate(found, by_torch(x, weight, bias, **settings), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("upsample", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("padding", [(0,) * 6, CAUSAL, (3, 0, 0, 2, 0, 1)])
def test_conv_input_repeats_positions_bit_for_bit(
    backend, shape, upsample, padding, device, generator
):
    x = torch.randn(shape, device=device, generator=generator).half()
    found = svg_kernels.conv_input(x, upsample=upsample, padding=padding, backend=backend)
    assert torch.equal(found, by_torch(x, upsample=upsample, padding=padding))


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_input_reads_any_layout(backend, device, generator):
    wide = torch.randn(2, 40, 6, 9, 8, device=device, generator=generator)
    channels_last = wide.contiguous(memory_format=torch.channels_last_3d)
    settings = {"groups": 4, "silu": True, "padding": CAUSAL, "backend": backend}
    for x in (wide, channels_last, channels_last[:, 8:24, 1:, ::2, 1:], wide.transpose(3, 4)):
        found = svg_kernels.conv_input(x, **settings)
        torch.testing.assert_close(found, svg_kernels.conv_input(x.contiguous(), **settings))


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_input_of_skewed_values(backend, device, generator):
    x = torch.randn(1, 32, 3, 40, 30, device=device, generator=generator)
    x[:, :, 0, 0, 0] = 3e4  # what the others are measured from
    x[:, 5] *= 1e-3
    x[:, 6] += 1e3
    settings = {"groups": 32, "upsample": (1, 1, 1), "padding": (0,) * 6}
    found = svg_kernels.conv_input(x, backend=backend, **settings)
    exact = by_torch(x.double(), **settings)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_input_keeps_nan_to_its_group(backend, device, generator):
    x = torch.randn(2, 8, 2, 3, 3, device=device, generator=generator)
    x[0, 2, 1, 1, 1] = torch.nan
    found = svg_kernels.conv_input(x, groups=4, silu=True, padding=CAUSAL, backend=backend).isnan()
    assert found[0, 2:4].all()
    assert not found[0, :2].any()
    assert not found[0, 4:].any()
    assert not found[1].any()
    plain = svg_kernels.conv_input(x, padding=CAUSAL, backend=backend)
    assert torch.equal(plain.isnan(), F.pad(x, CAUSAL, mode="replicate").isnan())


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_input_adds_what_a_convolution_has_left_out(
    backend, device, generator, assert_accurate
):
    x = torch.randn(2, 12, 3, 4, 5, device=device, generator=generator).half()
    offset, weight = torch.randn(2, 12, device=device, generator=generator).half().unbind(0)
    settings = {"groups": 3, "silu": True, "upsample": (1, 1, 1), "padding": CAUSAL}
    found = svg_kernels.conv_input(x, weight, offset=offset, backend=backend, **settings)
    plain = by_torch(x + offset.view(-1, 1, 1, 1), weight, **settings)
    exact = by_torch(x.double() + offset.double().view(-1, 1, 1, 1), weight.double(), **settings)
    assert_accurate(found, plain, exact)


def test_conv_input_of_nothing():
    assert svg_kernels.conv_input(torch.empty(0, 4, 2, 3, 3), groups=2).shape == (0, 4, 2, 3, 3)


def test_conv_input_refuses_what_it_cannot():
    x = torch.randn(1, 6, 2, 3, 3)
    vector = torch.ones(6)
    with pytest.raises(TypeError, match=r"x must be fp16, bf16 or fp32, got torch\.int64"):
        svg_kernels.conv_input(x.long())
    with pytest.raises(ValueError, match=r"x must be \[batch, channels, frames, height, width\]"):
        svg_kernels.conv_input(x[0])
    with pytest.raises(ValueError, match="groups must be 0 or divide the 6 channels"):
        svg_kernels.conv_input(x, groups=4)
    with pytest.raises(ValueError, match="weight belongs to the norm"):
        svg_kernels.conv_input(x, vector)
    with pytest.raises(ValueError, match="offset belongs to the norm"):
        svg_kernels.conv_input(x, offset=vector)
    with pytest.raises(ValueError, match=r"bias must be \[6\]"):
        svg_kernels.conv_input(x, vector, vector[:5], groups=2)
    with pytest.raises(ValueError, match="upsample must be three numbers"):
        svg_kernels.conv_input(x, upsample=(2, 0, 1))
    with pytest.raises(ValueError, match="padding must be six numbers"):
        svg_kernels.conv_input(x, padding=(1, 1))
    with pytest.raises(UnsupportedError, match="there is no compiled kernel"):
        svg_kernels.conv_input(x, backend="cuda")


def test_conv_input_is_an_operator():
    x = torch.randn(1, 6, 2, 3, 3)
    args = (
        x,
        torch.ones(6),
        None,
        torch.ones(6),
        2,
        1e-6,
        True,
        [2, 2, 2],
        list(CAUSAL),
        "reference",
    )
    torch.library.opcheck(torch.ops.svg_kernels.conv_input.default, args)


@pytest.mark.gpu
def test_conv_input_in_a_cuda_graph(device, generator):
    x = torch.randn(1, 64, 3, 9, 9, device=device, generator=generator).half()
    settings = {"groups": 32, "silu": True, "upsample": (2, 2, 2), "padding": CAUSAL}
    with torch.no_grad():
        svg_kernels.conv_input(x, **settings)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = svg_kernels.conv_input(x, **settings)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(found, svg_kernels.conv_input(x, **settings))


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_conv_input_kernels_interpreted_of_skewed_values(mean, generator):
    x = torch.randn(1, 16, 3, 20, 30, generator=generator) + mean
    x[:, :, 0, 0, 0] = 3e4
    x[:, 5] *= 1e-3
    settings = {"groups": 8, "upsample": (1, 1, 1), "padding": (0,) * 6}
    found = svg_kernels.conv_input(x, backend="triton", **settings)
    exact = by_torch(x.double(), **settings)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=2e-6)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("shape", [(2, 130, 3, 4, 5), (1, 6, 2, 30, 40), (1, 32, 1, 1, 3)])
@pytest.mark.parametrize("upsample", [(1, 1, 1), (2, 2, 2)])
def test_conv_input_kernels_interpreted(shape, upsample, generator):
    x = torch.randn(shape, generator=generator) + 50.0
    x = x.contiguous(memory_format=torch.channels_last_3d)
    # Vectors that do not lie side by side, as a column of a table.
    weight, bias, offset = torch.randn(shape[1], 3, generator=generator).unbind(1)
    settings = {"groups": 2, "silu": True, "upsample": upsample, "padding": CAUSAL}
    settings["offset"] = offset
    found = svg_kernels.conv_input(x, weight, bias, backend="triton", **settings)
    want = svg_kernels.conv_input(x, weight, bias, backend="reference", **settings)
    torch.testing.assert_close(found, want, rtol=2e-6, atol=1e-5)
    plain = svg_kernels.conv_input(x, upsample=upsample, padding=CAUSAL, backend="triton")
    assert torch.equal(plain, by_torch(x, upsample=upsample, padding=CAUSAL))
