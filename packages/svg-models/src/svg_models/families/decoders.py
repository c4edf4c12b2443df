"""What stands between the convolutions of a VAE's decoder, by kernels of svg-kernels.

As `blocks` does for a transformer. A decoder of diffusers reads and writes its hidden states once
for a norm's moments, again for the norm, for the activation, for each padding and for the layout
that convolutions compute in; here they are written once as the convolution reads them. Modules that
hold weights of convolutions and of products are called, so that LoRA, quantised layers and
offloading keep working; one is read where nothing stands around it and the norm behind it can add
its bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from svg_models.families import fused
from svg_models.families.blocks import BlockRule, find_blocks
from svg_models.families.products import holds_plain_weights

__all__ = ["BLENDS", "blend", "find_decoder_blocks"]

BLENDS = {"blend_t": -3, "blend_v": -2, "blend_h": -1}
"""Methods by which VAEs of diffusers blend neighbouring tiles, and along which axis."""

_HAVE_FLOAT64 = ("cpu", "cuda")  # of the others, some compute in float32 at most


def find_decoder_blocks(vae: Any) -> list[tuple[nn.Module, BlockRule]]:
    """Return each block of a VAE's decoder that a rule computes, with its rule.

    Args:
        vae: the VAE of a pipeline; None or one that no rule covers has no such block.
    """
    decoder = getattr(vae, "decoder", None)
    return find_blocks(decoder, HUNYUAN_VIDEO_DECODER) if isinstance(decoder, nn.Module) else []


def blend(a: Tensor, b: Tensor, blend_extent: int, *, axis: int) -> Tensor:
    """Blend the beginning of a tile with the end of the one before it, bit for bit as diffusers.

    Its VAEs do so row by row, four launches each.

    Args:
        a: the tile before, `[B, C, T, H, W]`.
        b: the tile, of the same size but along `axis`; what is blended is written to it.
        blend_extent: positions that they share, unless one has fewer.
        axis: along which they are neighbours.

    Returns:
        `b`.
    """
    extent = min(a.shape[axis], b.shape[axis], blend_extent)
    if extent <= 0:
        return b
    shape = [extent if n == axis % b.ndim else 1 for n in range(b.ndim)]
    device = b.device if b.device.type in _HAVE_FLOAT64 else "cpu"
    share = (torch.arange(extent, dtype=torch.float64, device=device) / extent).view(shape)
    end = a.narrow(axis, a.shape[axis] - extent, extent)
    begin = b.narrow(axis, 0, extent)
    # Each product is rounded as that with a number is, which is taken in float32 at least.
    wide = torch.promote_types(b.dtype, torch.float32)
    parts = ((end, 1 - share), (begin, share))
    first, second = ((x * part.to(b.device, wide)).to(b.dtype) for x, part in parts)
    begin.copy_(first + second)
    return b


def residual_block(block: Any, hidden_states: Tensor) -> Tensor:
    """Compute two convolutions, each of what a norm and an activation leave, and their residual."""
    first = block.conv1.conv
    bare = _is_bare(first, hidden_states)  # the norm behind it adds the bias on its way
    states = _convolve(block.conv1, hidden_states, block.norm1, bare=bare)
    states = _convolve(block.conv2, states, block.norm2, offset=first.bias if bare else None)
    if block.conv_shortcut is None:
        return states + hidden_states
    return states + _convolve(block.conv_shortcut, hidden_states)


def upsampling_block(block: Any, hidden_states: Tensor) -> Tensor:
    """Repeat positions, the first frame in space alone, and convolve them."""
    upsample = [int(factor) for factor in block.upsample_factor]
    return _convolve(block.conv, hidden_states, upsample=upsample)


def middle_block(block: Any, hidden_states: Tensor) -> Tensor:
    """Compute residual blocks around attention of each frame to those up to it."""
    states = block.resnets[0](hidden_states)
    for attention, residual in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            states = _attend_by_frames(attention, states)
        states = residual(states)
    out: Tensor = states
    return out


def decoder(module: Any, hidden_states: Tensor) -> Tensor:
    """Compute the blocks one after the other, and a norm and a convolution behind them."""
    states = module.mid_block(module.conv_in(hidden_states))
    for block in module.up_blocks:
        states = block(states)
    return _convolve(module.conv_out, states, module.conv_norm_out).contiguous()


def _convolve(
    causal: Any,
    states: Tensor,
    norm: Any = None,
    *,
    offset: Tensor | None = None,
    bare: bool = False,
    upsample: Sequence[int] = (1, 1, 1),
) -> Tensor:
    """Call a causal convolution's own with what it reads.

    Args:
        causal: the convolution and its padding.
        states: `[B, C, T, H, W]`.
        norm: group norm, behind which an activation stands; None if neither does.
        offset: added before the norm.
        bare: whether to leave out the bias of the convolution, which `_is_bare`.
        upsample: see `svg_kernels.conv_input`.
    """
    import svg_kernels

    norms: dict[str, Any] = {}
    if norm is not None:
        weights = {"weight": norm.weight, "bias": norm.bias}
        norms = {**weights, "groups": norm.num_groups, "eps": norm.eps, "silu": True}
        norms["offset"] = offset
    padding = causal.time_causal_padding
    if norms or any(padding) or max(upsample) > 1:  # a shortcut reads its input as it is
        states = svg_kernels.conv_input(states, upsample=upsample, padding=padding, **norms)
    out: Tensor = F.conv3d(states, causal.conv.weight) if bare else causal.conv(states)
    return out


def _is_bare(convolution: Any, states: Tensor) -> bool:
    """Return whether a convolution is a product with its weight and a bias, nothing around it."""
    return (
        type(convolution) is nn.Conv3d
        and fused.is_untouched(convolution)
        and convolution.stride == convolution.dilation == (1, 1, 1)
        and convolution.padding == (0, 0, 0)
        and convolution.groups == 1
        and holds_plain_weights(convolution, states)
    )


def _attend_by_frames(attention: Any, states: Tensor) -> Tensor:
    """Let each frame attend to those up to it, which needs no mask of all pairs of positions."""
    frames, height, width = states.shape[2:]
    rows = states.permute(0, 2, 3, 4, 1).flatten(1, 3)
    normed = attention.group_norm(rows.transpose(1, 2)).transpose(1, 2)
    layers = (attention.to_q, attention.to_k, attention.to_v)
    query, key, value = (
        layer(normed).unflatten(2, (attention.heads, -1)).transpose(1, 2) for layer in layers
    )
    out, size = torch.empty_like(query), height * width
    for frame in range(frames):
        here, end = slice(frame * size, (frame + 1) * size), (frame + 1) * size
        out[:, :, here] = F.scaled_dot_product_attention(
            query[:, :, here], key[:, :, :end], value[:, :, :end]
        )
    rows = rows + attention.to_out[0](out.transpose(1, 2).flatten(2))
    return rows.unflatten(1, (frames, height, width)).permute(0, 4, 1, 2, 3)


def _attends_plainly(attention: Any) -> bool:
    """Return whether attention does what `_attend_by_frames` does, beside its mask."""
    return (
        type(attention) is Attention
        and type(attention.processor) is AttnProcessor2_0
        and fused.is_untouched(attention)
        and attention.residual_connection
        and attention.rescale_output_factor == 1
        and attention.scale == (attention.inner_dim // attention.heads) ** -0.5
        and attention.spatial_norm is None
        and attention.norm_q is None
        and attention.norm_k is None
        and not attention.norm_cross
        and _passes_on(attention.to_out[1])
    )


def _passes_on(dropout: Any) -> bool:
    """Return whether a dropout, or what stands in its place, returns what it is given."""
    nothing = type(dropout) is nn.Identity and fused.is_untouched(dropout)
    return nothing or fused.drops_nothing(dropout)


def _replicates(*convolutions: Any) -> bool:
    """Return whether convolutions pad as `svg_kernels.conv_input` does."""
    return all(causal.pad_mode == "replicate" for causal in convolutions)


def _convolutions(block: Any) -> tuple[nn.Module, ...]:
    shortcut = () if block.conv_shortcut is None else (block.conv_shortcut,)
    return (block.conv1, block.conv2, *shortcut)


def _suits_residual(block: Any) -> bool:
    return (
        type(block.nonlinearity) is nn.SiLU
        and _passes_on(block.dropout)
        and _replicates(*_convolutions(block))
    )


def _attentions(block: Any) -> list[Any]:
    return [attention for attention in block.attentions if attention is not None]


HUNYUAN_VIDEO_DECODER = (
    BlockRule(
        blocks=("HunyuanVideoResnetBlockCausal3D",),
        norms=lambda block: (block.norm1, block.norm2, block.nonlinearity, *_convolutions(block)),
        forward=residual_block,
        suits=_suits_residual,
    ),
    BlockRule(
        blocks=("HunyuanVideoUpsampleCausal3D",),
        norms=lambda block: (block.conv,),
        forward=upsampling_block,
        suits=lambda block: _replicates(block.conv),
    ),
    BlockRule(
        blocks=("HunyuanVideoMidBlock3D",),
        norms=lambda block: tuple(attention.group_norm for attention in _attentions(block)),
        forward=middle_block,
        suits=lambda block: all(map(_attends_plainly, _attentions(block))),
    ),
    BlockRule(
        blocks=("HunyuanVideoDecoder3D",),
        norms=lambda module: (module.conv_norm_out, module.conv_act, module.conv_out),
        forward=decoder,
        suits=lambda module: type(module.conv_act) is nn.SiLU and _replicates(module.conv_out),
    ),
)
