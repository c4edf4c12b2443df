"""Data with known structure, brute-force oracles, and a guard against host synchronisation.

Lets these tests import what lies beside them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from svg_attention import SparsePlan, TokenLayout

sys.path.insert(0, str(Path(__file__).parent))

SYNCHRONISING = (
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "is_nonzero",
    "item",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "equal",
)


class _RefuseSync(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in SYNCHRONISING:
            raise AssertionError(f"aten::{name} waits for the device")
        if name == "index" and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            raise AssertionError("indexing by a boolean mask waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread: these tensors are too small for threads to help on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", "triton", pytest.param("gpu", marks=pytest.mark.gpu)])
def planner(request: pytest.FixtureRequest) -> str:
    """Return who plans: plain torch, the kernels interpreted, or the kernels on a GPU."""
    if request.param == "triton":
        request.getfixturevalue("interpreted")
    return "triton" if request.param == "gpu" else request.param


@pytest.fixture
def no_sync() -> Callable[[], Any]:
    """Return a context in which an operation that waits for the device fails."""

    @contextmanager
    def guard() -> Iterator[None]:
        with _RefuseSync():
            yield

    return guard


@pytest.fixture
def clustered() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return a maker of queries, keys and values whose attention follows hidden groups.

    Tokens belong at random to `groups` groups; a query attends mostly to keys of its own group.
    """

    def make(
        layout: TokenLayout,
        *,
        batch: int = 1,
        heads: int = 2,
        head_dim: int = 32,
        groups: int = 24,
        noise: float = 0.5,
        gain: float = 3.0,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        shape = (batch, heads, layout.tokens, head_dim)
        centres = torch.randn(heads, groups, head_dim, generator=draw)
        centres = centres / centres.norm(dim=-1, keepdim=True) * gain * head_dim**0.25
        label = torch.randint(groups, shape[:3], generator=draw)
        base = centres[torch.arange(heads)[None, :, None], label]
        query = base + noise * torch.randn(shape, generator=draw)
        key = base + noise * torch.randn(shape, generator=draw)
        return query, key, torch.randn(shape, generator=draw)

    return make


@pytest.fixture
def masked_attention() -> Callable[..., tuple[Tensor, Tensor]]:
    """Return fp64 attention under a bool mask: output and log-sum-exp; empty rows give 0, -inf."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        group = query.shape[1] // key.shape[1]
        key, value = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
        factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
        logits = query.double() @ key.transpose(-1, -2) * factor
        logits = logits.masked_fill(~mask, -torch.inf)
        weights = torch.softmax(logits, dim=-1).nan_to_num(0.0)
        return weights @ value, torch.logsumexp(logits, dim=-1)

    return attend


@pytest.fixture
def attend() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return a function that has a backend attend, into rows that lie between other heads'."""

    def attend(
        backend: Any, query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan, *, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        batch, heads, rows, _ = query.shape
        out = query.new_full((batch, rows, heads, value.shape[-1]), torch.nan).transpose(1, 2)
        return out, backend.attend(query, key, value, plan, out, scale=scale, return_lse=True)

    return attend


@pytest.fixture
def random_plan() -> Callable[..., SparsePlan]:
    """Return a maker of plans with random orders, cluster sizes (some zero) and choices."""

    def make(
        batch: int,
        heads: int,
        queries: int,
        keys: int,
        *,
        key_heads: int | None = None,
        clusters: int = 10,
        share: float = 0.4,
        seed: int = 0,
    ) -> SparsePlan:
        draw = torch.Generator().manual_seed(seed)
        key_heads = key_heads or heads
        tiles = -(-queries // 128)
        cuts = torch.randint(keys + 1, (batch, key_heads, clusters - 1), generator=draw)
        edges = torch.nn.functional.pad(cuts.sort(dim=-1).values, (1, 0))
        sizes = torch.diff(edges, append=torch.full_like(edges[..., :1], keys), dim=-1)
        sizes = sizes.repeat_interleave(heads // key_heads, dim=1)

        def permutations(count: int, length: int) -> Tensor:
            draws = torch.rand(batch, count, length, generator=draw)
            return draws.argsort(dim=-1).to(torch.int32)

        return SparsePlan.from_cluster_mask(
            torch.rand(batch, heads, tiles, clusters, generator=draw) < share,
            sizes,
            query_length=queries,
            key_length=keys,
            query_order=permutations(heads, queries),
            key_order=permutations(key_heads, keys),
        )

    return make


@pytest.fixture
def move_plan() -> Callable[[SparsePlan, torch.device], SparsePlan]:
    """Return a function that copies a plan without a summary to a device."""

    def move(plan: SparsePlan, device: torch.device) -> SparsePlan:
        tensors = {name: x.to(device) for name, x in vars(plan).items() if isinstance(x, Tensor)}
        return replace(plan, **tensors)

    return move
