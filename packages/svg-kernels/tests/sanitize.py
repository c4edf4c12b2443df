"""Launch the attention kernels on small shapes; run by `nox -s sanitize`.

Results are checked by test_attention_gpu.py; here they only have to be finite.
"""

from __future__ import annotations

from typing import Any

import torch
from attention_oracles import random_call

from svg_kernels import (
    block_sparse_attention,
    block_sparse_attention_fp8,
    permute_rows,
    quantize_key_value,
)


def attend(draw: torch.Generator, backend: str) -> None:
    """Run every head size and list of runs that takes a path of its own."""
    # Scores of a large magnitude have the compiled kernel raise its maxima.
    for dim, dtype, runs, summaries, multiple, magnitude in (
        (128, torch.bfloat16, 40, 0, 1, 1.0),
        (128, torch.float16, 5, 130, 1, 1.0),
        (64, torch.bfloat16, 100, 9, 1, 100.0),
        (128, torch.bfloat16, 5, 0, 8, 100.0),
        (128, torch.float16, 5, 9, 8, 100.0),
    ):
        arguments, keywords = random_call(
            draw, dtype=dtype, queries=300, keys=437, runs=runs, dim=dim, summaries=summaries,
            ordered=True, key_heads=1, magnitude=magnitude, multiple=multiple,
        )  # fmt: skip
        keywords = on_gpu(keywords)
        out, _ = block_sparse_attention(
            *(x.cuda() for x in arguments), return_lse=True, backend=backend, **keywords
        )
        assert torch.isfinite(out).all(), (backend, dim)


def attend_in_fp8(draw: torch.Generator) -> None:
    """Quantise keys and values, and run every list of runs that takes a path of its own."""
    for runs, summaries, multiple, magnitude in (
        (40, 0, 1, 1.0),
        (5, 130, 1, 12.0),
        (5, 0, 8, 12.0),
    ):
        (query, key, value, *plan), keywords = random_call(
            draw, dtype=torch.bfloat16, queries=300, keys=1437, runs=runs, dim=128,
            summaries=summaries, ordered=True, key_heads=1, magnitude=magnitude, multiple=multiple,
        )  # fmt: skip
        rows = quantize_key_value(key.cuda(), value.cuda())
        out, _ = block_sparse_attention_fp8(
            query.cuda(), rows, *(x.cuda() for x in plan), return_lse=True, backend="cuda",
            **on_gpu(keywords),
        )  # fmt: skip
        assert torch.isfinite(out).all(), runs


def on_gpu(keywords: dict[str, Any]) -> dict[str, Any]:
    """Return keywords whose tensors are on the GPU."""
    return {
        name: tuple(part.cuda() for part in x) if isinstance(x, tuple) else x.cuda()
        for name, x in keywords.items()
    }


def permute(draw: torch.Generator) -> None:
    """Permute rows of every head."""
    rows = torch.randn(1, 2, 300, 64, generator=draw).cuda().half()
    permute_rows(rows, torch.rand(1, 2, 300, generator=draw).argsort(-1).int().cuda())


def main() -> None:
    draw = torch.Generator().manual_seed(1)
    for backend in ("cuda", "triton"):
        attend(draw, backend)
    attend_in_fp8(draw)
    permute(draw)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
