from __future__ import annotations

import pytest
import torch
from rotary_oracles import angles, normal, rotated, spread

import svg_kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = [
    pytest.param("reference", id="reference"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="cuda"),
    pytest.param("triton", marks=pytest.mark.gpu, id="triton"),
]
PAIRINGS = ["interleaved", "half"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 37, 64), (1, 5, 63, 128), (2, 1, 9, 70)])
def test_rope_is_as_exact_as_torch(
    backend, dtype, pairing, shape, device, generator, assert_accurate
):
    x = normal(shape, dtype, device, generator)
    theta = angles(shape[2], shape[3], device, generator)
    actual = svg_kernels.rope(x, theta.cos(), theta.sin(), pairing=pairing, backend=backend)
    plain = rotated(x, theta, pairing, torch.float32).to(dtype)
    cos, sin = theta.cos(), theta.sin()
    exact = rotated(x, torch.atan2(sin.double(), cos.double()), pairing, torch.float64)
    exact *= spread((cos.double().square() + sin.double().square()).sqrt(), pairing)
    assert_accurate(actual, plain, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_rope_takes_every_form_of_table(backend, pairing, device, generator):
    x = normal((2, 3, 11, 32), torch.float32, device, generator)
    theta = angles(11, 32, device, generator)
    cos, sin = theta.cos(), theta.sin()
    expected = svg_kernels.rope(x, cos, sin, pairing=pairing, backend=backend)
    wide = spread(cos, pairing), spread(sin, pairing)
    forms = [
        wide,
        (wide[0][None, :, None], wide[1][None, :, None]),
        (cos[None], sin[None]),
        (cos.expand(2, -1, -1), sin.expand(2, -1, -1)),
        (torch.complex(cos, sin), None),
        (cos.double(), sin.double()),
    ]
    for form in forms:
        actual = svg_kernels.rope(x, *form, pairing=pairing, backend=backend)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("start", [0, 5, 9])
@pytest.mark.parametrize("inplace", [False, True])
def test_rope_leaves_text_before_and_after_alone(
    backend, pairing, start, inplace, device, generator
):
    x = normal((2, 4, 20, 64), torch.bfloat16, device, generator)
    x[:, :, 0, 0] = float("nan")  # untouched means copied, not multiplied by 1
    x[:, :, 0, 1] = float("inf")
    before = x.clone()
    theta = angles(11, 64, device, generator)
    cos, sin = theta.cos(), theta.sin()
    y = svg_kernels.rope(
        x, cos, sin, pairing=pairing, start=start, inplace=inplace, backend=backend
    )
    assert (y is x) == inplace
    if not inplace:
        torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    kept = [*range(start), *range(start + 11, 20)]
    torch.testing.assert_close(y[:, :, kept], before[:, :, kept], rtol=0, atol=0, equal_nan=True)
    part = before[:, :, start : start + 11].contiguous()
    expected = svg_kernels.rope(part, cos, sin, pairing=pairing, backend=backend)
    torch.testing.assert_close(
        y[:, :, start : start + 11], expected, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_rope_rotates_strided_views_where_they_are(backend, inplace, device, generator):
    theta = angles(9, 16, device, generator)
    tables = theta.cos(), theta.sin()
    views = [
        lambda base: base[..., :48].unflatten(-1, (3, 16)).transpose(1, 2),
        lambda base: base[..., 1:49].unflatten(-1, (3, 16)).transpose(1, 2),
        lambda base: base[..., ::4].unflatten(-1, (3, 16)).transpose(1, 2),
    ]
    for view in views:
        base = normal((2, 9, 192), torch.float32, device, generator)
        outside = base.clone()
        x = view(base)
        expected = svg_kernels.rope(x.clone(), *tables, backend="reference")
        y = svg_kernels.rope(x, *tables, inplace=inplace, backend=backend)
        torch.testing.assert_close(y, expected)
        if inplace:
            view(outside).copy_(y)
            torch.testing.assert_close(base, outside, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_takes_a_table_for_each_batch_element(backend, device, generator):
    x = normal((2, 3, 9, 32), torch.float32, device, generator)
    theta = torch.stack([angles(9, 32, device, generator) for _ in range(2)])
    y = svg_kernels.rope(x, theta.cos(), theta.sin(), backend=backend)
    for b in range(2):
        one = svg_kernels.rope(x[b : b + 1], theta[b].cos(), theta[b].sin(), backend=backend)
        torch.testing.assert_close(y[b : b + 1], one, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("key_heads", [1, 3, 8])
def test_rope_of_a_pair_is_two_single_calls(
    backend, dtype, pairing, inplace, key_heads, device, generator
):
    query = normal((2, 5, 21, 64), dtype, device, generator)
    key = normal((2, 21, 2 * key_heads, 64), dtype, device, generator)[:, :, ::2].transpose(1, 2)
    theta = torch.stack([angles(17, 64, device, generator) for _ in range(2)])
    common = dict(pairing=pairing, start=2, backend=backend)
    for tables in ((theta.cos(), theta.sin()), (theta[0].cos(), theta[0].sin())):
        wanted = [svg_kernels.rope(x, *tables, **common) for x in (query, key)]
        found = svg_kernels.rope((query, key), *tables, inplace=inplace, **common)
        assert isinstance(found, tuple)
        for y, x, want in zip(found, (query, key), wanted, strict=True):
            assert (y is x) == inplace
            assert inplace or y.is_contiguous()
            torch.testing.assert_close(y, want, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_of_a_pair_of_which_one_is_empty(backend, device, generator):
    theta = angles(4, 8, device, generator)
    tables = theta.cos(), theta.sin()
    x = normal((2, 3, 5, 8), torch.float32, device, generator)
    want = svg_kernels.rope(x, *tables, backend=backend)
    (alone,) = svg_kernels.rope([x], *tables, backend=backend)
    before, none = svg_kernels.rope((x, x[:, :0]), *tables, backend=backend)
    nothing, behind = svg_kernels.rope((x[:, :0], x), *tables, backend=backend)
    assert none.shape == nothing.shape == (2, 0, 5, 8)
    for y in (alone, before, behind):
        torch.testing.assert_close(y, want, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rope_of_empty_tensors_and_tables(backend, device):
    none = torch.empty(0, 4, device=device)
    x = torch.ones(2, 3, 5, 8, device=device)
    torch.testing.assert_close(svg_kernels.rope(x, none, none, backend=backend), x)
    empty = torch.empty(2, 3, 0, 8, device=device)
    assert svg_kernels.rope(empty, none, none, backend=backend).shape == empty.shape


def test_rope_refuses_shapes_that_do_not_fit():
    x, table = torch.ones(1, 2, 6, 8), torch.ones(5, 4)
    with pytest.raises(ValueError, match="the tables cover tokens 2 to 6, but x has 6"):
        svg_kernels.rope(x, table, table, start=2)
    with pytest.raises(ValueError, match=r"cos must be \[length, 8\] or \[length, 4\]"):
        svg_kernels.rope(x, torch.ones(5, 3), torch.ones(5, 3))
    with pytest.raises(ValueError, match="only when cos is complex"):
        svg_kernels.rope(x, table)
    with pytest.raises(ValueError, match="pairing must be"):
        svg_kernels.rope(x, table, table, pairing="split")
    for count in (0, 3):
        with pytest.raises(ValueError, match=rf"one tensor or two \(query, key\), got {count};"):
            svg_kernels.rope([x] * count, table, table)
    for key in (x[:, :, :5], x[..., :6], x.repeat(2, 1, 1, 1)):
        with pytest.raises(ValueError, match="must have equal batch, tokens and head_dim"):
            svg_kernels.rope((x, key), table, table)
    with pytest.raises(ValueError, match=r"x must be \[batch, heads, tokens, head_dim\]"):
        svg_kernels.rope((x, x[0]), table, table)
    with pytest.raises(TypeError, match="query and key must share a dtype"):
        svg_kernels.rope((x, x.half()), table, table)
    with pytest.raises(ValueError, match="key must be on cpu like x, got meta"):
        svg_kernels.rope((x, x.to("meta")), table, table)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dim", [6, 64, 128])
def test_rope_keeps_nan_to_its_pair(backend, dtype, pairing, dim, device, generator):
    x = normal((2, 3, 9, dim), dtype, device, generator)
    theta = angles(9, dim, device, generator)
    tables = theta.cos(), theta.sin()
    want = svg_kernels.rope(x, *tables, pairing=pairing, backend=backend)
    x[0, 1, 4, 1], x[1, 2, 8, 2] = torch.nan, torch.inf
    got = svg_kernels.rope(x, *tables, pairing=pairing, backend=backend)
    spoiled = torch.zeros_like(x, dtype=torch.bool)
    pair = slice(0, 2) if pairing == "interleaved" else slice(1, None, dim // 2)
    spoiled[0, 1, 4, pair] = True
    pair = slice(2, 4) if pairing == "interleaved" else slice(2, None, dim // 2)
    spoiled[1, 2, 8, pair] = True
    assert torch.equal(got[~spoiled], want[~spoiled])
    assert not got[spoiled].isfinite().any()
