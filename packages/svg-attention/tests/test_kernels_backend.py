from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from svg_attention import UnsupportedError, sparse_attention
from svg_attention.backends import AUTO_BACKENDS, BACKENDS, kernels
from svg_attention.backends.kernels import KernelsBackend
from svg_attention.plan import KeySummary, SparsePlan
from svg_attention.planning.order import long_tiles_first

needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("svg_kernels") is None, reason="svg-kernels is not installed"
)


def tensors(plan, *, key_heads=2, dim=32, seed=1):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(plan.heads, plan.query_length), *[(key_heads, plan.key_length)] * 2]
    return [torch.randn(plan.batch, h, s, dim, generator=draw) for h, s in shapes]


def test_backends_are_listed_fastest_first():
    assert list(BACKENDS)[:3] == ["cuda", "triton", "reference"]


@pytest.mark.parametrize("name", ["cuda", "triton", "cuda_fp8"])
def test_unsupported_refuses_tensors_on_a_cpu(name, random_plan):
    plan = random_plan(1, 2, 130, 90)
    with pytest.raises(UnsupportedError, match="CUDA device") as caught:
        sparse_attention(*tensors(plan), plan, backend=name)
    assert set(caught.value.reasons) == set(BACKENDS)


@needs_kernels
@pytest.mark.parametrize("key_heads", [1, 2])
def test_attend_hands_the_kernel_the_whole_plan(monkeypatch, random_plan, key_heads, attend):
    # The kernels' own reference stands in for a GPU: what is tested is how a plan is handed over.
    import svg_kernels

    kernel = svg_kernels.block_sparse_attention
    monkeypatch.setattr(
        svg_kernels,
        "block_sparse_attention",
        lambda *args, **kwargs: kernel(*args, **{**kwargs, "backend": "reference"}),
    )
    plan = random_plan(2, 2, 300, 200, key_heads=key_heads)
    query, key, value = tensors(plan, key_heads=key_heads)
    got, lse = attend(KernelsBackend("triton"), query, key, value, plan, scale=0.2)
    want, want_lse = attend(BACKENDS["reference"], query, key, value, plan, scale=0.2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    rounded, _ = attend(KernelsBackend("cuda"), query, key, value, plan, scale=0.2)
    want, _ = attend(BACKENDS["reference"], query, key, value, plan.rounded(8), scale=0.2)
    torch.testing.assert_close(rounded, want, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("key_heads", [1, 2])
def test_attend_hands_the_fp8_kernel_the_whole_plan(monkeypatch, random_plan, key_heads, attend):
    import svg_kernels

    kernel = svg_kernels.block_sparse_attention_fp8
    monkeypatch.setattr(
        svg_kernels,
        "block_sparse_attention_fp8",
        lambda *args, **kwargs: kernel(*args, **{**kwargs, "backend": "reference"}),
    )
    plan = random_plan(2, 2, 300, 200, key_heads=key_heads)
    query, key, value = tensors(plan, key_heads=key_heads, dim=128)
    got, lse = attend(BACKENDS["cuda_fp8"], query, key, value, plan, scale=0.05)
    rounded = plan.rounded(8)
    want, want_lse = attend(BACKENDS["reference"], query, key, value, rounded, scale=0.05)
    # Three digits of keys and values, where a wrong row would show as an error of one.
    assert (got - want).norm() < 0.06 * want.norm()
    assert (lse - want_lse).abs().max() < 0.2


@pytest.mark.parametrize("name", ["cuda_fp8", "reference_fp8"])
def test_backends_in_fp8_are_taken_by_name_only(name):
    assert name not in AUTO_BACKENDS
    assert list(BACKENDS).index(name) > list(BACKENDS).index("reference")


@needs_kernels
@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("summarised", [False, True])
def test_reference_fp8_rounds_keys_and_values_alone(random_plan, dim, summarised, attend):
    plan = random_plan(2, 4, 300, 200, key_heads=2)
    if summarised:
        draw = torch.Generator().manual_seed(3)
        summary = KeySummary(
            keys=torch.randn(2, 2, 5, dim, generator=draw),
            values=torch.randn(2, 2, 5, dim, generator=draw),
            log_weights=torch.randn(2, 4, plan.tiles, 5, generator=draw),
        )
        plan = replace(plan, summary=summary)
    query, key, value = tensors(plan, dim=dim)
    got, lse = attend(BACKENDS["reference_fp8"], query, key, value, plan, scale=dim**-0.5)
    want, want_lse = attend(BACKENDS["reference"], query, key, value, plan, scale=dim**-0.5)
    error = (got - want).norm() / want.norm()
    assert 0.002 < error < 0.06
    assert (lse - want_lse).abs().max() < 0.3


@needs_kernels
def test_unsupported_takes_narrow_heads_in_fp8_and_refuses_wide_ones(random_plan):
    backend, plan = BACKENDS["reference_fp8"], random_plan(1, 2, 130, 90)
    assert backend.unsupported(*tensors(plan, dim=64), plan) is None
    assert backend.unsupported(*tensors(plan, dim=256), plan) == (
        "heads must have at most 128 channels in e4m3, got 256"
    )


@needs_kernels
@pytest.mark.parametrize(("scratch", "heads"), [(1, [2, 2]), (4 * 200 * 128, [4]), (2**30, [4])])
def test_attend_in_fp8_counts_the_bytes_of_its_own_copies(
    monkeypatch, random_plan, attend, scratch, heads
):
    import svg_kernels

    kernel, calls = svg_kernels.block_sparse_attention_fp8, []
    monkeypatch.setattr(
        svg_kernels,
        "block_sparse_attention_fp8",
        lambda *args, **kwargs: (calls.append(args[0].shape[1]), kernel(*args, **kwargs))[1],
    )
    plan = random_plan(1, 4, 300, 200, key_heads=2)
    inputs = tensors(plan, dim=128)
    whole, _ = attend(BACKENDS["reference_fp8"], *inputs, plan, scale=0.1)
    calls.clear()
    monkeypatch.setattr(kernels, "SCRATCH", scratch)
    parts, _ = attend(BACKENDS["reference_fp8"], *inputs, plan, scale=0.1)
    # 200 keys and as many values of 128 bytes each, two heads.
    assert calls == heads
    torch.testing.assert_close(parts, whole)


@needs_kernels
def test_unsupported_names_the_head_size_of_the_fp8_kernel():
    from svg_kernels.attention_fp8 import unsupported

    reason = unsupported("cuda", torch.device("cuda"), torch.bfloat16, 64)
    assert reason == "head_dim must be 128 for keys in e4m3, got 64"


@needs_kernels
@pytest.mark.parametrize("scratch", [1, 15_000, 60_000])
@pytest.mark.parametrize("summarised", [False, True])
def test_attend_by_groups_of_heads_equals_all_at_once(
    monkeypatch, random_plan, scratch, summarised, attend
):
    import svg_kernels

    kernel, calls = svg_kernels.block_sparse_attention, []

    def count(*args, **kwargs):
        calls.append(args[0].shape)
        return kernel(*args, **{**kwargs, "backend": "reference"})

    monkeypatch.setattr(svg_kernels, "block_sparse_attention", count)
    plan = random_plan(2, 6, 300, 200, key_heads=3)
    if summarised:
        draw = torch.Generator().manual_seed(3)
        summary = KeySummary(
            keys=torch.randn(2, 3, 5, 8, generator=draw),
            values=torch.randn(2, 3, 5, 8, generator=draw),
            log_weights=torch.randn(2, 6, plan.tiles, 5, generator=draw),
        )
        plan = replace(plan, summary=summary)
    inputs = tensors(plan, key_heads=3, dim=8)
    whole, whole_lse = attend(KernelsBackend("cuda"), *inputs, plan, scale=0.3)
    assert len(calls) == 1
    monkeypatch.setattr(kernels, "SCRATCH", scratch)
    parts, parts_lse = attend(KernelsBackend("cuda"), *inputs, plan, scale=0.3)
    # A head's keys and values take 12,800 bytes.
    heads = {1: [2, 2, 2], 15_000: [2, 2, 2], 60_000: [6]}[scratch]
    assert calls[1:] == [(1, h, 300, 8) for h in heads] * 2
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(parts_lse, whole_lse)


@needs_kernels
def test_attend_with_a_summary_does_not_round(monkeypatch, random_plan, attend):
    import svg_kernels

    kernel = svg_kernels.block_sparse_attention
    monkeypatch.setattr(
        svg_kernels,
        "block_sparse_attention",
        lambda *args, **kwargs: kernel(*args, **{**kwargs, "backend": "reference"}),
    )
    plain = random_plan(1, 2, 300, 200, key_heads=1)
    draw = torch.Generator().manual_seed(3)
    summary = KeySummary(
        keys=torch.randn(1, 1, 5, 32, generator=draw),
        values=torch.randn(1, 1, 5, 32, generator=draw),
        log_weights=torch.randn(1, 2, plain.tiles, 5, generator=draw),
    )
    plan = SparsePlan(
        query_length=300,
        key_length=200,
        query_order=plain.query_order,
        key_order=plain.key_order,
        run_starts=plain.run_starts,
        run_lengths=plain.run_lengths,
        summary=summary,
    )
    inputs = tensors(plan, key_heads=1)
    got, _ = attend(KernelsBackend("cuda"), *inputs, plan, scale=0.2)
    want, _ = attend(BACKENDS["reference"], *inputs, plan, scale=0.2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_attend_by_kernels_equals_the_reference(
    name, random_plan, move_plan, device, assert_accurate
):
    plan = move_plan(random_plan(1, 4, 700, 900, key_heads=2, clusters=40), device)
    query, key, value = (x.to(device, torch.bfloat16) for x in tensors(plan, dim=64))
    got, lse = sparse_attention(query, key, value, plan, backend=name, return_lse=True)
    exact_plan = plan.rounded(8) if name == "cuda" else plan
    exact, exact_lse = sparse_attention(
        query.float(), key.float(), value.float(), exact_plan, backend="reference", return_lse=True
    )
    plain = sparse_attention(query, key, value, exact_plan, backend="reference")
    assert_accurate(got, plain, exact.double())
    torch.testing.assert_close(lse, exact_lse, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@needs_kernels
def test_attend_never_waits_for_the_device(random_plan, move_plan, device):
    plan = move_plan(random_plan(1, 2, 300, 400), device)
    query, key, value = (x.to(device, torch.bfloat16) for x in tensors(plan, dim=64))
    sparse_attention(query, key, value, plan)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparse_attention(query, key, value, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("batch", [1, 2])
def test_plan_of_heads_numbers_the_tiles_of_the_part(random_plan, batch):
    plan = random_plan(batch, 6, 300, 200, key_heads=3)
    order = long_tiles_first(plan.run_lengths, ratio=1.0).view(batch, 6, plan.tiles)
    plan = replace(plan, tile_order=order)
    for item in range(batch):
        part = plan.part(slice(item, item + 1), slice(2, 6), slice(1, 3), 3)
        alone = long_tiles_first(part.run_lengths, ratio=1.0)
        assert torch.equal(part.tile_order.flatten(), alone)
