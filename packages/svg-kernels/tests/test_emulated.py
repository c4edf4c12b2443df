"""The compiled kernels themselves, run on the CPU by `emulator/`, against the reference."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import emulate
import pytest
import torch

import svg_kernels
from svg_kernels import _dispatch, _library
from svg_kernels.modulation import cuda as compiled_modulation

pytestmark = pytest.mark.timeout(900)  # compiling takes half a minute on two idle cores
CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, FP32]
ULP = {BF16: 2**-7, FP16: 2**-10, FP32: 2e-6}  # one step: two roundings may part ways


@pytest.fixture(scope="module")
def library_path(tmp_path_factory):
    pytest.importorskip("tvm_ffi")
    if reason := emulate.missing():
        pytest.skip(reason)
    return emulate.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def library(library_path):
    return pytest.importorskip("tvm_ffi").load_module(str(library_path))


@pytest.fixture(autouse=True)
def emulated(library, monkeypatch):
    monkeypatch.setitem(_library._libraries, CPU, _library.Library(functions=library))
    monkeypatch.setattr(_dispatch, "_no_cuda_device", lambda device: None)
    monkeypatch.setattr(_dispatch, "_selected", {})
    monkeypatch.setitem(_dispatch._launchers, ("cuda", CPU), library)


def normal(shape, dtype, generator, mean=0.0):
    return (torch.randn(shape, generator=generator) + mean).to(dtype)


def both(function, *args, **kwargs):
    with torch.no_grad():  # straight to the launchers
        got = function(*args, backend="cuda", **kwargs)
    want = function(*args, backend="reference", **kwargs)
    pairs = [(got, want)] if isinstance(got, torch.Tensor) else zip(got, want, strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert a.is_contiguous() == b.is_contiguous()
        torch.testing.assert_close(a, b, rtol=ULP[a.dtype], atol=ULP[a.dtype], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 8, 40, 64, 130, 136, 256, 264, 1536, 5120, 8192, 16392])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_rms_norm_and_layer_norm_of_every_width(dtype, width, mean, generator):
    rows = 300 if width <= 64 else 40 if width <= 256 else 5
    x = normal((rows, width), dtype, generator, mean)
    weight, bias = normal((2, width), FP32, generator).unbind(0)
    both(svg_kernels.rms_norm, x, weight.to(dtype), eps=1e-3)
    both(svg_kernels.layer_norm, x, weight, bias)
    both(svg_kernels.layer_norm, x, out_dtype=FP32)


@pytest.mark.parametrize("shape", [(0, 4, 64), (2, 0, 64), (2, 4, 0)])
def test_launchers_take_empty_tensors(shape):
    x = torch.empty(shape)
    both(svg_kernels.rms_norm, x)
    both(svg_kernels.layer_norm, x)
    both(svg_kernels.gate_residual, x, x, torch.empty(shape[0], shape[2]))
    both(svg_kernels.layer_norm_modulate, x, *torch.empty(2, shape[0], shape[2]))
    heads = torch.empty(1, *shape)
    order = torch.empty(1, *shape[:2], dtype=torch.int32)
    both(svg_kernels.unpermute_rows, heads, order)
    both(svg_kernels.permute_rows, heads, order)


@pytest.mark.parametrize("width", [64, 136, 1536])
@pytest.mark.parametrize("tokens", [1, 19])
def test_layer_norm_modulate_and_gate_residual_follow_batch_and_token(width, tokens, generator):
    x = normal((3, 19, width), BF16, generator, 5.0)
    table = normal((3, tokens, 6, width), FP32, generator)
    shift, scale, gate = (t.squeeze(2) for t in table[:, :, :3].chunk(3, dim=2))
    both(svg_kernels.layer_norm_modulate, x, scale, shift)
    both(svg_kernels.layer_norm_modulate, x[..., 8:], scale[..., 8:], shift[:, 0, 8:])
    both(svg_kernels.layer_norm_modulate, x[..., 1:], scale[..., 1:], shift[..., 1:])
    both(svg_kernels.gate_residual, x, x.flip(1), gate)
    both(svg_kernels.gate_residual, x.float(), x, gate.bfloat16())
    both(svg_kernels.gate_residual, x[..., 1:], x[..., 1:], gate[..., 1:])


def test_layer_norm_of_strided_rows(generator):
    fused = normal((3, 17, 3 * 64), FP16, generator)
    for view in (
        fused[..., 64:128],
        fused[:, ::2, :64],
        fused[..., 1:65],
        fused[:, :5].transpose(0, 2),
    ):
        both(svg_kernels.layer_norm, view)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("dim", [6, 64, 80, 128])
@pytest.mark.parametrize("start", [0, 4])
def test_rope(dtype, pairing, dim, start, generator):
    base = normal((2, 21, 5 * dim), dtype, generator)
    x = base.unflatten(-1, (5, dim)).transpose(1, 2)
    theta = torch.rand(15, dim // 2, generator=generator) * 6
    wide = torch.cat((theta, theta), -1) if pairing == "half" else theta.repeat_interleave(2, -1)
    common = {"pairing": pairing, "start": start}
    both(svg_kernels.rope, x, theta.cos(), theta.sin(), **common)
    both(svg_kernels.rope, x, wide.cos()[None, :, None], wide.sin()[None, :, None], **common)
    both(svg_kernels.rope, x, torch.polar(torch.ones_like(theta), theta), **common)
    a, b = x.clone(), x.clone()
    svg_kernels.rope(a, wide.cos(), wide.sin(), inplace=True, backend="cuda", **common)
    svg_kernels.rope(b, wide.cos(), wide.sin(), inplace=True, backend="reference", **common)
    torch.testing.assert_close(a, b, rtol=ULP[dtype], atol=ULP[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("dim", [6, 64, 80, 128])
@pytest.mark.parametrize("key_heads", [1, 3, 8])
@pytest.mark.parametrize("quick", [False, True])
def test_rope_of_a_pair(dtype, pairing, dim, key_heads, quick, generator):
    query = normal((2, 21, 5 * dim), dtype, generator).unflatten(-1, (5, dim)).transpose(1, 2)
    key = normal((2, key_heads, 21, dim), dtype, generator)
    theta = torch.rand(2, 15, dim // 2, generator=generator) * 6
    tables = theta.cos(), theta.sin()
    common = {"pairing": pairing, "start": 4, "backend": "cuda"}
    with torch.set_grad_enabled(not quick):
        for pair in ((query, key), (key, query)):
            wanted = [svg_kernels.rope(x, *tables, **common) for x in pair]
            found = svg_kernels.rope(pair, *tables, **common)
            turned = tuple(x.clone() for x in pair)
            assert svg_kernels.rope(turned, *tables, inplace=True, **common)[1] is turned[1]
            for y, z, want in zip(found, turned, wanted, strict=True):
                torch.testing.assert_close(y, want, rtol=0, atol=0)
                torch.testing.assert_close(z, want, rtol=0, atol=0)


def test_rope_of_a_pair_of_which_vectors_serve_one(generator):
    base = normal((2, 3, 9, 66), BF16, generator)
    theta = torch.rand(9, 32, generator=generator)
    for pair in ((base[..., 1:65], base[..., :64].clone()), (base[:, :1, :, :64], base[..., 2:])):
        for pairing in ("interleaved", "half"):
            both(svg_kernels.rope, pair, theta.cos(), theta.sin(), pairing=pairing)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(3, 6), (12, 64), (5, 128), (2, 256), (3, 80)])
def test_qk_norm_rope(dtype, pairing, across, heads, dim, generator):
    fused = normal((2, 9, 3 * heads * dim), dtype, generator, 1.0)
    query, key, _ = fused.chunk(3, dim=-1)
    weight = normal((heads * dim if across else dim,), FP32, generator)
    theta = torch.rand(6, dim // 2, generator=generator) * 6
    common = (query, key, weight, weight)
    both(svg_kernels.qk_norm_rope, *common, heads=heads)
    both(svg_kernels.qk_norm_rope, *common, theta.cos(), theta.sin(), heads=heads, start=2,
         pairing=pairing)  # fmt: skip


def test_qk_norm_rope_of_fewer_key_heads_into_slices(generator):
    query, key = normal((2, 9, 4 * 64), BF16, generator), normal((2, 9, 2 * 64), BF16, generator)
    weight = normal((64,), BF16, generator)
    whole = [torch.full((2, heads, 12, 64), 7.0).bfloat16() for heads in (4, 2)]
    out = (whole[0][:, :, 2:11], whole[1][:, :, 2:11])
    svg_kernels.qk_norm_rope(query, key, weight, weight, heads=4, out=out, backend="cuda")
    want = svg_kernels.qk_norm_rope(query, key, weight, weight, heads=4, backend="reference")
    for part, full, expected in zip(out, whole, want, strict=True):
        torch.testing.assert_close(part, expected, rtol=2**-7, atol=2**-7)
        assert (full[:, :, :2] == 7).all()
        assert (full[:, :, 11:] == 7).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
@pytest.mark.parametrize("dim", [1, 7, 64, 130])
def test_permute_rows_and_unpermute_rows(dtype, dim, generator):
    x = torch.randint(0, 100, (2, 3, 65, dim), generator=generator).to(dtype)
    y = torch.randint(0, 100, (2, 5, 65, dim), generator=generator).to(dtype)
    orders = [torch.rand(2, n, 65, generator=generator).argsort(-1).int() for n in (3, 5, 3)]
    tensors = (x, y, x.flip(2)[:, :, :40].repeat(1, 1, 2, 1)[:, :, :65])
    moved = svg_kernels.permute_rows(tensors, orders, backend="cuda")
    want = svg_kernels.permute_rows(tensors, orders, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(moved, want, strict=True))
    back = svg_kernels.unpermute_rows(moved, orders, backend="cuda")
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))


def test_layer_norm_blocks_that_walk_over_many_rows(generator):
    # The emulator's one processor gets few blocks, so each has several rows to do.
    for rows, width in ((20, 5120), (70, 264), (5000, 40)):
        x = normal((2, rows // 2, width), BF16, generator, 2.0)
        weight, bias = normal((2, width), FP32, generator).unbind(0)
        scale, shift = normal((2, 2, width), FP32, generator).unbind(0)
        both(svg_kernels.rms_norm, x, weight)
        both(svg_kernels.layer_norm, x, weight, bias)
        if width > 256:
            both(svg_kernels.layer_norm_modulate, x, scale, shift, weight=weight, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spoil", [torch.nan, torch.inf])
def test_launchers_keep_nan_where_the_reference_has_it(dtype, spoil, generator):
    for width in (7, 40, 264, 5120):  # every norm kernel
        x = normal((2, 9, width), dtype, generator)
        x[0, 4, 5] = x[1, 8, 6] = spoil
        scale = normal((2, width), FP32, generator)
        both(svg_kernels.rms_norm, x)
        both(svg_kernels.layer_norm, x)
        both(svg_kernels.layer_norm_modulate, x, scale, scale)
        both(svg_kernels.gate_residual, x, x, scale)
    for dim in (6, 64):
        x = normal((2, 9, 3 * dim), dtype, generator)
        x[0, 4, 5] = x[1, 8, dim + 1] = spoil
        heads = x.unflatten(-1, (3, dim)).transpose(1, 2)
        theta = torch.rand(9, dim // 2, generator=generator)
        order = torch.rand(2, 3, 9, generator=generator).argsort(-1).int()
        for pairing in ("interleaved", "half"):
            tables = theta.cos(), theta.sin()
            both(svg_kernels.rope, heads, *tables, pairing=pairing)
            for weight in (scale[0, :dim].clone(), scale[0, : 3 * dim].clone()):
                both(svg_kernels.qk_norm_rope, x, x, weight, weight, *tables, heads=3,
                     pairing=pairing)  # fmt: skip
        both(svg_kernels.permute_rows, heads, order)


def test_launchers_are_called_directly(monkeypatch, generator):
    def refuse(package, backend, device):
        assert backend == "reference", "the call went through the dispatcher"
        return _dispatch.select_backend(package, backend, device)

    for operation in ("norm", "modulation", "rope", "qk_norm_rope", "permute"):
        module = importlib.import_module(f"svg_kernels.{operation}")
        monkeypatch.setattr(module, "select_backend", refuse)
    x = normal((2, 5, 64), BF16, generator)
    scale = torch.nn.Parameter(normal((2, 64), FP32, generator))
    table = torch.rand(5, 32, generator=generator)
    order = torch.arange(5).int().flip(0)
    both(svg_kernels.rms_norm, x[:, ::2])
    both(svg_kernels.layer_norm_modulate, x, scale, scale)
    both(svg_kernels.gate_residual, x, x, scale)
    both(svg_kernels.rope, x[:, None], table, table)
    both(svg_kernels.rope, (x[:, None], x[:, None]), table, table)
    both(svg_kernels.qk_norm_rope, x, x, scale[0], scale[0], table, table, heads=1)
    both(svg_kernels.permute_rows, (x[:, None], x[:1, None].float()), order)


def test_launchers_get_converted_what_they_refuse(generator):
    x = normal((2, 3, 5, 8), BF16, generator)
    flipped = x.transpose(-1, -2).contiguous().transpose(-1, -2)  # the last axis is strided
    theta = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    turns = torch.polar(torch.ones_like(theta), theta)
    both(svg_kernels.rms_norm, flipped)
    both(svg_kernels.layer_norm, x.permute(2, 1, 0, 3))  # no two strides describe its rows
    both(svg_kernels.rope, flipped, theta.cos(), theta.sin())
    both(svg_kernels.rope, x, theta.cos().float(), theta.sin().float().T.contiguous().T)
    both(svg_kernels.rope, (x, flipped), theta.cos(), theta.sin())
    a, b = flipped.clone(), x.clone()  # each as it is strided
    svg_kernels.rope((a, b), theta.cos(), theta.sin(), inplace=True, backend="cuda")
    assert torch.equal(a, b)
    both(svg_kernels.rope, x, turns)
    both(svg_kernels.rope, x, turns.to(torch.complex64).conj())
    both(svg_kernels.rope, x, turns.real.float(), turns.to(torch.complex64).conj().imag)
    order = torch.arange(5).int()[:, None].expand(5, 2).contiguous()[:, 0]  # strided
    moved = svg_kernels.permute_rows(flipped, order, backend="cuda")
    assert torch.equal(moved, x)
    small = x.to(torch.float8_e4m3fn)
    with torch.no_grad():
        moved = svg_kernels.permute_rows(small, order.flip(0).contiguous(), backend="cuda")
    assert torch.equal(moved.view(torch.uint8), small.view(torch.uint8).flip(2))


def test_launchers_leave_refusals_to_the_checks_in_words():
    x, vector = torch.ones(1, 4, 8), torch.ones(8)
    table = torch.ones(5, 4)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"weight must be \[8\] .* got \[7\]"):
            svg_kernels.rms_norm(x, torch.ones(7), backend="cuda")
        with pytest.raises(TypeError, match="out_dtype must be"):
            svg_kernels.layer_norm(x, out_dtype=torch.float64, backend="cuda")
        with pytest.raises(ValueError, match=r"scale must be \[1, 8\]"):
            svg_kernels.layer_norm_modulate(x, torch.ones(2, 8), vector[None], backend="cuda")
        with pytest.raises(ValueError, match=r"x must be \[1, 4, 8\] like residual"):
            svg_kernels.gate_residual(x, x[:, :3], vector[None], backend="cuda")
        with pytest.raises(ValueError, match="the tables cover tokens 0 to 4, but x has 4"):
            svg_kernels.rope(x[None], table, table, backend="cuda")
        with pytest.raises(ValueError, match="must have equal batch, tokens and head_dim"):
            svg_kernels.rope((x[None], x[None, :, :3]), table, table, backend="cuda")
        with pytest.raises(TypeError, match="query and key must share a dtype"):
            svg_kernels.rope((x[None], x[None].half()), table, table, backend="cuda")
        with pytest.raises(ValueError, match="sin was given without cos"):
            svg_kernels.qk_norm_rope(x, x, vector, vector, sin=table, heads=1, backend="cuda")
        with pytest.raises(ValueError, match="heads must divide 8, got 9"):
            svg_kernels.qk_norm_rope(x, x, vector, vector, heads=9, backend="cuda")
        with pytest.raises(ValueError, match="head_dim must be even"):
            svg_kernels.qk_norm_rope(x, x, vector, vector, heads=8, backend="cuda")
        with pytest.raises(TypeError, match="order must be int32"):
            svg_kernels.permute_rows(x[None], torch.arange(4), backend="cuda")
        with pytest.raises(ValueError, match="order must name each of the 4 rows"):
            svg_kernels.unpermute_rows(x[None], torch.arange(3).int(), backend="cuda")
    with pytest.raises(RuntimeError, match="did not take arguments"):
        compiled_modulation.gate_residual(x.long(), x, vector[None], FP32)


def test_launchers_touch_nothing_outside_the_tensors(library_path):
    script = Path(__file__).with_name("run_guarded.py")
    command = [sys.executable, str(script), str(library_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
