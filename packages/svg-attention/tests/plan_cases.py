"""Plans for a grid of inputs, and digests of every tensor they hold.

`python plan_cases.py` prints the digests of all cases as JSON; `plans.json` beside this file holds
those that test_plans_unchanged.py compares with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svg_attention import SVG1, SVG2, Dense, LayerMemory, RandomBlocks, SparsePlan, TokenLayout

STORED = Path(__file__).with_name("plans.json")
INTEGERS = (
    *("query_order", "key_order", "run_starts", "run_lengths"),
    *("query_lengths", "key_lengths"),
)
SUMMARY = ("keys", "values", "log_weights")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration; its plans are those of two consecutive steps."""

    method: Any
    layout: TokenLayout
    batch: int = 1
    heads: int = 2
    key_heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    text_lengths: tuple[int, ...] | None = None
    scale: float | None = None


ODD = TokenLayout(grid=(3, 7, 11))
LARGE = TokenLayout(grid=(5, 24, 24))
SQUARE = TokenLayout(grid=(4, 16, 16))
TEXT_LAST = TokenLayout(grid=(5, 9, 13), text_tokens=77)
TEXT_FIRST = TokenLayout(grid=(5, 9, 13), text_tokens=77, text_position="first")
FEW = {"q_clusters": 9, "k_clusters": 23, "first_iterations": 6}
MANY = {"q_clusters": 40, "k_clusters": 120, "first_iterations": 5, "step_iterations": 1}
GROUPED = {"heads": 6, "key_heads": 2, "batch": 2}


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    error = {"compensate": True, "route": "error"}
    found = {
        "dense": Case(method=Dense(), layout=TEXT_LAST, batch=2, text_lengths=(0, 77)),
        "random": Case(method=RandomBlocks(density=0.4), layout=LARGE, **GROUPED),
        "random text first": Case(
            method=RandomBlocks(density=0.3), layout=TEXT_FIRST, batch=2, text_lengths=(5, 60)
        ),
        "svg1 large": Case(method=SVG1(density=0.3), layout=LARGE),
        "svg1 grouped": Case(method=SVG1(density=0.2, sampled_rows=33), layout=SQUARE, **GROUPED),
        "svg1 text first": Case(method=SVG1(density=0.45), layout=TEXT_FIRST, scale=0.3),
        "svg1 fp16": Case(method=SVG1(density=0.5), layout=ODD, dtype=torch.float16),
        "svg2 large": Case(method=SVG2(top_p=0.85, **MANY), layout=LARGE),
        "svg2 large density": Case(
            method=SVG2(density=0.25, compensate=True, **MANY), layout=LARGE, head_dim=64
        ),
        "svg2 large error": Case(method=SVG2(density=0.2, **error, **MANY), layout=LARGE),
        "svg2 bf16": Case(
            method=SVG2(density=0.3, **error, **FEW), layout=ODD, dtype=torch.bfloat16
        ),
        "svg2 fp16 top-p": Case(
            method=SVG2(top_p=0.8, min_keep=0.0, **FEW), layout=ODD, dtype=torch.float16
        ),
        "svg2 wide": Case(method=SVG2(density=0.5, **FEW), layout=ODD, head_dim=72, scale=0.2),
        "svg2 whole": Case(method=SVG2(top_p=1.0, **FEW), layout=ODD),
    }
    budgets = {
        "top-p 0.5": {"top_p": 0.5, "min_keep": 0.0},
        "top-p 0.9": {"top_p": 0.9, "probe_rows": 128},
        "density 0.15": {"density": 0.15, "probe_rows": 32},
        "density 0.6": {"density": 0.6},
    }
    layouts = {
        "odd": (ODD, {}),
        "text last": (TEXT_LAST, {"batch": 2, "text_lengths": (13, 77)}),
        "text first": (TEXT_FIRST, {"batch": 2, "text_lengths": (0, 64)}),
        "text first, all valid": (TEXT_FIRST, {}),
        "grouped": (SQUARE, GROUPED),
    }
    options = {"": {}, " compensated": {"compensate": True}, " by error": error}
    for place, (layout, given) in layouts.items():
        for budget, chosen in budgets.items():
            for option, extra in options.items():
                found[f"svg2 {place} {budget}{option}"] = Case(
                    method=SVG2(**FEW, **chosen, **extra), layout=layout, **given
                )
    return found


def plans(case: Case, device: torch.device | str = "cpu") -> Iterator[SparsePlan]:
    """Yield the plans of two consecutive steps, built on `device` from the same numbers."""
    draw = torch.Generator().manual_seed(7)
    layout, memory = case.layout, LayerMemory()
    generator = torch.Generator(device=device).manual_seed(11)
    centres = torch.randn(case.key_heads, 12, case.head_dim, generator=draw) * 1.5
    label = torch.randint(12, (case.batch, layout.tokens), generator=draw)
    text = None
    if case.text_lengths is not None:
        text = torch.tensor(case.text_lengths, device=device)
    for _ in range(2):
        tensors = []
        for heads in (case.heads, case.key_heads, case.key_heads):
            base = centres.repeat_interleave(heads // case.key_heads, dim=0)[:, label]
            noise = torch.randn(case.batch, heads, layout.tokens, case.head_dim, generator=draw)
            tensors.append((base.transpose(0, 1) + noise).to(device, case.dtype))
        yield case.method.plan(
            *tensors,
            layout=layout,
            memory=memory,
            text_lengths=text,
            generator=generator,
            scale=case.scale,
        )


def digest(x: Tensor | None) -> str | None:
    """Return a digest of dtype, shape and every bit."""
    if x is None:
        return None
    head = f"{x.dtype} {tuple(x.shape)}".encode()
    raw = x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(head + raw, digest_size=9).hexdigest()


def describe(plan: SparsePlan) -> dict[str, Any]:
    """Return the digests of a plan, and how much it reads."""
    found: dict[str, Any] = {name: digest(getattr(plan, name)) for name in INTEGERS}
    if plan.summary is not None:
        found |= {f"summary.{name}": digest(getattr(plan.summary, name)) for name in SUMMARY}
    return {**found, "density": round(float(plan.density().mean()), 6)}


def arithmetic() -> str:
    """Return a digest of the sums and functions that plans are made of, as this machine does them.

    Another library of products or another vector width rounds otherwise; digests that were stored
    under one arithmetic say nothing under another.
    """
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, 333, 72, generator=draw)
    logits = x @ x[:, :120].transpose(-1, -2)
    parts = [logits, torch.softmax(logits, dim=-1), logits.cumsum(-1), logits.abs().log()]
    parts += [x.square().sum(-1), x.double().cumsum(1).float(), x.norm(dim=-1), x.exp()]
    return "".join(str(digest(part))[:4] for part in parts)


def main() -> None:
    torch.set_grad_enabled(False)
    found = {name: [describe(plan) for plan in plans(case)] for name, case in cases().items()}
    print(json.dumps({"arithmetic": arithmetic(), "plans": found}, indent=1))


if __name__ == "__main__":
    main()
