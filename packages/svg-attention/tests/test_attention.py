from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import svg_attention.backends as backends
from svg_attention import (
    KeySummary,
    SparsePlan,
    UnsupportedError,
    dense_attention,
    dense_backend,
    sparse_attention,
)
from svg_attention.backends import reference

Make = Callable[..., SparsePlan]


def tensors(
    batch: int, heads: int, key_heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    shapes = [(batch, heads, queries), (batch, key_heads, keys), (batch, key_heads, keys)]
    return tuple(torch.randn(*shape, dim, generator=draw).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("queries", "keys", "key_heads", "dim"),
    [(300, 300, 4, 64), (1, 63, 2, 80), (257, 1000, 1, 17), (1000, 129, 4, 128)],
)
def test_sparse_attention_of_a_random_plan_equals_masked_attention(
    queries: int,
    keys: int,
    key_heads: int,
    dim: int,
    dtype: torch.dtype,
    random_plan: Make,
    masked_attention: Callable[..., tuple[Tensor, Tensor]],
    assert_accurate: Callable[..., None],
) -> None:
    query, key, value = tensors(2, 4, key_heads, queries, keys, dim, dtype)
    plan = random_plan(2, 4, queries, keys, key_heads=key_heads)
    mask = plan.to_mask()
    exact, exact_lse = masked_attention(query, key, value, mask)
    plain = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    ).masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    assert_accurate(sparse_attention(query, key, value, plan), plain, exact)
    out, lse = sparse_attention(query, key, value, plan, return_lse=True)
    assert_accurate(out, plain, exact)
    assert lse.dtype == torch.float32
    assert torch.allclose(lse.double(), exact_lse, atol=1e-5)


@pytest.mark.parametrize("limit", [1, 1000, 2**20])
def test_sparse_attention_does_not_depend_on_how_tiles_are_grouped(
    limit: int, random_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = tensors(1, 3, 3, 500, 400, 32, torch.float32)
    plan = random_plan(1, 3, 500, 400)
    expected = sparse_attention(query, key, value, plan)
    monkeypatch.setitem(reference.GROUP_KEYS, "cpu", limit)
    assert torch.allclose(sparse_attention(query, key, value, plan), expected, atol=1e-6)


def test_sparse_attention_of_a_full_plan_is_dense_to_the_last_bit() -> None:
    query, key, value = tensors(2, 4, 2, 200, 200, 32, torch.float32)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    full = SparsePlan.full(2, 4, 200, 200)
    assert torch.equal(sparse_attention(query, key, value, full), expected)
    assert torch.equal(dense_attention(query, key, value), expected)


def test_sparse_attention_of_a_full_plan_by_a_backend_equals_sdpa(
    masked_attention: Callable[..., tuple[Tensor, Tensor]], assert_accurate: Callable[..., None]
) -> None:
    query, key, value = tensors(2, 2, 2, 300, 300, 64, torch.float32)
    plan = replace(SparsePlan.full(2, 2, 300, 300), is_full=False)
    exact, _ = masked_attention(query, key, value, torch.ones(1, 1, 1, 1, dtype=torch.bool))
    plain = F.scaled_dot_product_attention(query, key, value)
    assert_accurate(sparse_attention(query, key, value, plan), plain, exact)


def test_sparse_attention_of_nothing_is_zero_and_minus_infinity() -> None:
    query, key, value = tensors(1, 1, 1, 200, 50, 16, torch.float32)
    starts = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    plan = SparsePlan(
        query_length=200,
        key_length=50,
        run_starts=starts,
        run_lengths=torch.tensor([[[[0], [50]]]], dtype=torch.int32),
    )
    out, lse = sparse_attention(query, key, value, plan, return_lse=True)
    assert torch.equal(out[:, :, :128], torch.zeros(1, 1, 128, 16))
    assert (lse[:, :, :128] == -torch.inf).all()
    assert out[:, :, 128:].abs().sum() > 0
    assert lse.isfinite()[:, :, 128:].all()
    assert torch.allclose(sparse_attention(query, key, value, plan), out, atol=1e-6)


def test_sparse_attention_in_parts_merges_by_its_log_sum_exp(random_plan: Make) -> None:
    query, key, value = tensors(1, 2, 2, 256, 300, 32, torch.float32)
    both = SparsePlan.full(1, 2, 256, 300)
    halves = [
        replace(both, run_starts=both.run_starts + start, run_lengths=both.run_lengths * 0 + length)
        for start, length in ((0, 110), (110, 190))
    ]
    parts = [sparse_attention(query, key, value, half, return_lse=True) for half in halves]
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), dim=0)[..., None]
    merged = sum(w * out for w, (out, _) in zip(weights, parts, strict=True))
    assert torch.allclose(merged, dense_attention(query, key, value), atol=1e-5)


def test_sparse_attention_gives_centroids_their_weight() -> None:
    # One-hot values: the output of a query is its own row of softmax weights.
    keys, dim = 12, 8
    draw = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, keys, dim, generator=draw)
    query = torch.randn(1, 1, 5, dim, generator=draw)
    value = torch.eye(keys + 2)[:keys].view(1, 1, keys, -1)
    centroids = torch.randn(1, 1, 2, dim, generator=draw)
    plan = SparsePlan(
        query_length=5,
        key_length=keys,
        run_starts=torch.tensor([[[[2]]]], dtype=torch.int32),
        run_lengths=torch.tensor([[[[4]]]], dtype=torch.int32),
        summary=KeySummary(
            keys=centroids,
            values=torch.eye(keys + 2)[keys:].view(1, 1, 2, -1),
            log_weights=torch.tensor([[[[torch.inf * -1, 3.0]]]]),
        ),
    )
    out, lse = sparse_attention(query, key, value, plan, return_lse=True)
    logits = query @ key[:, :, 2:6].mT / dim**0.5
    far = query @ centroids[:, :, 1:].mT / dim**0.5 + 3.0
    expected = torch.softmax(torch.cat([logits, far], dim=-1), dim=-1)
    assert torch.allclose(out[..., 2:6], expected[..., :4], atol=1e-6)
    assert torch.allclose(out[..., keys + 1], expected[..., 4], atol=1e-6)
    assert out[..., [0, 1, *range(6, keys), keys]].abs().max() == 0
    assert torch.allclose(lse, torch.cat([logits, far], dim=-1).logsumexp(-1), atol=1e-5)
    assert torch.allclose(sparse_attention(query, key, value, plan), out, atol=1e-6)


@pytest.mark.parametrize("lengths", [[40, 40], [40, 7]])
def test_dense_attention_reads_only_valid_keys(lengths: list[int]) -> None:
    query, key, value = tensors(2, 2, 2, 30, 50, 16, torch.float32)
    out = dense_attention(query, key, value, key_lengths=torch.tensor(lengths))
    for item, valid in enumerate(lengths):
        part = slice(item, item + 1)
        expected = dense_attention(query[part], key[part, :, :valid], value[part, :, :valid])
        assert torch.allclose(out[part], expected, atol=1e-6)


def test_sparse_attention_refuses_bad_arguments() -> None:
    query, key, value = tensors(1, 4, 4, 64, 64, 16, torch.float32)
    plan = SparsePlan.full(1, 4, 64, 64)
    with pytest.raises(ValueError, match="the plan is for"):
        sparse_attention(query[:, :2], key[:, :2], value[:, :2], plan)
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        sparse_attention(query, key, value, plan, backend="cudnn")
    with pytest.raises(ValueError, match="unknown dense backend"):
        dense_attention(query, key, value, backend="nothing")
    with pytest.raises(ValueError, match="convert it first"):
        dense_attention(query, key.double(), value)
    with pytest.raises(ValueError, match="multiple of 3 key heads"):
        dense_attention(query, key[:, :3], value[:, :3])
    with pytest.raises(ValueError, match=r"must be \[B, H, S, D\]"):
        dense_attention(query[0], key, value)


def test_sparse_attention_refuses_a_gradient_in_words() -> None:
    query, key, value = tensors(1, 1, 1, 64, 64, 16, torch.float32)
    plan = replace(SparsePlan.full(1, 1, 64, 64), is_full=False)
    query.requires_grad_()
    with pytest.raises(RuntimeError, match=r"under torch.no_grad\(\)"):
        sparse_attention(query, key, value, plan)
    with torch.no_grad():
        assert not sparse_attention(query, key, value, plan).requires_grad
    assert sparse_attention(query, key, value, SparsePlan.full(1, 1, 64, 64)).requires_grad


def test_select_backend_replaces_nothing_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Never(reference.ReferenceBackend):
        name = "never"

        def unsupported(self, *_: object) -> str | None:
            return "it is raining"

    monkeypatch.setattr(backends, "BACKENDS", {"never": Never(), **backends.BACKENDS})
    query, key, value = tensors(1, 1, 1, 64, 64, 16, torch.float32)
    plan = replace(SparsePlan.full(1, 1, 64, 64), is_full=False)
    assert sparse_attention(query, key, value, plan).shape == query.shape
    with pytest.raises(UnsupportedError, match="it is raining") as caught:
        sparse_attention(query, key, value, plan, backend="never")
    assert {"never", "reference"} <= set(caught.value.reasons)


@pytest.mark.parametrize("full", [False, True])
def test_sparse_attention_fills_out_of_any_strides(full: bool, random_plan: Any) -> None:
    plan = SparsePlan.full(2, 3, 200, 170) if full else random_plan(2, 3, 200, 170)
    query, key, value = (torch.randn(2, 3, n, 16) for n in (200, 170, 170))
    expected = sparse_attention(query, key, value, plan)
    buffer = torch.full((2, 200, 3, 16), torch.nan)
    out = sparse_attention(query, key, value, plan, out=buffer.transpose(1, 2))
    assert out.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer.transpose(1, 2), expected)
    packed = torch.full_like(expected, torch.nan)
    assert sparse_attention(query, key, value, plan, out=packed) is packed
    assert torch.equal(packed, expected)


def test_sparse_attention_refuses_an_out_that_does_not_fit(random_plan: Any) -> None:
    plan = random_plan(1, 2, 130, 90)
    query, key, value = (torch.randn(1, 2, n, 16) for n in (130, 90, 90))
    for out in (query[:, :1], query.double(), query.transpose(1, 2)):
        with pytest.raises(ValueError, match=r"out must be \[1, 2, 130, 16\] in torch.float32"):
            sparse_attention(query, key, value, plan, out=out)


def test_dense_backend_on_a_cpu_is_sdpa() -> None:
    query, key, value = (torch.randn(1, 2, 9, 64) for _ in range(3))
    assert dense_backend(query, key, value) == "sdpa"
    with pytest.raises(UnsupportedError, match="needs tensors on a CUDA device"):
        dense_attention(query, key, value, backend="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, (300, 300), (300, 77)])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_dense_attention_by_the_fastest_kernel_is_as_exact_as_torch(
    lengths: tuple[int, ...] | None,
    key_heads: int,
    device: torch.device,
    generator: torch.Generator,
    assert_accurate: Any,
) -> None:
    query = torch.randn(2, 4, 333, 128, device=device, generator=generator).bfloat16()
    key, value = (
        torch.randn(2, key_heads, 300, 128, device=device, generator=generator).bfloat16()
        for _ in range(2)
    )
    if dense_backend(query, key, value) == "sdpa":
        pytest.skip("the compiled kernel does not run here")
    valid = None if lengths is None else torch.tensor(lengths, device=device)
    out = torch.empty(2, 333, 4, 128, device=device, dtype=torch.bfloat16).transpose(1, 2)
    found = dense_attention(query, key, value, key_lengths=valid, out=out)
    assert found.data_ptr() == out.data_ptr()
    plain = dense_attention(query, key, value, key_lengths=valid, backend="sdpa")
    exact = dense_attention(*(x.double() for x in (query, key, value)), key_lengths=valid)
    assert_accurate(found, plain, exact)
    needs_gradient = query.clone().requires_grad_()
    assert dense_backend(needs_gradient, key, value) == "sdpa"
