"""Block-sparse attention in plain torch: any device, easy to read, the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_kernels._arithmetic import widen
from svg_kernels.attention.operands import TILE_ROWS, Operands


def block_sparse_attention(operands: Operands, out: Tensor, lse: Tensor | None) -> None:
    """Fill `out` and, unless None, `lse`; arithmetic is in fp32, or fp64 for fp64 inputs.

    Every tile is multiplied with every key, and what it does not read is masked: neither its scores
    nor its values take part, whatever they are.
    """
    query, key, value, starts, lengths, order, more_keys, more_values, weights, _, scale = operands
    batch, heads = query.shape[:2]
    group = heads // key.shape[1]
    for b in range(batch):
        for h in range(heads):
            places = slice(None) if order is None else order[b, h].long()
            rows = widen(query[b, h][places])
            keys, values = widen(key[b, h // group]), widen(value[b, h // group])
            mask = read_mask(starts[b, h], lengths[b, h], keys.shape[0])
            bias = torch.zeros(mask.shape, dtype=keys.dtype, device=keys.device)
            if more_keys is not None and more_values is not None and weights is not None:
                keys = torch.cat((keys, widen(more_keys[b, h // group])))
                values = torch.cat((values, widen(more_values[b, h // group])))
                bias = torch.cat((bias, weights[b, h].to(bias.dtype)), dim=-1)
                mask = torch.cat((mask, weights[b, h] != -torch.inf), dim=-1)
            result, denominator = _attend(rows, keys, values, bias, mask, scale)
            out[b, h, places] = result.to(out.dtype)
            if lse is not None:
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
    rows: Tensor, keys: Tensor, values: Tensor, bias: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return outputs and log-sum-exps of `[S, D]` rows; `bias` and `mask` are `[T, K]`."""
    outs, denominators = [], []
    for part, own, read in zip(rows.split(TILE_ROWS), bias, mask, strict=True):
        logits = (part @ keys.T * scale + own).masked_fill(~read, -torch.inf)
        denominator = torch.logsumexp(logits, dim=-1)
        # A row that reads nothing: exp(-inf - 0) is 0, exp(-inf - -inf) is not a number.
        shift = denominator.masked_fill(denominator == -torch.inf, 0.0)
        weights = torch.exp(logits - shift[:, None])
        outs.append(weights @ values.masked_fill(~read[:, None], 0.0))
        denominators.append(denominator)
    return torch.cat(outs), torch.cat(denominators)
