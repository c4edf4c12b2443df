"""Measuring, on sampled query rows, how well a head's attention survives a pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_attention.methods.band import Band
from svg_attention.plan import match_heads
from svg_attention.planner import device_prober

# Logits held at once, over all heads.
PROFILE_LOGITS = 2**26


def pattern_errors(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, bands: tuple[Band, ...], scale: float
) -> list[Tensor]:
    """Return the mean square error that each pattern makes on sampled rows.

    Compares softmax attention over all valid keys with softmax attention over the keys the
    pattern reads, in fp32. No mask larger than the sampled rows is ever made.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, H_kv, S, D]`.
        value: `[B, H_kv, S, D]`.
        rows: int64 `[N]`, video tokens.
        bands: patterns.
        scale: factor of the logits.

    Returns:
        One fp32 `[B, H]` per pattern.
    """
    layout, text = bands[0].layout, bands[0].text
    batch, heads, tokens, _ = query.shape
    place = torch.arange(tokens, device=query.device) - layout.text_start
    padding = (place >= text[:, None]) & (place < layout.text_tokens)
    planner = device_prober(query)
    if planner is not None and len(bands) == 2:
        sampled = query.index_select(2, rows + layout.video_start)
        reads = (~padding[:, None]).byte()
        for bit, band in zip((2, 4), bands, strict=True):
            reads = reads + bit * band.reads(rows).byte()
        return list(planner.pattern_errors(sampled, key, value, reads, scale=scale))
    keys = match_heads(key, heads).float().transpose(-1, -2)
    values = match_heads(value, heads).float()
    totals = [torch.zeros(batch, heads, device=query.device) for _ in bands]
    for part in rows.split(max(PROFILE_LOGITS // (batch * heads * tokens), 1)):
        sampled = query.index_select(2, part + layout.video_start).float() * scale
        logits = torch.matmul(sampled, keys).masked_fill(padding[:, None, None], -torch.inf)
        exact = torch.softmax(logits, dim=-1) @ values
        for total, band in zip(totals, bands, strict=True):
            masked = logits.masked_fill(~band.reads(part)[:, None], -torch.inf)
            error = torch.softmax(masked, dim=-1) @ values - exact
            total += error.square().sum(dim=(-1, -2))
    return [total / (len(rows) * value.shape[-1]) for total in totals]
