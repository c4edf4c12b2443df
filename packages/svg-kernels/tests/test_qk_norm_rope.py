from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rotary_oracles import angles, normal, rotated

import svg_kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = [
    pytest.param("reference", id="reference"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="cuda"),
    pytest.param("triton", marks=pytest.mark.gpu, id="triton"),
]
PAIRINGS = ["interleaved", "half"]


def exact_qk(x, weight, heads, theta, pairing, start, eps):
    x, weight = x.double(), weight.double()
    dim = x.shape[-1] // heads
    if weight.numel() == dim:
        x = x.unflatten(-1, (heads, dim))
    y = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
    y = y.reshape(*y.shape[:2], heads, dim).transpose(1, 2).contiguous()
    stop = start + theta.shape[0]
    y[:, :, start:stop] = rotated(y[:, :, start:stop], theta, pairing, torch.float64)
    return y


def plain_qk(x, weight, heads, theta, pairing, start, eps):
    dim = x.shape[-1] // heads
    if weight.numel() == dim:
        x = x.unflatten(-1, (heads, dim))
    y = F.rms_norm(x, (x.shape[-1],), weight, eps)
    y = y.reshape(*y.shape[:2], heads, dim).transpose(1, 2).contiguous()
    stop = start + theta.shape[0]
    turned = rotated(y[:, :, start:stop], theta, pairing, torch.float32)
    y[:, :, start:stop] = turned.to(y.dtype)
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(12, 12, 128), (4, 2, 64), (3, 3, 6)])
def test_qk_norm_rope_is_as_exact_as_torch(
    backend, dtype, pairing, across, heads, key_heads, dim, device, generator, assert_accurate
):
    query = normal((2, 23, heads * dim), dtype, device, generator)
    key = normal((2, 23, key_heads * dim), dtype, device, generator) + 3
    weights = [
        normal((n * dim if across else dim,), torch.float32, device, generator)
        for n in (heads, key_heads)
    ]
    theta = angles(17, dim, device, generator)
    q, k = svg_kernels.qk_norm_rope(
        query, key, *weights, theta.cos(), theta.sin(),
        heads=heads, eps=1e-5, pairing=pairing, start=2, backend=backend,
    )  # fmt: skip
    cases = ((query, weights[0], heads, q), (key, weights[1], key_heads, k))
    for x, weight, n, actual in cases:
        assert actual.is_contiguous()
        assert actual.dtype == dtype
        common = (n, theta, pairing, 2, 1e-5)
        assert_accurate(
            actual, plain_qk(x, weight.to(dtype), *common), exact_qk(x, weight, *common)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_qk_norm_rope_without_tables_normalizes_and_lays_out(backend, device, generator):
    x = normal((2, 9, 4 * 32), torch.float32, device, generator)
    weight = normal((32,), torch.float32, device, generator)
    q, k = svg_kernels.qk_norm_rope(x, x, weight, weight, heads=4, backend=backend)
    expected = F.rms_norm(x.unflatten(-1, (4, 32)), (32,), weight, 1e-6).transpose(1, 2)
    torch.testing.assert_close(q, expected)
    torch.testing.assert_close(k, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_qk_norm_rope_writes_into_slices_and_reads_fused_projections(backend, device, generator):
    fused = normal((2, 9, 3 * 128), torch.bfloat16, device, generator)
    query, key, _ = fused.chunk(3, dim=-1)
    weight = normal((32,), torch.bfloat16, device, generator)
    theta = angles(9, 32, device, generator)
    outs = [torch.full((2, 4, 14, 32), 7.0, device=device).bfloat16() for _ in range(2)]
    slices = (outs[0][:, :, 3:12], outs[1][:, :, 3:12])
    common = (weight, weight, theta.cos(), theta.sin())
    got = svg_kernels.qk_norm_rope(query, key, *common, heads=4, out=slices, backend=backend)
    assert got[0] is slices[0]
    expected = svg_kernels.qk_norm_rope(
        query.contiguous(), key.contiguous(), *common, heads=4, backend=backend
    )
    for part, whole, want in zip(slices, outs, expected, strict=True):
        torch.testing.assert_close(part, want, rtol=0, atol=0)
        assert (whole[:, :, :3] == 7).all()
        assert (whole[:, :, 12:] == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_qk_norm_rope_of_no_tokens(backend, device):
    none = torch.empty(0, 4, device=device)
    rows = torch.empty(2, 0, 24, device=device)
    weight = torch.ones(8, device=device)
    q, _ = svg_kernels.qk_norm_rope(
        rows, rows, weight, weight, none, none, heads=3, backend=backend
    )
    assert q.shape == (2, 3, 0, 8)


def test_qk_norm_rope_refuses_shapes_that_do_not_fit():
    x = torch.ones(1, 2, 6, 8)
    rows, weight = torch.ones(1, 6, 24), torch.ones(8)
    with pytest.raises(ValueError, match="heads must divide 24, got 5"):
        svg_kernels.qk_norm_rope(rows, rows, weight, weight, heads=5)
    with pytest.raises(ValueError, match=r"query_weight must be \[8\]"):
        svg_kernels.qk_norm_rope(rows, rows, torch.ones(5), weight, heads=3)
    with pytest.raises(ValueError, match="both be per head or both across"):
        svg_kernels.qk_norm_rope(rows, rows, torch.ones(24), weight, heads=3)
    with pytest.raises(ValueError, match=r"out must be \[1, 3, 6, 8\]"):
        svg_kernels.qk_norm_rope(rows, rows, weight, weight, heads=3, out=(x, x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("dim", [6, 64, 128])
def test_qk_norm_rope_keeps_nan_to_its_row(backend, dtype, across, dim, device, generator):
    x = normal((2, 9, 3 * dim), dtype, device, generator)
    weight = normal((3 * dim if across else dim,), torch.float32, device, generator)
    theta = angles(9, dim, device, generator)

    def run(query):
        return svg_kernels.qk_norm_rope(
            query, x, weight, weight, theta.cos(), theta.sin(), heads=3, backend=backend
        )

    spoiled = x.clone()
    spoiled[0, 4, 1], spoiled[1, 8, dim + 2] = torch.nan, torch.inf
    (want, want_key), (got, key) = run(x), run(spoiled)
    rows = torch.zeros(2, 3, 9, dtype=torch.bool, device=device)  # [B, H, S]
    rows[0, slice(None) if across else 0, 4] = True
    rows[1, slice(None) if across else 1, 8] = True
    assert torch.equal(key, want_key)
    assert torch.equal(got[~rows], want[~rows])
    assert got[0, :, 4][rows[0, :, 4]].isnan().all()
    assert got[1, :, 8].isnan().any()
