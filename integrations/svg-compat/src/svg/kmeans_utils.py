"""K-means, the choice of clusters, and attention over clusters of any size."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_kmeans import kmeans
from svg_attention import SparsePlan, sparse_attention

__all__ = [
    "batch_kmeans_Euclid",
    "density_calculation",
    "dynamic_block_sparse_fwd_flashinfer",
    "identify_dynamic_map",
]

# Query rows of a tile of the kernels.
_TILE_ROWS = 128


def batch_kmeans_Euclid(
    x: Tensor,
    n_clusters: int,
    max_iters: int = 100,
    tol: float = 0.0,
    init_centroids: Tensor | None = None,
    verbose: bool = False,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Cluster points by Lloyd's algorithm, every batch on its own.

    Args:
        x: `[B, N, D]`.
        n_clusters: K.
        max_iters: rounds at most.
        tol: see `flash_kmeans.kmeans`.
        init_centroids: `[B, K, D]`; random points when None.
        verbose: not used.

    Returns:
        Labels int32 `[B, N]`, centroids `[B, K, D]`, sizes of clusters int32 `[B, K]`, and rounds.
    """
    init = "random" if init_centroids is None else init_centroids.view(-1, n_clusters, x.shape[-1])
    found = kmeans(x, n_clusters, init=init, max_iter=max_iters, tol=tol)
    return found.labels, found.centroids, found.sizes, found.n_iter


def identify_dynamic_map(
    query_centroids: Tensor,
    key_centroids: Tensor,
    q_cluster_sizes: Tensor,
    k_cluster_sizes: Tensor,
    p: float,
    min_kc_ratio: float = 0.0,
) -> Tensor:
    """Return which key clusters each query cluster reads.

    The mass of a key cluster is its size times the exponential of its centroid's logit. Clusters
    are read in descending mass until they hold `p` of it, the one that reaches `p` included.

    Args:
        query_centroids: `[B, H, Q, D]`.
        key_centroids: `[B, H, K, D]`.
        q_cluster_sizes: integers `[B, H, Q]`; not needed.
        k_cluster_sizes: integers `[B, H, K]`.
        p: share of the mass.
        min_kc_ratio: share of the key clusters that is read at least.

    Returns:
        bool `[B, H, Q, K]`.

    Source: Sparse VideoGen2, arXiv:2505.18875.
    """
    query, key = query_centroids.float(), key_centroids.float()
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    logits = logits + k_cluster_sizes.float().log()[:, :, None]
    mass, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    read = mass.cumsum(dim=-1) - mass <= p
    read[..., : int(min_kc_ratio * key.shape[2])] = True
    return torch.zeros_like(read).scatter_(-1, order, read)


def density_calculation(
    dynamic_map: Tensor, q_cluster_sizes: Tensor, k_cluster_sizes: Tensor
) -> Tensor:
    """Return the share of the query-key pairs that a map reads, fp32 `[B, H]`.

    Args:
        dynamic_map: bool `[B, H, Q, K]`.
        q_cluster_sizes: integers `[B, H, Q]`.
        k_cluster_sizes: integers `[B, H, K]`.
    """
    queries, keys = q_cluster_sizes.double(), k_cluster_sizes.double()
    read = (dynamic_map * keys[:, :, None]).sum(dim=-1)
    return ((read * queries).sum(dim=-1) / (queries.sum(-1) * keys.sum(-1))).float()


def dynamic_block_sparse_fwd_flashinfer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask_map: Tensor,
    block_row_sz: Tensor,
    block_col_sz: Tensor,
    is_cpu: bool = True,
) -> Tensor:
    """Compute attention of query clusters over the key clusters that they read.

    No tile of queries holds rows of two clusters, so each reads what its own cluster does. The
    kernels that run on a GPU round runs of keys up to 8.

    Args:
        q: `[B, H, S, D]`, rows cluster by cluster.
        k: `[B, H, S, D]`, likewise.
        v: `[B, H, S, D]`, likewise.
        block_mask_map: bool `[B, H, Q, K]`.
        block_row_sz: integers `[B, H, Q]`, queries of each cluster.
        block_col_sz: integers `[B, H, K]`, keys of each cluster.
        is_cpu: where the published code plans; there is no difference here.

    Returns:
        Tensor shaped and typed as `q`; 0 for queries that read nothing.
    """
    batch, heads, length, width = q.shape
    clusters = block_row_sz.shape[-1]
    sizes = block_row_sz.long()
    tiles = (sizes + _TILE_ROWS - 1) // _TILE_ROWS
    last_tile, last_row = tiles.cumsum(-1), sizes.cumsum(-1)
    most = length // _TILE_ROWS + clusters
    # Which cluster a tile and a row belong to, and where its rows stand once clusters are padded.
    number = torch.arange(most, device=q.device).expand(batch, heads, most)
    of_tile = torch.searchsorted(last_tile, number.contiguous(), right=True)
    number = torch.arange(length, device=q.device).expand(batch, heads, length)
    of_row = torch.searchsorted(last_row, number.contiguous(), right=True).clamp(max=clusters - 1)
    shift = (last_tile - tiles) * _TILE_ROWS - (last_row - sizes)
    place = (number + shift.gather(-1, of_row))[..., None].expand_as(q)
    padded = q.new_zeros(batch, heads, most * _TILE_ROWS, width).scatter_(2, place, q)
    used = of_tile < clusters
    rows = of_tile.clamp(max=clusters - 1)[..., None].expand(-1, -1, -1, block_mask_map.shape[-1])
    plan = SparsePlan.from_cluster_mask(
        block_mask_map.bool().gather(2, rows) & used[..., None],
        block_col_sz.int(),
        query_length=padded.shape[2],
        key_length=length,
    )
    return sparse_attention(padded, k, v, plan).gather(2, place)
