from __future__ import annotations

import pytest
import torch

import svg_kernels

BACKENDS = [
    pytest.param("reference", id="reference"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="cuda"),
    pytest.param("triton", marks=pytest.mark.gpu, id="triton"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float64]


def values(shape, dtype, device, generator):
    return torch.randint(0, 200, shape, device=device, generator=generator).to(dtype)


def orders(batch, heads, tokens, device, generator):
    noise = torch.rand(batch, heads, tokens, device=device, generator=generator)
    return noise.argsort(-1).int()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 63, 64), (1, 5, 1000, 7), (3, 2, 17, 130)])
def test_permute_rows_gathers_and_unpermute_rows_puts_back(
    backend, dtype, shape, device, generator
):
    x = values(shape, dtype, device, generator)
    order = orders(*shape[:3], device, generator)
    y = svg_kernels.permute_rows(x, order, backend=backend)
    for b in range(shape[0]):
        for h in range(shape[1]):
            assert torch.equal(y[b, h], x[b, h][order[b, h].long()])
    assert torch.equal(svg_kernels.unpermute_rows(y, order, backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permute_rows_of_several_tensors_with_their_own_orders(backend, device, generator):
    query = values((2, 4, 33, 64), torch.bfloat16, device, generator)
    key = values((2, 2, 33, 64), torch.bfloat16, device, generator)
    value = values((2, 2, 33, 32), torch.float32, device, generator)
    q_order = orders(2, 4, 33, device, generator)
    k_order = orders(2, 2, 33, device, generator)
    each = (q_order, k_order, k_order)
    got = svg_kernels.permute_rows((query, key, value), each, backend=backend)
    assert isinstance(got, tuple)
    for x, order, y in zip((query, key, value), each, got, strict=True):
        assert torch.equal(y, svg_kernels.permute_rows(x, order, backend="reference"))
    back = svg_kernels.unpermute_rows(got, each, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(back, (query, key, value), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_permute_rows_of_strided_tensors_by_expanded_orders(backend, device, generator):
    base = values((2, 21, 3, 40), torch.bfloat16, device, generator)
    x = base.transpose(1, 2)[..., :32]
    shared = orders(1, 1, 21, device, generator)
    expected = x[:, :, shared.view(-1).long()]
    for order in (shared, shared[0], shared[0, 0], shared.expand(2, 3, -1)):
        assert torch.equal(svg_kernels.permute_rows(x, order, backend=backend), expected)
    every_second = torch.arange(0, 42, device=device, dtype=torch.int32)[::2].clamp(max=20)
    assert torch.equal(
        svg_kernels.permute_rows(x, every_second, backend=backend), x[:, :, every_second.long()]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_permute_rows_may_give_fewer_more_or_no_rows(backend, device, generator):
    x = values((1, 2, 10, 16), torch.float32, device, generator)
    for count in (0, 3, 25):
        order = torch.randint(0, 10, (1, 2, count), device=device, generator=generator).int()
        y = svg_kernels.permute_rows(x, order, backend=backend)
        assert torch.equal(y, svg_kernels.permute_rows(x, order, backend="reference"))
    empty = x[:, :, :0]
    none = torch.empty(1, 2, 0, device=device, dtype=torch.int32)
    assert svg_kernels.unpermute_rows(empty, none, backend=backend).shape == (1, 2, 0, 16)


@pytest.mark.gpu
def test_permute_rows_beyond_two_to_the_31_elements(device):
    tokens, heads = 2**18, 130  # 2^31 elements and some
    x = torch.zeros(1, heads, tokens, 64, device=device, dtype=torch.uint8)
    x[0, -1, :, 0] = torch.arange(tokens, device=device).remainder(251).to(torch.uint8)
    order = torch.arange(tokens - 1, -1, -1, device=device, dtype=torch.int32)
    y = svg_kernels.permute_rows(x, order, backend="cuda")
    assert torch.equal(y[0, -1], x[0, -1].flip(0))
    assert torch.equal(svg_kernels.unpermute_rows(y, order, backend="cuda")[0, -1], x[0, -1])


def test_permute_rows_refuses_bad_orders():
    x = torch.ones(2, 3, 5, 4)
    with pytest.raises(TypeError, match=r"order must be int32, got torch\.int64"):
        svg_kernels.permute_rows(x, torch.arange(5))
    with pytest.raises(ValueError, match="must name each of the 5 rows once, got 4"):
        svg_kernels.unpermute_rows(x, torch.arange(4).int())
    with pytest.raises(ValueError, match=r"must expand to \[2, 3, 'T'\]"):
        svg_kernels.permute_rows(x, torch.zeros(2, 2, 5).int())
    with pytest.raises(ValueError, match="got 2 tensors and 3 orders"):
        svg_kernels.permute_rows([x, x], [torch.arange(5).int()] * 3)
