"""Rows whose exact outputs correct others: probes among the rows of a plan, and a few rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from svg_attention.methods.call import AttentionCall
from svg_attention.plan import ExactRows
from svg_attention.tiles import TILE_ROWS, match_heads


def probe_places(count: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which row stands at each position, and which probe.

    Behind every `rows - 1` rows stands their probe, and the last probe behind what is left.

    Args:
        count: rows, at least 1.
        rows: positions of a probe and its rows, at least 2.
        device: of the result.

    Returns:
        int64 `[count + P]` twice, `P = ceil(count / (rows - 1))`: the row, at a probe's position
        one from the middle of its rows; and the probe, -1 at a row's position.
    """
    probes = -(-count // (rows - 1))
    place = torch.arange(count + probes, device=device)
    group = place // rows
    is_probe = (place % rows == rows - 1) | (place == count + probes - 1)
    own = (count - group * (rows - 1)).clamp(max=rows - 1)
    row = torch.where(is_probe, group * (rows - 1) + own // 2, place - group)
    return row, torch.where(is_probe, group, -1)


def probed_order(call: AttentionCall, video_order: Tensor, probe: Tensor) -> Tensor:
    """Return the canonical plan order of queries with probes among them: int32 `[B, H, S + P]`.

    Args:
        call: the call.
        video_order: int32 `[B, H, count + P]`, the row at each position, counted from the first
            video token.
        probe: int64 `[count + P]` from `probe_places`.
    """
    layout = call.layout
    tokens = torch.where(probe < 0, video_order + layout.video_start, layout.tokens + probe)
    text = torch.arange(layout.text_tokens, device=call.device) + layout.text_start
    text = text.expand(*video_order.shape[:2], -1)
    return torch.cat([tokens, text], dim=-1).to(torch.int32)


def attend_text(call: AttentionCall, probes: Tensor, outputs: Tensor, lse: Tensor) -> Tensor:
    """Return the attention of probes to every valid key, from that to every video key.

    Args:
        call: the call.
        probes: `[B, H, P, D]`.
        outputs: fp32 `[B, H, P, D_v]`, attention to the video keys.
        lse: fp32 `[B, H, P]`, natural logarithm of its denominators.
    """
    layout = call.layout
    if not layout.text_tokens:
        return outputs
    text = slice(layout.text_start, layout.text_start + layout.text_tokens)
    keys, values = (match_heads(x[:, :, text], call.heads).float() for x in (call.key, call.value))
    logits = probes.float() @ keys.transpose(-1, -2) * call.scale
    place = torch.arange(layout.text_tokens, device=call.device)
    logits = logits.masked_fill(place >= call.valid_text()[:, None, None, None], -torch.inf)
    whole = torch.logaddexp(lse, torch.logsumexp(logits, dim=-1))[..., None]
    return outputs * (lse[..., None] - whole).exp() + (logits - whole).exp() @ values


def exact_rows(call: AttentionCall, count: int, order: Tensor, places: Tensor) -> ExactRows:
    """Compute the exact outputs of a few video rows of each head, spread evenly over their order.

    Args:
        call: the call.
        count: rows of a head, at most the video tokens.
        order: int32 `[B, H, N]`, video rows sorted by cluster, counted from the first video token.
        places: int32 `[B, H, P]`, the video row at each position of the plan.
    """
    layout = call.layout
    every = layout.video_tokens / count
    chosen = ((torch.arange(count, device=call.device) + 0.5) * every).long()
    tokens = order[:, :, chosen].long() + layout.video_start
    index = tokens[..., None].expand(-1, -1, -1, call.query.shape[3])
    mask = None
    if call.text_lengths is not None and layout.text_tokens:
        place = torch.arange(layout.tokens, device=call.device) - layout.text_start
        text = (place >= 0) & (place < layout.text_tokens)
        mask = (~text | (place < call.valid_text()[:, None]))[:, None, None]
    outputs = F.scaled_dot_product_attention(
        call.query.gather(2, index),
        call.key,
        call.value,
        attn_mask=mask,
        scale=call.scale,
        enable_gqa=call.key.shape[1] != call.heads,
    )
    whole = None
    shared = places.shape[2] % TILE_ROWS
    if layout.text_tokens and shared:
        # These rows are in a tile with text, which reads everything.
        whole = places[:, :, -shared:].long() + layout.video_start
    return ExactRows(
        tokens=tokens,
        outputs=outputs,
        first=layout.video_start,
        count=layout.video_tokens,
        whole=whole,
    )
