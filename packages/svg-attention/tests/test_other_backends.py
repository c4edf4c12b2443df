"""Backends that wrap other people's kernels, which stand-ins in plain torch replace here."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from svg_attention import SparsePlan, UnsupportedError, sparse_attention
from svg_attention.backends import BACKENDS, blocks
from svg_attention.backends.flash_attn import FlashAttentionBackend, block_lists, not_in_blocks
from svg_attention.backends.flashinfer import FlashInferBackend, key_blocks
from svg_attention.plan import KeySummary


def tensors(plan, *, key_heads=2, dim=64, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    shapes = [(plan.heads, plan.query_length), *[(key_heads, plan.key_length)] * 2]
    return [torch.randn(plan.batch, h, s, dim, generator=draw).to(dtype) for h, s in shapes]


def block_plan(*, queries=384, keys=640, batch=1, heads=2):
    """Draw a plan of blocks of 128 keys in which a tile reads nothing."""
    draw = torch.Generator().manual_seed(4)
    tiles = queries // 128
    sizes = torch.full((batch, heads, keys // 128), 128)
    kept = torch.rand(batch, heads, tiles, keys // 128, generator=draw) < 0.5
    kept[0, 0, 1] = False
    orders = (
        torch.rand(batch, heads, n, generator=draw).argsort(-1).int() for n in (queries, keys)
    )
    query_order, key_order = orders
    return SparsePlan.from_cluster_mask(
        kept,
        sizes,
        query_length=queries,
        key_length=keys,
        query_order=query_order,
        key_order=key_order,
    )


@pytest.fixture
def flashinfer(monkeypatch):
    """Stand in for FlashInfer by its documented meaning; return the calls of `plan`."""
    planned = []

    class Wrapper:
        def __init__(self, workspace):
            assert workspace.dtype == torch.uint8

        def plan(self, mask, rows, columns, heads, key_heads, dim, *, sm_scale, **dtypes):
            planned.append((mask, rows, columns))
            assert heads == key_heads == mask.shape[0]
            assert set(dtypes) == {"q_data_type", "kv_data_type"}
            self.scale = sm_scale

        def run(self, query, key, value):
            mask, rows, columns = planned[-1]
            outs = []
            for s in range(mask.shape[0]):
                full = mask[s].repeat_interleave(rows[s].long(), 0)
                full = full.repeat_interleave(columns[s].long(), 1)
                outs.append(
                    F.scaled_dot_product_attention(
                        *(x[s : s + 1] for x in (query, key, value)),
                        attn_mask=full,
                        scale=self.scale,
                    )
                )
            # What a kernel leaves in rows without keys is its own affair.
            return torch.cat(outs).nan_to_num(7.0)

    module = ModuleType("flashinfer")
    module.sparse = SimpleNamespace(VariableBlockSparseAttentionWrapper=Wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return planned


@pytest.fixture
def flash_attention(monkeypatch):
    """Stand in for FlashAttention 4 by its documented meaning."""

    def attend(q, k, v, *, softmax_scale, return_lse, block_sparse_tensors=None):
        assert return_lse
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        logits = q @ k.mT * softmax_scale
        if block_sparse_tensors is not None:
            given = block_sparse_tensors
            assert given.block_size == (128, 128)
            assert (given.mask_block_cnt == 0).all()
            place = torch.arange(given.full_block_idx.shape[-1])
            listed = place < given.full_block_cnt[..., None]
            read = torch.zeros_like(listed).scatter(-1, given.full_block_idx.long(), listed)
            mask = read.repeat_interleave(128, 2).repeat_interleave(128, 3)
            logits = logits.masked_fill(~mask, -torch.inf)
        out = (torch.softmax(logits, dim=-1) @ v).nan_to_num(7.0)
        return out.transpose(1, 2), torch.logsumexp(logits, dim=-1).nan_to_num(neginf=7.0)

    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    interface = ModuleType("flash_attn.cute.interface")
    interface.flash_attn_func = attend
    sparsity = ModuleType("flash_attn.cute.block_sparsity")
    sparsity.BlockSparseTensorsTorch = SimpleNamespace
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setitem(sys.modules, sparsity.__name__, sparsity)


@pytest.mark.parametrize("key_heads", [1, 2])
def test_key_blocks_say_what_the_plan_says(random_plan, key_heads):
    plan = random_plan(2, 2, 300, 200, key_heads=key_heads)
    mask, rows, columns = key_blocks(plan)
    assert (columns.sum(-1) == 200).all()
    assert (rows.sum(-1) == 300).all()
    assert mask.dtype == torch.bool
    assert rows.dtype == columns.dtype == torch.int32
    want = plan.to_mask().flatten(0, 1)
    key_order = plan.key_order.repeat_interleave(2 // key_heads, dim=1).flatten(0, 1).long()
    for s in range(4):
        found = mask[s].repeat_interleave(rows[s].long(), 0)
        found = found.repeat_interleave(columns[s].long(), 1)
        sorted_want = want[s][plan.query_order.flatten(0, 1)[s].long()][:, key_order[s]]
        assert torch.equal(found, sorted_want)


@pytest.mark.parametrize("key_heads", [1, 2])
def test_attend_gives_flashinfer_the_plan(flashinfer, random_plan, key_heads, monkeypatch, attend):
    from svg_attention.backends import flashinfer as module

    monkeypatch.setattr(module, "WORKSPACE", 8)
    plan = random_plan(2, 2, 300, 200, key_heads=key_heads, share=0.2)
    inputs = tensors(plan, key_heads=key_heads)
    got, lse = attend(FlashInferBackend(), *inputs, plan, scale=0.2)
    want, _ = attend(BACKENDS["reference"], *inputs, plan, scale=0.2)
    assert lse is None
    assert len(flashinfer) == 1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_block_lists_are_ascending_and_complete():
    plan = block_plan()
    counts, index = block_lists(plan)
    starts, ends = plan.run_starts, plan.run_starts + plan.run_lengths
    for h in range(2):
        for t in range(3):
            want = [
                block
                for a, b in zip(starts[0, h, t].tolist(), ends[0, h, t].tolist(), strict=True)
                for block in range(a // 128, b // 128)
            ]
            assert index[0, h, t, : int(counts[0, h, t])].tolist() == want


@pytest.mark.parametrize("key_heads", [1, 2])
def test_attend_gives_flash_attention_the_blocks(flash_attention, key_heads, attend):
    plan = block_plan()
    if key_heads == 1:
        object.__setattr__(plan, "key_order", plan.key_order[:, :1])
    inputs = tensors(plan, key_heads=key_heads)
    got, lse = attend(FlashAttentionBackend(), *inputs, plan, scale=0.2)
    want, want_lse = attend(BACKENDS["reference"], *inputs, plan, scale=0.2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-5)


def test_attend_by_flash_attention_computes_a_full_plan(flash_attention, attend):
    order = torch.randperm(200).int().expand(1, 2, 200)
    plan = SparsePlan.full(1, 4, 130, 200, key_order=order)
    inputs = tensors(plan)
    got, lse = attend(FlashAttentionBackend(), *inputs, plan, scale=0.2)
    want, want_lse = attend(BACKENDS["reference"], *inputs, plan, scale=0.2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-5)


def test_not_in_blocks_says_what_flash_attention_cannot_express(random_plan):
    assert not_in_blocks(block_plan()) is None
    assert "whole blocks of 128" in not_in_blocks(random_plan(1, 2, 300, 256))
    assert "multiple of 128" in not_in_blocks(random_plan(1, 2, 256, 256))
    full = SparsePlan.full(1, 2, 100, 100)
    assert not_in_blocks(full) is None
    padded = SparsePlan.full(1, 2, 100, 100, key_lengths=torch.tensor([90]))
    assert "padded" in not_in_blocks(padded)


@pytest.mark.parametrize("backend", [FlashInferBackend(), FlashAttentionBackend()])
def test_unsupported_is_one_sentence(backend, monkeypatch, request):
    plan = block_plan()

    def reason(plan=plan, dim=128, dtype=torch.bfloat16):
        return backend.unsupported(*tensors(plan, dim=dim, dtype=dtype), plan)

    assert "CUDA device" in reason()
    module = sys.modules[type(backend).__module__]
    monkeypatch.setattr(module, "not_on_cuda", lambda *_: None)
    if importlib.util.find_spec(backend.name) is None:
        assert "is not installed; pip install" in reason()
    request.getfixturevalue("flashinfer")
    request.getfixturevalue("flash_attention")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert reason() is None
    assert "fp16 or bf16" in reason(dtype=torch.float32)
    assert "head_dim must be" in reason(dim=80)
    weights = torch.zeros(*plan.run_starts.shape[:3], 1)
    centroid = torch.zeros(1, 2, 1, 128)
    summary = KeySummary(keys=centroid, values=centroid, log_weights=weights)
    summarised = block_plan()
    object.__setattr__(summarised, "summary", summary)
    assert "summary" in reason(plan=summarised)


@pytest.mark.parametrize("name", ["flashinfer", "flash_attn"])
def test_select_backend_takes_other_peoples_kernels_by_name_only(name, random_plan):
    plan = random_plan(1, 2, 130, 90)
    with pytest.raises(UnsupportedError, match="CUDA device") as caught:
        sparse_attention(*tensors(plan), plan, backend=name)
    assert set(caught.value.reasons) == set(BACKENDS)
    assert list(BACKENDS).index(name) > list(BACKENDS).index("reference")


def test_not_on_cuda_names_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    tensor = SimpleNamespace(device=torch.device("cuda", 0))
    assert blocks.not_on_cuda(tensor, (8, 0)) == (
        "needs compute capability 8.0 or newer, this GPU has 7.5"
    )
    assert blocks.not_on_cuda(tensor, (7, 0)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["full", "blocks"])
@pytest.mark.parametrize("dim", [64, 128])
def test_attend_by_flash_attention_itself_agrees_with_the_reference(
    kind, dim, move_plan, device, assert_accurate
):
    pytest.importorskip("flash_attn.cute.interface", reason="flash-attn-4 is not installed")
    plan = block_plan(queries=640, keys=768, batch=2, heads=4)
    if kind == "full":
        plan = SparsePlan.full(2, 4, 300, 460)
    inputs = [x.to(device, torch.bfloat16) for x in tensors(plan, key_heads=4, dim=dim)]
    compare_on_gpu("flash_attn", inputs, move_plan(plan, device), assert_accurate)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_attend_by_flashinfer_itself_agrees_with_the_reference(
    random_plan, dim, move_plan, device, assert_accurate
):
    pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")
    plan = random_plan(2, 4, 700, 900, key_heads=2, clusters=30)
    inputs = [x.to(device, torch.bfloat16) for x in tensors(plan, dim=dim)]
    compare_on_gpu("flashinfer", inputs, move_plan(plan, device), assert_accurate)


def compare_on_gpu(name, inputs, plan, assert_accurate):
    """Compare a backend in bf16 with fp32, and its error with that of plain torch in bf16."""
    wanted = name != "flashinfer"  # which has no log-sum-exp
    got = sparse_attention(*inputs, plan, backend=name, return_lse=wanted)
    exact, exact_lse = sparse_attention(
        *(x.float() for x in inputs), plan, backend="reference", return_lse=True
    )
    if wanted:
        got, lse = got
        torch.testing.assert_close(lse, exact_lse, rtol=1e-2, atol=1e-2)
    assert_accurate(got, sparse_attention(*inputs, plan, backend="reference"), exact.double())
