"""The steps around attention that processors put together: project, make heads, project back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from svg_models.families import fused
from svg_models.families.products import Projection, project_joined

__all__ = [
    "ACROSS_HEADS",
    "PER_HEAD",
    "PER_HEAD_IN_HALVES",
    "HeadRule",
    "Stream",
    "Values",
    "join",
    "join_streams",
    "make_heads",
    "make_joint_heads",
    "project_out",
    "project_qkv",
    "rotate_pairs",
    "split_heads",
]


Values = Callable[[], Tensor]
"""Computes values when they are needed: last, when queries and keys may be on their way already."""


def project_qkv(attn: Any, *streams: Tensor) -> tuple[Tensor, Tensor, Values]:
    """Project tokens to query, key and value, each `[B, S, H * D]`, by one or three layers.

    Calls modules, so LoRA, quantised layers and offloading keep working; `products` says when the
    layer of the values may be read instead.

    Args:
        attn: the attention module.
        *streams: one `[B, S, C]`, or two, joined in this order.

    Returns:
        Query, key, and what computes the value.
    """
    states = streams[0] if len(streams) == 1 else join_streams(*streams)
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_qkv(states).chunk(3, dim=-1)
        return query, key, lambda: value
    return attn.to_q(states), attn.to_k(states), Projection(attn.to_v, states)


def join_streams(first: Tensor, second: Tensor) -> Tensor:
    """Return two streams, `[B, S_i, C]`, in one tensor.

    They are not copied where they are neighbours in one already, as the two parts are into which a
    block took it; under `torch.compile`, or where a gradient is needed, they always are.
    """
    batch, tokens, width = first.shape
    whole = (batch, tokens + second.shape[1], width)
    strides = (whole[1] * width, width, 1)
    if (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(first) is type(second) is Tensor
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.dtype == second.dtype
        and second.shape == (batch, second.shape[1], width)
        and first.stride() == second.stride() == strides
        and second.storage_offset() == first.storage_offset() + tokens * width
    ):
        # The very tensor, where torch knows it: fp8 layers round one tensor once.
        base = first._base
        if (
            base is not None
            and base is second._base
            and base.shape == whole
            and base.stride() == strides
            and base.storage_offset() == first.storage_offset()
        ):
            return base
        return first.as_strided(whole, strides)
    return torch.cat((first, second), dim=1)


def split_heads(states: Tensor, heads: int) -> Tensor:
    """View `[B, S, H * D]` as `[B, S, H, D]`."""
    return states.unflatten(2, (heads, -1))


def rotate_pairs(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels of `[B, S, H, D]` by their position's angle.

    `y[2i] = x[2i] cos - x[2i+1] sin`, `y[2i+1] = x[2i] sin + x[2i+1] cos`, multiplied in the wider
    of both dtypes and rounded once, in diffusers' order of operations, so that the bits agree.

    Args:
        states: `[B, S, H, D]`.
        cos: `[1, S, 1, D]`, each angle's value twice.
        sin: as `cos`.

    Returns:
        Tensor shaped and typed as `states`.
    """
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(states)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def rotate_neighbours(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate as `rotate_pairs` does, by diffusers' shared function; tables are `[S, D]`."""
    out: Tensor = apply_rotary_emb(states, (cos, sin), sequence_dim=1)
    return out


def rotate_halves(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel `i` with `i + D / 2` by diffusers' shared function; tables are `[S, D]`."""
    out: Tensor = apply_rotary_emb(states, (cos, sin), use_real_unbind_dim=-2, sequence_dim=1)
    return out


@dataclass(frozen=True, kw_only=True)
class HeadRule:
    """How a model makes heads of the queries and keys that it has projected.

    Attributes:
        rotate: rotates `[B, S, H, D]` by cosines and sines as the original processor does.
        pairing: which two channels that rotates together, in the words of `svg_kernels.rope`.
        across_heads: whether a norm spans all heads, or takes each by itself.
    """

    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotate_neighbours
    pairing: fused.Pairing = "interleaved"
    across_heads: bool = False


ACROSS_HEADS = HeadRule(rotate=rotate_pairs, across_heads=True)
PER_HEAD = HeadRule()
PER_HEAD_IN_HALVES = HeadRule(rotate=rotate_halves, pairing="half")


def make_heads(
    rule: HeadRule,
    heads: int,
    norms: tuple[Any, Any],
    projected: tuple[Tensor, Tensor, Values],
    rotation: tuple[Tensor, Tensor] | None,
    *,
    text_before: int = 0,
    text_after: int = 0,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Values]:
    """Normalise queries and keys, split all three into heads, and rotate the video tokens.

    On a GPU that svg-kernels serves, one kernel does all that it can stand for, see `fused`; what
    is left, and everything elsewhere, is done as the original processor does it, to the bit.

    Args:
        rule: of the model.
        heads: H.
        norms: the modules that normalise queries and keys, or None for one that is not there.
        projected: query and key, `[B, S, H * D]`, and what computes the value.
        rotation: cosines and sines of the video tokens; None if they are not rotated.
        text_before: text tokens in front of the video.
        text_after: text tokens behind the video.
        out: where a kernel that does all writes queries and keys, see `fused.norm_rope`.

    Returns:
        Query and key, `[B, S, H, D]`, and what computes the value.
    """
    query, key, values = projected
    video = slice(text_before, query.shape[1] - text_after)
    both = fused.norm_rope(
        query, key, norms, heads, rotation, video,
        across_heads=rule.across_heads, pairing=rule.pairing, out=out,
    )  # fmt: skip
    if both is None:
        query = _normalised(rule, heads, norms[0], query)
        key = _normalised(rule, heads, norms[1], key)
        both = (query, key) if rotation is None else _rotated(rule, query, key, rotation, video)
    return *both, lambda: split_heads(values(), heads)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Tokens of a call that have layers of their own.

    Attributes:
        norms: the modules that normalise queries and keys, or None for one that is not there.
        projected: query and key, `[B, S, H * D]`, and what computes the value.
        rotation: cosines and sines of the tokens; None if they are not rotated.
    """

    norms: tuple[Any, Any]
    projected: tuple[Tensor, Tensor, Values]
    rotation: tuple[Tensor, Tensor] | None = None


def make_joint_heads(
    rule: HeadRule, heads: int, first: Stream, second: Stream
) -> tuple[Tensor, Tensor, Values]:
    """Make the heads of two streams, joined along the tokens.

    Where one kernel makes the heads, and a plain product the values, those of both streams are
    written into one tensor; otherwise they are joined by a copy.

    Args:
        rule: of the model.
        heads: H.
        first: its tokens stand first.
        second: its tokens stand behind them.

    Returns:
        As `make_heads`.
    """
    streams, like = (first, second), first.projected[0]
    if all(_in_one_kernel(rule, heads, stream, like) for stream in streams):
        counts = [stream.projected[0].shape[1] for stream in streams]
        dim = like.shape[2] // heads
        query, key = (like.new_empty(like.shape[0], heads, sum(counts), dim) for _ in range(2))
        outs = zip(query.split(counts, dim=2), key.split(counts, dim=2), strict=True)
        for stream, out in zip(streams, outs, strict=True):
            make_heads(rule, heads, stream.norms, stream.projected, stream.rotation, out=out)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    else:
        (*before, _), (*behind, _) = (
            make_heads(rule, heads, stream.norms, stream.projected, stream.rotation)
            for stream in streams
        )
        query, key = (join(*both) for both in zip(before, behind, strict=True))
    values = [stream.projected[2] for stream in streams]
    return query, key, lambda: split_heads(project_joined(*values), heads)


def _in_one_kernel(rule: HeadRule, heads: int, stream: Stream, like: Tensor) -> bool:
    """Return whether `make_heads` can write the heads of a stream beside those of others."""
    query, key, _ = stream.projected
    return (
        not torch.compiler.is_compiling()
        and query.dtype == like.dtype
        and fused.takes_norm_rope(
            query, key, stream.norms, heads, stream.rotation, slice(0, query.shape[1]),
            across_heads=rule.across_heads,
        )
    )  # fmt: skip


def _normalised(rule: HeadRule, heads: int, norm: Any, states: Tensor) -> Tensor:
    if norm is None:
        return split_heads(states, heads)
    if rule.across_heads:
        return split_heads(norm(states), heads)
    normalised: Tensor = norm(split_heads(states, heads))
    return normalised


def _rotated(
    rule: HeadRule, query: Tensor, key: Tensor, rotation: tuple[Tensor, Tensor], video: slice
) -> tuple[Tensor, Tensor]:
    both = fused.rope(query, key, rotation, video, pairing=rule.pairing)
    if both is not None:
        return both
    query, key = (_rotated_alone(rule, states, rotation, video) for states in (query, key))
    return query, key


def _rotated_alone(
    rule: HeadRule, states: Tensor, rotation: tuple[Tensor, Tensor], video: slice
) -> Tensor:
    if video.stop - video.start == states.shape[1]:
        return rule.rotate(states, *rotation)
    states[:, video] = rule.rotate(states[:, video], *rotation)
    return states


def join(video: Tensor, text: Tensor) -> Tensor:
    """Join the heads of two streams, `[B, S, H, D]`, along the tokens.

    Keeps the memory order of the video, so that whole rows of it are copied.
    """
    by_head = video.transpose(1, 2)
    if by_head.is_contiguous():
        return torch.cat((by_head, text.transpose(1, 2)), dim=2).transpose(1, 2)
    return torch.cat((video, text), dim=1)


def project_out(attn: Any, states: Tensor) -> Tensor:
    """Join the heads of `[B, S, H, D]` and apply the output projection."""
    states = attn.to_out[0](states.flatten(2, 3))
    out: Tensor = attn.to_out[1](states)
    return out
