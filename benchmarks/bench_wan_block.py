"""Time one Wan 2.1 14B block of diffusers, and the same block with svg-kernels around its products.

    python benchmarks/bench_wan_block.py run --output benchmarks/results/h100
    python benchmarks/bench_wan_block.py table

The device time of every kernel is sorted into attention, matrix products and the rest, which is
what svg-kernels is for. Outputs are compared first, in bf16 against the block in fp64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _harness import (
    ROOT,
    conditions,
    environment,
    interleave,
    load,
    replace_between,
    store,
    summary,
    table,
)
from torch import Tensor

import svg_kernels

WIDTH, FFN, HEADS = 5120, 13824, 40
TOKENS = 75600
ATTENTION = ("flash", "fmha", "sdpa", "attention")
PRODUCTS = ("gemm", "nvjet", "xmma", "cutlass", "cublas")


def make_block(device: str = "cuda") -> torch.nn.Module:
    """Return diffusers' block with random weights, in the precisions diffusers loads it with."""
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    with torch.device(device):
        block = WanTransformerBlock(WIDTH, FFN, HEADS, cross_attn_norm=True)
    block = block.to(torch.bfloat16).eval().requires_grad_(False)
    block.norm2.float()
    block.scale_shift_table.data = block.scale_shift_table.data.float()
    for attention in (block.attn1, block.attn2):
        for norm in (attention.norm_q, attention.norm_k):
            norm.weight.data.normal_(1.0, 0.2)
    return block


def make_inputs(tokens: int, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor, Any]:
    """Return hidden states, text states, modulation and rotary tables."""
    hidden = torch.randn(1, tokens, WIDTH, device=device).bfloat16()
    text = torch.randn(1, 512, WIDTH, device=device).bfloat16()
    modulation = torch.randn(1, 6, WIDTH, device=device)
    theta = torch.rand(1, tokens, 1, 64, device=device).repeat_interleave(2, dim=-1) * 6.28
    return hidden, text, modulation, (theta.cos(), theta.sin())


def fused(block: Any, hidden: Tensor, text: Tensor, modulation: Tensor, tables: Any) -> Tensor:
    """Run the block with the operations of svg-kernels between its matrix products."""
    parts = (block.scale_shift_table + modulation.float()).chunk(6, dim=1)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts
    eps = block.norm1.eps
    x = svg_kernels.layer_norm_modulate(hidden, scale, shift, eps=eps)
    x = self_attention(block.attn1, x, tables)
    hidden = svg_kernels.gate_residual(hidden, x, gate)
    norm = block.norm2
    x = svg_kernels.layer_norm(hidden, norm.weight, norm.bias, eps=norm.eps)
    hidden = hidden + cross_attention(block.attn2, x, text)
    x = svg_kernels.layer_norm_modulate(hidden, ffn_scale, ffn_shift, eps=eps)
    return svg_kernels.gate_residual(hidden, block.ffn(x), ffn_gate)


def self_attention(attention: Any, x: Tensor, tables: Any) -> Tensor:
    """Attend with q and k normalised, rotated and laid out in one launch."""
    query, key, value = attention.to_q(x), attention.to_k(x), attention.to_v(x)
    shape = (*x.shape[:2], attention.heads, -1)
    # Token-major memory, head-major view: what the kernel returns then flattens without a copy.
    out = tuple(torch.empty_like(t).view(shape).transpose(1, 2) for t in (query, key))
    norm_q, norm_k = attention.norm_q, attention.norm_k
    query, key = svg_kernels.qk_norm_rope(
        query, key, norm_q.weight, norm_k.weight, *tables,
        heads=attention.heads, eps=norm_q.eps, out=out,
    )  # fmt: skip
    y = F.scaled_dot_product_attention(query, key, value.view(shape).transpose(1, 2))
    return attention.to_out[0](y.transpose(1, 2).flatten(2))


def cross_attention(attention: Any, x: Tensor, text: Tensor) -> Tensor:
    """Attend to the text; only the norms are ours."""
    norm_q, norm_k = attention.norm_q, attention.norm_k
    query = svg_kernels.rms_norm(attention.to_q(x), norm_q.weight, eps=norm_q.eps)
    key = svg_kernels.rms_norm(attention.to_k(text), norm_k.weight, eps=norm_k.eps)
    heads = [
        t.unflatten(2, (attention.heads, -1)).transpose(1, 2)
        for t in (query, key, attention.to_v(text))
    ]
    y = F.scaled_dot_product_attention(*heads)
    return attention.to_out[0](y.transpose(1, 2).flatten(2))


def check(block: Any, tokens: int = 1040) -> dict[str, float]:
    """Return both blocks' root mean square error against fp64; raise if ours is twice as far."""
    inputs = make_inputs(tokens)
    stock = block(*inputs)
    ours = fused(block, *inputs)
    exact_block = make_block()
    exact_block.load_state_dict(block.state_dict())
    exact_block.double()
    hidden, text, modulation, tables = inputs
    exact = exact_block(
        hidden.double(), text.double(), modulation.double(), tuple(t.double() for t in tables)
    )
    error = {
        name: (y.double() - exact).square().mean().sqrt().item()
        for name, y in (("ours", ours), ("diffusers", stock))
    }
    if error["ours"] > 2 * error["diffusers"]:
        raise AssertionError(f"the fused block is wrong: {error}")
    return error


def by_kind(function: Callable[[], Any]) -> dict[str, float]:
    """Return milliseconds of device time spent in attention, products and the rest."""
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        function()
        torch.cuda.synchronize()
    kinds = {"attention": 0.0, "matrix products": 0.0, "the rest": 0.0}
    for event in trace.key_averages():
        name = event.key.lower()
        kind = (
            "attention"
            if any(word in name for word in ATTENTION)
            else "matrix products"
            if any(word in name for word in PRODUCTS)
            else "the rest"
        )
        kinds[kind] += event.self_device_time_total / 1e3
        if event.self_device_time_total > 300:
            print(f"  {event.self_device_time_total / 1e3:8.2f} ms {kind:16s} {event.key[:90]}")
    return kinds


def run(output: Path, samples: int, commit: str | None) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        block = make_block()
        error = check(block)
        print("error against fp64", error)
        torch.cuda.empty_cache()
        inputs = make_inputs(TOKENS)
        functions = {
            "diffusers": lambda: block(*inputs),
            "ours": lambda: fused(block, *inputs),
        }
        kinds = {name: by_kind(function) for name, function in functions.items()}
        times = interleave(functions, samples=samples, warmup=1)
    ms = {name: summary(values) for name, values in times.items()}
    print(kinds, ms)
    result = {
        "environment": environment(commit),
        "tokens": TOKENS,
        "rms_error_vs_fp64": error,
        "ms": ms,
        "ms_by_kind": kinds,
    }
    store(output / "wan_block.json", result)


def write_table(gpu: str) -> None:
    result = load(gpu, "wan_block")
    kinds, ms = result["ms_by_kind"], result["ms"]
    head = ["block", "whole, ms", *kinds["ours"], "error against fp64"]
    rows = [
        [
            name,
            f"{ms[name]['median']:.1f} ({ms[name]['q1']:.1f} to {ms[name]['q3']:.1f})",
            *(f"{value:.1f}" for value in kinds[name].values()),
            f"{result['rms_error_vs_fp64'][name]:.2e}",
        ]
        for name in ("diffusers", "ours")
    ]
    ratio = kinds["diffusers"]["the rest"] / kinds["ours"]["the rest"]
    text = (
        f"{conditions(result['environment'])} {result['tokens']:,} tokens, bf16, random weights."
        "\n\n"
        + table(head, rows)
        + f"\nApart from attention and matrix products the block takes {ratio:.1f} times less.\n"
    )
    replace_between(ROOT / "docs" / "kernels.md", "wan-block", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "h100")
    parser.add_argument("--gpu", default="h100", help="folder of the stored result")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--commit", help="recorded where there is no git")
    args = parser.parse_args()
    if args.action == "run":
        run(args.output, args.samples, args.commit)
    else:
        write_table(args.gpu)


if __name__ == "__main__":
    main()
