"""Block-sparse attention in plain torch: any device, easy to read, the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_kernels.attention.operands import TILE_ROWS, Operands

# Logits held at once: tiles of one head are computed in groups of about this many.
GROUP_LOGITS = 2**24


def block_sparse_attention(operands: Operands, out: Tensor, lse: Tensor | None) -> None:
    """Fill `out` and, unless None, `lse`; arithmetic is in fp32, or fp64 for fp64 inputs.

    Every tile is multiplied with every key, and what it does not read is masked.
    """
    query, key, value, starts, lengths, order, more_keys, more_values, weights, _, scale = operands
    batch, heads = query.shape[:2]
    group = heads // key.shape[1]
    for b in range(batch):
        for h in range(heads):
            rows = query[b, h]
            if order is not None:
                rows = rows[order[b, h].long()]
            keys, values = _wide(key[b, h // group]), _wide(value[b, h // group])
            mask = read_mask(starts[b, h], lengths[b, h], keys.shape[0])
            bias = torch.zeros(mask.shape, dtype=keys.dtype, device=keys.device)
            bias.masked_fill_(~mask, -torch.inf)
            if more_keys is not None and more_values is not None and weights is not None:
                keys = torch.cat((keys, _wide(more_keys[b, h // group])))
                values = torch.cat((values, _wide(more_values[b, h // group])))
                bias = torch.cat((bias, weights[b, h].to(bias.dtype)), dim=-1)
            result, denominator = _attend(_wide(rows), keys, values, bias, scale)
            if order is None:
                out[b, h] = result.to(out.dtype)
            else:
                out[b, h].index_copy_(0, order[b, h].long(), result.to(out.dtype))
            if lse is not None:
                places = slice(None) if order is None else order[b, h].long()
                lse[b, h, places] = denominator.to(lse.dtype)


def read_mask(run_starts: Tensor, run_lengths: Tensor, key_length: int) -> Tensor:
    """Return which key rows the runs `[..., R]` cover, bool `[..., key_length]`."""
    shape = (*run_starts.shape[:-1], key_length + 1)
    edges = torch.zeros(shape, dtype=torch.int32, device=run_starts.device)
    used = (run_lengths > 0).to(torch.int32)
    edges.scatter_add_(-1, run_starts.long(), used)
    edges.scatter_add_(-1, (run_starts + run_lengths).long(), -used)
    return edges.cumsum(dim=-1)[..., :key_length] > 0


def _attend(
    rows: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the outputs and log-sum-exps of `[S, D]` rows; `bias` is `[T, K]`, one row a tile."""
    outs, denominators = [], []
    step = max(GROUP_LOGITS // (keys.shape[0] * TILE_ROWS), 1)
    for first in range(0, bias.shape[0], step):
        part = rows[first * TILE_ROWS : (first + step) * TILE_ROWS]
        own = bias[first : first + step].repeat_interleave(TILE_ROWS, dim=0)[: part.shape[0]]
        logits = part @ keys.T * scale + own
        denominator = torch.logsumexp(logits, dim=-1)
        # A row that reads nothing: exp(-inf - 0) is 0, exp(-inf - -inf) is not a number.
        shift = denominator.masked_fill(denominator == -torch.inf, 0.0)
        outs.append(torch.exp(logits - shift[:, None]) @ values)
        denominators.append(denominator)
    return torch.cat(outs), torch.cat(denominators)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
