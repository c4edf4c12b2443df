from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import svg_kernels
from svg_kernels import _dispatch, _library

CPU = torch.device("cpu")


def test_status_of_the_cpu_takes_the_reference():
    backends = {state.name: state for state in svg_kernels.status("cpu").backends}
    assert list(backends) == ["cuda", "triton", "reference"]
    assert svg_kernels.status("cpu").auto == "reference"
    assert not backends["cuda"].available
    assert "CUDA device" in backends["cuda"].note


def test_select_backend_never_replaces_an_explicit_request():
    with pytest.raises(svg_kernels.UnsupportedError) as caught:
        svg_kernels.rms_norm(torch.ones(2, 8), backend="cuda")
    assert set(caught.value.reasons) == {"cuda", "triton", "reference"}
    assert "needs tensors on a CUDA device" in caught.value.reasons["cuda"]
    assert caught.value.reasons["reference"].startswith("can run")
    assert "'cuda' on cpu" in str(caught.value)


def test_select_backend_names_an_unknown_backend():
    with pytest.raises(ValueError, match="got 'cutlass'"):
        svg_kernels.rms_norm(torch.ones(2, 8), backend="cutlass")


def test_status_is_plain_data():
    data = svg_kernels.status().to_dict()
    assert data["auto"] in {state["name"] for state in data["backends"] if state["available"]}
    assert all(state["note"] for state in data["backends"])


OPERATIONS = {
    "norm": {"rms_norm", "layer_norm"},
    "modulation": {"layer_norm_modulate", "gate_residual"},
    "rope": {"rope"},
    "qk_norm_rope": {"qk_norm_rope"},
    "permute": {"permute_rows"},
    "attention": {"block_sparse_attention"},
    "attention_fp8": {"block_sparse_attention_fp8"},
    "probe_sums": {"probe_sums"},
}


@pytest.mark.parametrize("backend", _dispatch.ORDER)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_select_backend_finds_every_operation_in_every_backend(operation, backend):
    if backend == "triton":
        pytest.importorskip("triton")
        if operation == "probe_sums":
            pytest.skip("svg_attention.planning has the Triton kernel")
        if operation == "attention_fp8":
            pytest.skip("attention in e4m3 has no portable kernel")
    module = importlib.import_module(f"svg_kernels.{operation}.{backend}")
    assert OPERATIONS[operation] <= set(vars(module))


def test_select_backend_is_tested_for_every_folder():
    package = Path(svg_kernels.__file__).parent
    assert set(OPERATIONS) == {path.parent.name for path in package.glob("*/cuda.py")}


def test_backend_status_gives_the_reason_of_a_gpu(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "this GPU has 7.5" in _dispatch.unsupported("cuda", device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    none = _library.Library(reason="nvcc was not found")
    monkeypatch.setattr(_library, "_libraries", {device: none})
    assert _dispatch.auto_backend(device) in ("triton", "reference")
    assert _dispatch.backend_status("cuda", device).note == "nvcc was not found"
    library = _library.Library(path=Path("libsvg_kernels.so"))
    monkeypatch.setitem(_library._libraries, device, library)
    assert _dispatch.auto_backend(device) == "cuda"
    assert _dispatch.backend_status("cuda", device).note == "libsvg_kernels.so"


def cases():
    x = torch.randn(2, 5, 24)
    vector, table = torch.randn(24), torch.randn(1, 4, 4)
    head = torch.randn(8)
    heads = torch.randn(2, 3, 5, 8)
    order = torch.rand(2, 3, 5).argsort(-1).int()
    ops = torch.ops.svg_kernels
    qk = (x, x.clone(), head, head.clone(), table, table.clone(), 3, 1e-6, False, 1, "auto")
    outs = (torch.empty(2, 3, 5, 8), torch.empty(2, 3, 5, 8))
    bf16, none = torch.bfloat16, None
    return [
        (ops.rms_norm, (x, vector, 1e-6, bf16, "auto")),
        (ops.layer_norm, (x.transpose(0, 1), none, vector, 1e-6, none, "auto")),
        (ops.layer_norm_modulate, (x, x[:, :1], x, none, none, 1e-6, none, "auto")),
        (ops.gate_residual, (x, x.bfloat16(), x[:, :1], none, "auto")),
        (ops.rope, ([heads.transpose(1, 2)], table[:, :3], table[:, :3], True, 0, "auto")),
        (ops.rope, ([heads, heads[:, :1]], table, table.clone(), False, 1, "auto")),
        (ops.rope_, ([heads.clone()], table, table.clone(), False, 1, "auto")),
        (ops.rope_, ([heads.clone(), heads[:, :1].clone()], table, table, True, 0, "auto")),
        (ops.qk_norm_rope, qk),
        (ops.qk_norm_rope_out, (*qk, *outs)),
        (ops.permute_rows, ([heads, heads.half()], [order, order], False, "auto")),
    ]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case[0].__name__)
def test_define_op_keeps_the_contract_of_torch(case):
    operator, args = case
    torch.library.opcheck(operator.default, args)


def test_define_op_keeps_one_graph_when_compiled():
    def block(x, scale, table):
        y = svg_kernels.layer_norm_modulate(x, scale, scale)
        q, k = svg_kernels.qk_norm_rope(y, y, scale[0], scale[0], table, table, heads=3)
        svg_kernels.rope(q, table, table, inplace=True)
        svg_kernels.rope((q, k), table, table, inplace=True)
        turned = svg_kernels.rope((q, k[:, :1]), table, table, pairing="half")
        return svg_kernels.gate_residual(x, y, scale), q + k, *turned

    args = torch.randn(2, 5, 24), torch.randn(2, 24), torch.rand(5, 4)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*args), block(*args), strict=True):
        torch.testing.assert_close(got, want)


class Heard(torch.utils._python_dispatch.TorchDispatchMode):
    """Write down which of our operators the dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_define_op_is_seen_by_whoever_watches_the_dispatcher():
    x = torch.ones(2, 3, 8)
    with torch.no_grad(), Heard() as heard:
        svg_kernels.rms_norm(x)
        svg_kernels.permute_rows(x[None], torch.arange(3).int())
    assert "svg_kernels.rms_norm.default" in heard.names
    assert "svg_kernels.permute_rows.default" in heard.names


def test_define_op_gives_the_same_without_gradients():
    x = torch.randn(3, 16)
    with torch.no_grad():
        quick = svg_kernels.rms_norm(x)
    torch.testing.assert_close(quick, svg_kernels.rms_norm(x), rtol=0, atol=0)
