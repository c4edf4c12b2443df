"""Correcting sparse outputs by exact ones: of probes, and of a few rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from svg_attention._ops import define_op
from svg_attention.plan import ExactRows, ProbeResidual, SparsePlan
from svg_attention.planning.dispatch import planner_for
from svg_attention.rows import take_rows
from svg_attention.tiles import match_heads

# Strength of the ridge, as a share of the mean energy of the features.
RIDGE = 0.03
# Rounds of the inverse: enough for eigenvalues that differ by a factor of 10^5.
ROUNDS = 21
# Bytes of corrections held at once.
SCRATCH = 2**28
# Channels of a row that the kernel takes: it holds both matrices of a head.
MAX_KERNEL_WIDTH = 128
TINY = torch.finfo(torch.float32).tiny


def add_residual(
    outputs: Tensor, order: Tensor | None, residual: ProbeResidual, out: Tensor
) -> None:
    """Fill `out` with the outputs of the queries, with what their probes lack added.

    Args:
        outputs: `[B, H, S + P, D_v]`, of the queries and, behind them, of the probes.
        order: int32 `[B, H, S + P]`, see `SparsePlan.query_order`; None for the given order.
        residual: the probes.
        out: `[B, H, S, D_v]`, typed as `outputs`.
    """
    batch, heads, length, width = out.shape
    probes = residual.outputs.shape[2]
    lacking = foretold(residual.outputs - outputs[:, :, length:].float()).to(outputs.dtype)
    # Behind the probes stands a row of zeros, for text.
    lacking = torch.cat([lacking, lacking.new_zeros(batch, heads, 1, width)], dim=2)
    places = torch.arange(
        order.shape[2] if order is not None else length + probes, device=out.device
    )
    probe = torch.where(places < residual.positions, places // residual.rows, probes)
    probe = probe.expand(batch, heads, -1)
    if order is not None:
        probe = torch.empty_like(order, dtype=torch.int64).scatter_(2, order.long(), probe)
    torch.add(outputs[:, :, :length], take_rows(lacking, probe[:, :, :length]), out=out)


def foretold(lacking: Tensor) -> Tensor:
    """Scale what the probes of each head lack by how well probes foretell their neighbours.

    The factor of a head is the `reliance` of probes as predictions of the other of their pair:
    where neighbours have nothing in common, a probe says nothing about its rows either.

    Args:
        lacking: `[B, H, P, D]`, probes in plan order; one that is not finite counts as 0.
    """
    lacking = torch.where(lacking.isfinite().all(dim=-1, keepdim=True), lacking, 0.0)
    pairs = lacking[:, :, : lacking.shape[2] // 2 * 2].unflatten(2, (-1, 2))
    pairs = pairs / _largest(lacking)[:, :, None]
    both = 2 * (pairs[:, :, :, 0] * pairs[:, :, :, 1]).sum(dim=-1)
    return lacking * reliance(both, pairs.square().sum(dim=(3, 4)))[..., None, None]


def reliance(agreement: Tensor, energy: Tensor) -> Tensor:
    """Return the factor to scale predictions by, so that they do no harm.

    It is the factor that fits best what they predicted, by least squares, less twice its standard
    error, and held between 0 and 1.

    Args:
        agreement: `[..., N]`, product of each prediction with what it predicted.
        energy: `[..., N]`, square of each prediction.

    Returns:
        `[...]`; 0 where nothing was predicted.
    """
    total = energy.sum(dim=-1, keepdim=True).clamp(min=TINY)
    best = agreement.sum(dim=-1, keepdim=True) / total
    deviation = (agreement - best * energy).square().sum(dim=-1, keepdim=True).sqrt() / total
    return (best - 2 * deviation).clamp(0, 1).squeeze(-1)


def add_first_order(
    out: Tensor, lse: Tensor, query: Tensor, plan: SparsePlan, scale: float
) -> None:
    """Add to outputs, in place, what the slope of a summary adds to the values of centroids.

    The share of a row's attention that falls on centroids is computed once more, some tiles at a
    time, in plain torch.

    Args:
        out: `[B, H, S, D_v]`, outputs without it; any strides.
        lse: fp32 `[B, H, S]`, natural logarithm of their softmax denominators.
        query: `[B, H, S, D]`.
        plan: has a summary with a slope, and no residual.
        scale: factor of the logits.
    """
    summary = plan.summary
    if summary is None or summary.slope is None:
        raise ValueError("the plan has no slope")
    centroids = match_heads(summary.keys, plan.heads).float().transpose(-1, -2)
    slope = match_heads(summary.slope, plan.heads) * scale
    positions = torch.arange(plan.query_length, device=out.device)
    order = positions.expand(plan.batch, plan.heads, -1)
    if plan.query_order is not None:
        order = plan.query_order.long()
    tile_bytes = 4 * plan.batch * plan.heads * plan.tile_rows * centroids.shape[3]
    step = max(SCRATCH // max(tile_bytes, 1), 1)
    for first in range(0, plan.tiles, step):
        part = slice(first * plan.tile_rows, (first + step) * plan.tile_rows)
        tokens = order[:, :, part]
        index = tokens[..., None]
        rows = query.gather(2, index.expand(-1, -1, -1, query.shape[3])).float()
        weights = summary.log_weights[:, :, first : first + step]
        weights = weights.repeat_interleave(plan.tile_rows, dim=2)[:, :, : tokens.shape[2]]
        logits = rows @ centroids * scale + weights
        share = (logits - lse.gather(2, tokens)[..., None]).exp().sum(dim=-1, keepdim=True)
        found = index.expand(-1, -1, -1, out.shape[3])
        more = out.gather(2, found) + share * (rows @ slope)
        out.scatter_(2, found, more.to(out.dtype))


def repair(out: Tensor, query: Tensor, exact: ExactRows) -> None:
    """Correct outputs in place by a regression from the rows whose exact outputs are known.

    What a row lacks is predicted from its sparse output and its query, head by head, by ridge
    regression; each is centred and scaled to unit energy first. Each known row is predicted from
    the others, too, and the regression is scaled by its `reliance` on them: where rows do not
    foretell each other, outputs stay as they are. Known rows become exact.

    Args:
        out: `[B, H, S, D_v]`, sparse outputs; any strides.
        query: `[B, H, S, D]`, typed as `out`.
        exact: the known rows.

    Source: SparsePR, arXiv:2608.18484, 4.4; there without queries, truncated to rank 16 and applied
    unchecked.
    """
    index = exact.tokens[..., None]
    sparse, asked = (x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (out, query))
    known = exact.outputs.float()
    lacking = known - sparse.float()
    valid = lacking.isfinite().all(dim=-1) & asked.isfinite().all(dim=-1)
    outputs, queries = (_Features(x, valid) for x in (sparse, asked))
    lacking = torch.where(valid[..., None], lacking, 0.0)
    size = _largest(lacking)
    dual = fit(torch.cat([outputs.rows, queries.rows], dim=-1), lacking / size, valid) * size
    slopes = [x.slope(dual) for x in (outputs, queries)]
    constant = dual.sum(dim=2, keepdim=True)
    for features, slope in zip((outputs, queries), slopes, strict=True):
        constant = constant - features.mean @ slope
    # Typed as the rows, so that products are of the tensor cores.
    terms = [x.to(out.dtype) for x in (constant, *slopes)]
    usable = torch.stack([x.isfinite().all(dim=-1).all(dim=-1) for x in terms]).all(dim=0)
    terms = [torch.where(usable[..., None, None], x, 0) for x in terms]
    whole = None if exact.whole is None else exact.whole[..., None].expand(-1, -1, -1, out.shape[3])
    kept = None if whole is None else out.gather(2, whole)
    video = slice(exact.first, exact.first + exact.count)
    correct_rows(out[:, :, video], query[:, :, video], *terms)
    if whole is not None and kept is not None:
        out.scatter_(2, whole, kept)
    found = torch.where(valid[..., None], known, sparse.float()).to(out.dtype)
    out.scatter_(2, index.expand_as(found), found)


def correct_rows(
    out: Tensor, query: Tensor, constant: Tensor, by_output: Tensor, by_query: Tensor
) -> None:
    """Add `constant + out @ by_output + query @ by_query` to `out` in place, head by head.

    Args:
        out: `[B, H, N, D_v]`; any strides, as long as channels are neighbours.
        query: `[B, H, N, D]`, typed as `out`.
        constant: `[B, H, 1, D_v]`, typed as `out`.
        by_output: `[B, H, D_v, D_v]`, typed as `out`.
        by_query: `[B, H, D, D_v]`, typed as `out`.
    """
    _correct_rows(out, query, constant, by_output, by_query)


def _run(out: Tensor, query: Tensor, constant: Tensor, by_output: Tensor, by_query: Tensor) -> None:
    if _kernel_serves(out, query):
        from svg_attention.corrections import triton

        triton.correct_rows(out, query, constant, by_output, by_query)
        return
    for b, heads in _parts(out):
        rows = out[b, heads]
        change = torch.baddbmm(constant[b, heads], query[b, heads], by_query[b, heads])
        rows.add_(change.baddbmm_(rows, by_output[b, heads]))


def _kernel_serves(out: Tensor, query: Tensor) -> bool:
    """Return whether the kernel takes such rows."""
    return (
        out.dtype in (torch.float16, torch.bfloat16)
        and max(out.shape[3], query.shape[3]) <= MAX_KERNEL_WIDTH
        and out.stride(3) == query.stride(3) == 1
        and planner_for(out) == "triton"
    )


def _fake(*_: Tensor) -> None:
    return None


_correct_rows = define_op(
    "correct_rows",
    "(Tensor(a!) out, Tensor query, Tensor constant, Tensor by_output, Tensor by_query) -> ()",
    _run,
    _fake,
)


class _Features:
    """Rows `[B, H, M, D]`, centred and scaled to a mean energy of 1 over the valid ones.

    Attributes:
        rows: fp32, 0 where not valid.
        mean: fp32 `[B, H, 1, D]`.
    """

    def __init__(self, x: Tensor, valid: Tensor) -> None:
        x = torch.where(valid[..., None], x.float(), 0.0)
        count = valid.sum(dim=-1)[..., None, None].clamp(min=1)
        self.mean = x.sum(dim=2, keepdim=True) / count
        x = torch.where(valid[..., None], x - self.mean, 0.0)
        size = _largest(x)
        x = x / size
        root = (x.square().sum(dim=(2, 3), keepdim=True) / count).sqrt().clamp(min=1e-30)
        self.rows, self._size, self._root = x / root, size, root

    def slope(self, dual: Tensor) -> Tensor:
        """Return `[B, H, D, D_v]` with which given rows predict, from coefficients of rows."""
        return (self.rows / self._root).transpose(-1, -2) @ dual / self._size


def fit(rows: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Fit targets by ridge regression, scaled by how well each row is foretold by the others.

    Args:
        rows: fp32 `[B, H, M, F]`, features of mean energy near 1; a constant is added to them.
        targets: fp32 `[B, H, M, D]`, at most 1 in magnitude.
        valid: bool `[B, H, M]`; rows and targets are 0 where not.

    Returns:
        fp32 `[B, H, M, D]`: a row with the products `k` with `rows`, plus 1 for the constant, is
        predicted as `k @ result`.
    """
    # In fp64, since products of TF32, which a caller may have allowed, would not converge.
    constant = valid.double()[..., None]
    features = torch.cat([rows.double(), constant], dim=-1)
    gram = features @ features.transpose(-1, -2)
    count = valid.sum(dim=-1)[..., None, None].clamp(min=1)
    energy = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None] / count
    identity = torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    inverse = _inverse(gram + RIDGE * energy.clamp(min=1.0) * identity)
    dual = inverse @ targets.double()
    # Leaving a row out changes its residual by a known factor.
    foreseen = targets - dual / inverse.diagonal(dim1=-2, dim2=-1)[..., None]
    trust = reliance((foreseen * targets).sum(dim=-1), foreseen.square().sum(dim=-1))
    return (dual * trust[..., None, None]).float()


def _inverse(x: Tensor) -> Tensor:
    """Return the inverse of positive definite matrices by Newton's and Schulz' rounds.

    They are matrix products alone, which wait for no device and which a CUDA graph can hold.
    """
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    inverse = identity / x.abs().sum(dim=-1).amax(dim=-1)[..., None, None]
    for _ in range(ROUNDS):
        inverse = inverse @ (2 * identity - x @ inverse)
    return inverse


def _largest(x: Tensor) -> Tensor:
    """Return the largest magnitude of each head `[B, H, 1, 1]`, 1 where all is 0."""
    largest = x.abs().amax(dim=(2, 3), keepdim=True)
    return torch.where(largest > 0, largest, 1.0)


def _parts(out: Tensor) -> Iterator[tuple[int, slice]]:
    """Split batch items and heads so that the corrections of a part stay below `SCRATCH` bytes."""
    batch, heads, length, width = out.shape
    step = max(SCRATCH // max(length * width * out.itemsize, 1), 1)
    for b in range(batch):
        for first in range(0, heads, step):
            yield b, slice(first, min(first + step, heads))
