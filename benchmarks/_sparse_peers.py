"""Other people's sparse attention kernels, each fed the nearest plan that it can express.

Every peer is a function that prepares one call and returns what to time. A peer that cannot be
imported or run is listed as not run, with its reason.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _sparse_workloads import HEAD_DIM, check_close, exact
from torch import Tensor

import svg_kernels
from svg_attention.planning.clustering import Clusters
from svg_attention.planning.selection import keep_budget

WORKSPACE = 2**30
# FlashInfer is given one list entry for each key of each query cluster; at full density the lists
# alone would take 3.6 GB and several times that to build.
DENSEST_TOKEN_LIST = 0.5


def load(folder: Path | None, name: str) -> ModuleType:
    """Import a peer's package from `folder`, kept apart from one of ours that shares its name."""

    def taken() -> list[str]:
        return [m for m in sys.modules if m == name or m.startswith(f"{name}.")]

    if folder is None:
        return importlib.import_module(name)
    ours = {module: sys.modules.pop(module) for module in taken()}
    sys.path.insert(0, str(folder))
    try:
        peer = importlib.import_module(name)
        for module in taken():
            sys.modules[f"peer_{module}"] = sys.modules.pop(module)
    finally:
        sys.path.remove(str(folder))
        sys.modules.update(ours)
    return peer


def cluster_mask(queries: Clusters, keys: Clusters, density: float) -> Tensor:
    """Choose key clusters for each query cluster by their mass per key, bool `[H, Cq, Ck]`."""
    logits = queries.centroids.float() @ keys.centroids.float().mT * HEAD_DIM**-0.5
    mass = torch.softmax(logits + keys.sizes.float().log()[:, :, None], dim=-1)
    rows = keys.labels.shape[-1]
    budget = torch.full(mass.shape[:3], density * rows, device=mass.device)
    return keep_budget(mass / keys.sizes.clamp(min=1)[:, :, None], keys.sizes, budget)[0]


class FlashInfer:
    """FlashInfer's variable-block attention, which Sparse VideoGen 2 runs on."""

    def __init__(self, backend: str = "fa3") -> None:
        sparse: Any = importlib.import_module("flashinfer").sparse
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
        self.wrapper = sparse.VariableBlockSparseAttentionWrapper(workspace, backend=backend)

    def plan(self, mask: Tensor, query_sizes: Tensor, key_sizes: Tensor) -> None:
        """Plan on the host; `[H, Cq, Ck]`, `[H, Cq]`, `[H, Ck]`."""
        heads = mask.shape[0]
        self.wrapper.plan(
            mask,
            query_sizes,
            key_sizes,
            heads,
            heads,
            HEAD_DIM,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )

    def run(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend; `[H, N, D]` each, sorted by cluster."""
        out: Tensor = self.wrapper.run(query, key, value)
        return out


def prepare_flashinfer(
    query: Tensor, key: Tensor, value: Tensor, queries: Clusters, keys: Clusters, density: float
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Return calls that run and plan FlashInfer's kernel on our clusters, and their density."""
    peer = FlashInfer()
    mask = cluster_mask(queries, keys, density)
    query_sizes, key_sizes = queries.sizes[0], keys.sizes[0]
    moved = [
        svg_kernels.permute_rows(x, clusters.order)[0]
        for x, clusters in ((query, queries), (key, keys), (value, keys))
    ]

    def plan() -> None:
        peer.plan(mask, query_sizes, key_sizes)

    plan()
    check_clusters("FlashInfer", peer.run(*moved), moved, mask, query_sizes, key_sizes)
    pairs = (query_sizes[:, :, None].double() * key_sizes[:, None] * mask).sum()
    share = (pairs / (mask.shape[0] * query.shape[2] * key.shape[2])).item()
    calls = {"FlashInfer": lambda: peer.run(*moved), "FlashInfer plan": plan}
    return calls, {"FlashInfer": share}


def check_clusters(
    name: str,
    out: Tensor,
    moved: list[Tensor],
    mask: Tensor,
    query_sizes: Tensor,
    key_sizes: Tensor,
) -> None:
    """Compare the middle query cluster of the first and last head with fp64."""
    out = out.reshape(moved[0].shape)
    for head in (0, mask.shape[0] - 1):
        cluster = mask.shape[1] // 2
        first = int(query_sizes[head, :cluster].sum())
        rows = slice(first, first + int(query_sizes[head, cluster]))
        read = mask[head, cluster].repeat_interleave(key_sizes[head].long())
        query, key, value = (x[head] for x in moved)
        want = exact(query[rows], key[read], value[read])
        check_close(f"{name}, head {head}", out[head, rows], want)


def top_blocks(query: Tensor, key: Tensor, rows: int, density: float) -> Tensor:
    """Return the key blocks that each query block's mean scores highest, `[1, H, Tq, n]`."""

    def means(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, rows)).float().mean(dim=3)

    scores = means(query) @ means(key).mT
    count = max(1, round(density * scores.shape[-1]))
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values.int()


def check_blocks(
    name: str, out: Tensor, tensors: tuple[Tensor, ...], blocks: Tensor, rows: int
) -> None:
    """Compare two query blocks of the first and last head with fp64; `[1, H, N, D]`."""
    for head in (0, blocks.shape[1] - 1):
        for block in (0, blocks.shape[2] // 2):
            index = blocks[0, head, block].long()[:, None] * rows
            index = (index + torch.arange(rows, device=index.device)).view(-1)
            own = slice(block * rows, (block + 1) * rows)
            query, key, value = (x[0, head] for x in tensors)
            want = exact(query[own], key[index], value[index])
            check_close(f"{name}, head {head}, block {block}", out[0, head, own], want)


def whole_blocks(tensors: tuple[Tensor, ...], clusters: tuple[Clusters, Clusters], rows: int):
    """Sort tensors by cluster and cut them to whole blocks of `rows` rows."""
    orders = (clusters[0].order, clusters[1].order, clusters[1].order)
    length = clusters[0].order.shape[-1] // rows * rows
    return tuple(
        svg_kernels.permute_rows(x, order[..., :length].contiguous())
        for x, order in zip(tensors, orders, strict=True)
    )


def prepare_flash_attention(
    tensors: tuple[Tensor, ...], clusters: tuple[Clusters, Clusters], density: float
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Return FlashAttention 4 over blocks of 128 x 128, and dense at full density."""
    interface: Any = importlib.import_module("flash_attn.cute.interface")
    sparsity: Any = importlib.import_module("flash_attn.cute.block_sparsity")
    moved = whole_blocks(tensors, clusters, 128)
    query, key, value = (x.transpose(1, 2).contiguous() for x in moved)

    def output(result: Any) -> Tensor:
        return result[0] if isinstance(result, tuple) else result

    if density >= 1.0:
        calls = {"FlashAttention 4": lambda: interface.flash_attn_func(query, key, value)}
        got = output(calls["FlashAttention 4"]())[0, :128, 0]
        check_close(
            "FlashAttention 4", got, exact(moved[0][0, 0, :128], *(x[0, 0] for x in moved[1:]))
        )
        return calls, {"FlashAttention 4": 1.0}
    blocks = top_blocks(*moved[:2], 128, density)
    total = moved[0].shape[2] // 128
    empty = torch.zeros(*blocks.shape[:3], dtype=torch.int32, device="cuda")
    index = torch.nn.functional.pad(blocks, (0, total - blocks.shape[-1])).contiguous()
    operand = sparsity.BlockSparseTensorsTorch(
        mask_block_cnt=empty,
        mask_block_idx=torch.zeros_like(index),
        full_block_cnt=torch.full_like(empty, blocks.shape[-1]),
        full_block_idx=index,
        block_size=(128, 128),
    )

    def call() -> Any:
        return interface.flash_attn_func(query, key, value, block_sparse_tensors=operand)

    check_blocks("FlashAttention 4", output(call()).transpose(1, 2), moved, blocks, 128)
    return {"FlashAttention 4": call}, {"FlashAttention 4": blocks.shape[-1] / total}


def prepare_fastvideo(
    tensors: tuple[Tensor, ...], clusters: tuple[Clusters, Clusters], density: float
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Return FastVideo's attention over blocks of 64 x 64."""
    module: Any = importlib.import_module("fastvideo_kernel.block_sparse_attn")
    moved = whole_blocks(tensors, clusters, 64)
    blocks = top_blocks(*moved[:2], 64, density)
    total = moved[0].shape[2] // 64
    counts = torch.full(blocks.shape[:3], blocks.shape[-1], dtype=torch.int32, device="cuda")
    sizes = torch.full((total,), 64, dtype=torch.int32, device="cuda")

    def call() -> Any:
        return module.block_sparse_attn_from_indices(*moved, blocks, counts, sizes)

    result = call()
    out = result[0] if isinstance(result, tuple) else result
    check_blocks("FastVideo", out, moved, blocks, 64)
    return {"FastVideo": call}, {"FastVideo": blocks.shape[-1] / total}


def prepare_call(
    kmeans: Any,
    tensors: tuple[Tensor, ...],
    clusters: tuple[Clusters, Clusters],
    counts: tuple[int, int],
    density: float,
) -> Callable[[], Tensor]:
    """Return a whole SVG2 call made of flash-kmeans and FlashInfer, permutations by our kernels."""
    peer = FlashInfer()
    query, key, value = tensors

    def cluster(x: Tensor, count: int, start: Tensor) -> Clusters:
        labels, centroids, _ = kmeans.batch_kmeans_Euclid(
            x[0], count, max_iters=2, init_centroids=start[0]
        )[:3]
        labels = labels.view(1, *x.shape[1:3])
        order = labels.argsort(dim=-1, stable=True).int()
        sizes = torch.zeros(*x.shape[:2], count, dtype=torch.int32, device=x.device)
        sizes.scatter_add_(-1, labels.long(), torch.ones_like(labels, dtype=torch.int32))
        return Clusters(
            labels=labels,
            centroids=centroids[None],
            sizes=sizes,
            order=order,
            broken=torch.zeros(sizes.shape[:2], dtype=torch.bool, device=sizes.device),
        )

    def call() -> Tensor:
        queries, keys = (
            cluster(x, n, known.centroids)
            for x, n, known in zip((query, key), counts, clusters, strict=True)
        )
        mask = cluster_mask(queries, keys, density)
        peer.plan(mask, queries.sizes[0], keys.sizes[0])
        moved_query = svg_kernels.permute_rows(query, queries.order)
        moved_key, moved_value = svg_kernels.permute_rows((key, value), keys.order)
        out = peer.run(moved_query[0], moved_key[0], moved_value[0])
        out = out.reshape(1, *query.shape[1:])
        return svg_kernels.unpermute_rows(out, queries.order)

    return call


def prepare_cudnn_fp8(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """Return cuDNN's dense attention in e4m3 over tensors [B, H, N, D], rounded beforehand.

    Every tensor has one scale, as cuDNN takes them, and the output is e4m3 too. Raises
    ImportError without nvidia-cudnn-frontend, RuntimeError where it has no such kernel.
    """
    cudnn = importlib.import_module("cudnn")
    byte, single = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=byte, intermediate_data_type=single, compute_data_type=single
    )
    largest = torch.finfo(torch.float8_e4m3fn).max
    pack: dict[Any, Tensor] = {}

    def placed(x: Tensor, dtype: Any) -> Any:
        node = graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=dtype)
        pack[node] = x
        return node

    def scalar(x: Tensor | float) -> Any:
        return placed(torch.as_tensor(x, device="cuda").float().reshape(1, 1, 1, 1), single)

    def rounded(x: Tensor) -> tuple[Any, Any]:
        scale = x.abs().amax().float() / largest
        apart = (x / scale).transpose(1, 2).contiguous().to(torch.float8_e4m3fn)
        return placed(apart.transpose(1, 2), byte), scalar(scale)

    (q, scale_q), (k, scale_k), (v, scale_v) = map(rounded, (query, key, value))
    # Outputs are means of values and rarely a quarter of the largest.
    range_of_output = value.abs().amax().float() / 4
    made = graph.sdpa_fp8(
        q=q, k=k, v=v, descale_q=scale_q, descale_k=scale_k, descale_v=scale_v,
        descale_s=scalar(1 / largest), scale_s=scalar(largest),
        scale_o=scalar(largest / range_of_output), is_inference=True,
        attn_scale=query.shape[-1] ** -0.5, use_causal_mask=False,
    )  # fmt: skip
    batch, heads, length, dim = query.shape
    out = torch.empty(batch, length, heads, dim, dtype=torch.float8_e4m3fn, device="cuda")
    out = out.transpose(1, 2)
    results = [(made[0], out, byte)]
    results += [(x, torch.zeros(1, 1, 1, 1, device="cuda"), single) for x in made[2:]]
    for node, x, dtype in results:
        node.set_output(True).set_dim(list(x.shape)).set_stride(list(x.stride()))
        node.set_data_type(dtype)
        pack[node] = x
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(graph.get_workspace_size(), device="cuda", dtype=torch.uint8)

    def call() -> Tensor:
        graph.execute(pack, workspace)
        return out

    return call
