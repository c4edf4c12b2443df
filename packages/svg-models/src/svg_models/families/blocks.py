"""What stands between the matrix products of a transformer block, by kernels of svg-kernels.

Each function computes a whole block as its class in diffusers does, but reads and writes the hidden
states once where the class does so for every sum, product and conversion. Modules that hold weights
for a matrix product are called, so LoRA, quantised layers and offloading keep working, and read
only where `products.is_product` says that it comes to the same; norms, which are read, must be
plain. A `BlockRule` says which those are: where one is not, or where the kernels do not serve a
tensor, the class itself computes the block.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d
from diffusers.models.normalization import (
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    CogVideoXLayerNormZero,
    FP32LayerNorm,
    RMSNorm,
)
from diffusers.models.transformers.transformer_cosmos import CosmosAdaLayerNormZero
from torch import Tensor, nn

from svg_models.copies import copy_bits
from svg_models.families import fused
from svg_models.families.feed_forward import feed_forward
from svg_models.families.fp8_rows import Fp8Rows, reads_fp8_rows
from svg_models.families.handover import Beginning
from svg_models.families.instance_forward import InstanceForward
from svg_models.families.products import gelu_product, is_product
from svg_models.families.steps import join_streams, split_heads

__all__ = [
    "COGVIDEOX_BLOCKS",
    "COSMOS_BLOCKS",
    "HUNYUAN_VIDEO_BLOCKS",
    "LTX_BLOCKS",
    "WAN_BLOCKS",
    "BlockRule",
    "FusedForward",
    "find_blocks",
]

Streams = tuple[Tensor, Tensor]
_MODULATIONS = (
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    CogVideoXLayerNormZero,
    CosmosAdaLayerNormZero,
)
_NORMS = (nn.LayerNorm, FP32LayerNorm, nn.RMSNorm, RMSNorm, nn.GroupNorm)
_READ = (*_NORMS, nn.Identity, nn.GELU, nn.SiLU, HunyuanVideoCausalConv3d, *_MODULATIONS)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class BlockRule:
    """How blocks of some classes are computed by fewer passes over their hidden states.

    Attributes:
        blocks: names of the classes.
        norms: returns the modules whose work the kernels do: norms, and modules around them.
        forward: computes the block; takes it and what its class's `forward` takes.
        suits: returns whether a block whose `norms` are plain is one that `forward` computes, where
            its class leaves that to its settings.
    """

    blocks: tuple[str, ...]
    norms: Callable[[Any], tuple[nn.Module, ...]]
    forward: Callable[..., Any]
    suits: Callable[[Any], bool] = lambda block: True

    def takes(self, block: Any) -> bool:
        """Return whether a block of these classes is computed by the rule as it is now."""
        return all(_is_plain(norm) for norm in self.norms(block)) and self.suits(block)


def find_blocks(module: nn.Module, rules: Sequence[BlockRule]) -> list[tuple[nn.Module, BlockRule]]:
    """Return each block in a module that a rule computes, with its rule."""
    return [
        (block, rule)
        for block in module.modules()
        for rule in rules
        if type(block).__name__ in rule.blocks
    ]


class FusedForward(InstanceForward):
    """The `forward` of one block instance while a run is on; afterwards what its class does.

    It is an attribute of the block, as hooks of diffusers and accelerate are. It holds the block
    weakly, so that it makes no circle, and a deep copy of the block gets one that is switched off.

    Args:
        block: the block.
        rule: how to compute it.
    """

    def __init__(self, block: nn.Module, rule: BlockRule | None) -> None:
        super().__init__(block, rule)
        self.rule = rule
        self.beginning = Beginning()
        self._next: weakref.ref[FusedForward] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the block; takes and returns what its class's `forward` does."""
        block, rule = self._module(), self.rule
        # A compiler fuses these steps itself, into one graph with the rest of the block.
        if (
            rule is None
            or torch.compiler.is_compiling()
            or not fused.serves_tensor(args[0] if args else kwargs["hidden_states"])
            or not rule.takes(block)
        ):
            if not torch.compiler.is_compiling():
                self.beginning.drop()
            return self._plain(block, *args, **kwargs)
        return rule.forward(block, *args, **kwargs)

    @classmethod
    def install(cls, block: nn.Module, rule: BlockRule) -> FusedForward | None:
        """Put one into a block; leave a block alone over which something else has put itself.

        Hooks of torch stay around it, as they are around the `forward` of the class.
        """
        own = cls.at(block)
        if own is not None and own.rule is None:
            del block.forward  # of a run that has ended
        if fused.is_wrapped(block) or fused.has_own_forward(block):
            return None
        forward = cls.of(block, rule)
        forward.put()
        return forward

    @classmethod
    def install_all(cls, found: Iterable[tuple[nn.Module, BlockRule]]) -> list[FusedForward]:
        """Put one into each block that `find_blocks` has found; return those that are in."""
        installed = [cls.install(block, rule) for block, rule in found]
        for forward, following in pairwise((*installed, None)):
            if forward is not None:
                forward._next = None if following is None else weakref.ref(following)
        return [forward for forward in installed if forward is not None]

    def following(self, states: Tensor, modulation: Tensor) -> tuple[Any, Beginning] | None:
        """Return the block that the next call is of, by the same rule, and where it looks first.

        None where there is none, or where it may not be known what it begins with.

        Args:
            states: like what it begins with.
            modulation: what its scale and shift are made from.
        """
        forward = None if self._next is None else self._next()
        block, own = (None if f is None else f._module() for f in (forward, self))
        if (
            forward is None
            or block is None
            or own is None
            or own._forward_hooks  # which may write to what the block returns
            or forward.rule is not self.rule
            or forward.rule is None
            or not forward.beginning.wanted
            or FusedForward.at(block) is not forward
            or fused.is_hooked(block)
            or block._compiled_call_impl is not None
            or states.is_inference()  # counts no changes
            or modulation.is_inference()
            or not forward.rule.takes(block)
        ):
            return None
        return block, forward.beginning

    def switch_on(self, settings: BlockRule) -> None:
        """Compute the block by a rule from now on."""
        self.rule = settings

    def switch_off(self) -> None:
        """Compute the block as its class does from now on."""
        self.rule = self._next = None
        self.beginning.clear()


def wan_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Compute a block of Wan or SkyReels V2; modulation is `[B, 6, C]`, or a row for each token."""
    # Where something has put itself over it since, no block leaves anything to another.
    forward = FusedForward.at(block) or FusedForward(block, None)
    modulation = _wan_modulation(block, temb)

    def begin() -> Any:  # returns what nobody holds once attention has read it
        begun = forward.beginning.take(hidden_states, temb)
        return _begin_wan(block, hidden_states, modulation) if begun is None else begun

    states, fed, gate = _wan_steps(
        block, hidden_states, encoder_hidden_states, modulation, rotary_emb, attention_mask, begin
    )
    # Modulation of each token is several times as large as the states that one pass less reads, and
    # the next block computes it again.
    following = forward.following(states, temb) if temb.ndim == 3 else None
    if following is None or not _has_table(following[0], states):
        return _gate(states, fed, gate)
    # As the next block would begin.
    block, beginning = following
    shift, scale, *_ = _wan_modulation(block, temb)
    states, normed = _gate_and_norm(
        block.norm1, states, fed, gate, scale, shift, reader=block.attn1
    )
    beginning.leave(normed, states, temb)
    return states


def _has_table(block: Any, states: Tensor) -> bool:
    """Return whether a block has the table of its modulation beside states.

    Whatever is around a block (FSDP, code that swaps blocks) may bring it only for its call.
    """
    table = block._parameters.get("scale_shift_table")
    return (
        type(table) is nn.Parameter
        and table.device == states.device
        and table.shape == (1, 6, states.shape[2])
    )


def _wan_modulation(block: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """Return what the norms and residuals of a block are modulated by, for all tokens or each."""
    if temb.ndim == 4:
        # Wan 2.2 5B counts tokens before the six, SkyReels' diffusion forcing behind them.
        axis = 2 if temb.shape[2] == 6 else 1
        table = block.scale_shift_table.unsqueeze(0 if axis == 2 else 2)
        parts: tuple[Tensor, ...] = (table + temb.float()).unbind(axis)
        return parts
    parts = (block.scale_shift_table + temb.float()).split(1, dim=1)
    return parts


def vace_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    control_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
) -> tuple[Tensor | None, Tensor]:
    """Compute a control block of Wan VACE."""
    states = control_hidden_states
    if block.proj_in is not None:
        states = block.proj_in(states) + hidden_states
    modulation = (block.scale_shift_table.to(temb.device) + temb.float()).split(1, dim=1)
    steps = _wan_steps(
        block, states, encoder_hidden_states, modulation, rotary_emb, None,
        lambda: _begin_wan(block, states, modulation),
    )  # fmt: skip
    states = _gate(*steps)
    return None if block.proj_out is None else block.proj_out(states), states


def _begin_wan(block: Any, states: Tensor, modulation: tuple[Tensor, ...]) -> Any:
    """Return the norm with which a block begins."""
    shift, scale, *_ = modulation
    return _modulate(block.norm1, states, scale, shift, reader=block.attn1)


def _wan_steps(
    block: Any,
    states: Tensor,
    text: Tensor,
    modulation: tuple[Tensor, ...],
    rotation: Any,
    mask: Tensor | None,
    begin: Callable[[], Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states before the last sum of a block, what is added, and its gate."""
    _, _, gate, ff_shift, ff_scale, ff_gate = modulation
    attended = block.attn1(begin(), None, mask, rotation)
    if isinstance(block.norm2, nn.Identity):
        states = across = _gate(states, attended, gate)
    else:
        states, across = _gate_and_norm(block.norm2, states, attended, gate, reader=block.attn2)
    across = block.attn2(across, text, None, None)
    states, normed = _gate_and_norm(
        block.norm3, states, across, None, ff_scale, ff_shift, reader=block.ffn
    )
    return states, feed_forward(block.ffn, normed), ff_gate


def dual_stream_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Any = None,
    *_: Any,
    **__: Any,
) -> Streams:
    """Compute a block of HunyuanVideo (1.0 or 1.5) that has layers of its own for the text."""
    video, text = hidden_states, encoder_hidden_states
    norms, gates, feeds = [], [], []
    for norm, states in ((block.norm1, video), (block.norm1_context, text)):
        shift, scale, gate, *feed = norm.linear(norm.silu(temb)).chunk(6, dim=1)
        norms.append(_modulate(norm.norm, states, scale, shift))
        gates.append(gate)
        feeds.append(feed)
    attended = block.attn(
        hidden_states=norms[0],
        encoder_hidden_states=norms[1],
        attention_mask=attention_mask,
        image_rotary_emb=freqs_cis,
    )
    out = []
    layers = ((block.norm2, block.ff), (block.norm2_context, block.ff_context))
    streams = zip((video, text), attended, gates, feeds, layers, strict=True)
    for states, attention, gate, (shift, scale, ff_gate), (norm, feed) in streams:
        states, normed = _gate_and_norm(norm, states, attention, gate, scale, shift, reader=feed)
        out.append(_gate(states, feed_forward(feed, normed), ff_gate))
    return out[0], out[1]


def single_stream_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    *_: Any,
    **__: Any,
) -> Streams:
    """Compute a block of HunyuanVideo whose feed-forward stands beside its attention.

    The two streams that the block before it returned are one tensor already.
    """
    text = encoder_hidden_states.shape[1]
    states = join_streams(hidden_states, encoder_hidden_states)
    shift, scale, gate = block.norm.linear(block.norm.silu(temb)).chunk(3, dim=1)
    normed = _modulate(block.norm.norm, states, scale, shift)

    def attend() -> Streams:
        out: Streams = block.attn(
            hidden_states=normed[:, :-text],
            encoder_hidden_states=normed[:, -text:],
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        return out

    plain = all(is_product(layer, normed) for layer in (block.proj_mlp, block.proj_out))
    by = _sum_of_products if plain and block.act_mlp.approximate == "tanh" else _joint_product
    states = _gate(states, by(block, normed, attend), gate)
    return states[:, :-text], states[:, -text:]


def _sum_of_products(block: Any, normed: Tensor, attend: Callable[[], Streams]) -> Tensor:
    """Project what attention and feed-forward return one after the other.

    The class writes both side by side for one product, a copy of each. The wide one is not in
    memory before attention has returned.
    """
    weight, width = block.proj_out.weight.t(), normed.shape[2]
    attended = join_streams(*attend()).flatten(0, 1)
    out = torch.addmm(block.proj_out.bias, attended, weight[:width])
    del attended
    out.addmm_(gelu_product(block.proj_mlp, normed).flatten(0, 1), weight[width:])
    return out.unflatten(0, normed.shape[:2])


def _joint_product(block: Any, normed: Tensor, attend: Callable[[], Streams]) -> Tensor:
    """Project what both return, written side by side at once; the class joins three times."""
    projected, width = block.proj_mlp(normed), normed.shape[2]
    both = projected.new_empty(*projected.shape[:2], width + projected.shape[2])
    _activate(block.act_mlp, projected, both[..., width:])
    del projected
    attended = join_streams(*attend()).type_as(both)
    copy_bits(*(split_heads(x, block.attn.heads) for x in (both[..., :width], attended)))
    del attended
    out: Tensor = block.proj_out(both)
    return out


def cogvideox_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> Streams:
    """Compute a block of CogVideoX, whose feed-forward takes text and video in one sequence."""
    video, text = hidden_states, encoder_hidden_states
    parts = block.norm1.linear(block.norm1.silu(temb)).chunk(6, dim=1)
    shift, scale, gate, text_shift, text_scale, text_gate = parts
    attended = block.attn1(
        hidden_states=_modulate(block.norm1.norm, video, scale, shift),
        encoder_hidden_states=_modulate(block.norm1.norm, text, text_scale, text_shift),
        image_rotary_emb=image_rotary_emb,
        **(attention_kwargs or {}),
    )
    video, text = _gate(video, attended[0], gate), _gate(text, attended[1], text_gate)
    parts = block.norm2.linear(block.norm2.silu(temb)).chunk(6, dim=1)
    shift, scale, gate, text_shift, text_scale, text_gate = parts
    normed = torch.cat(
        (
            _modulate(block.norm2.norm, text, text_scale, text_shift),
            _modulate(block.norm2.norm, video, scale, shift),
        ),
        dim=1,
    )
    fed, length = feed_forward(block.ff, normed), text.shape[1]
    return _gate(video, fed[:, length:], gate), _gate(text, fed[:, :length], text_gate)


def cosmos_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Any,
    embedded_timestep: Tensor,
    temb: Tensor | None = None,
    image_rotary_emb: Any = None,
    extra_pos_emb: Tensor | None = None,
    attention_mask: Tensor | None = None,
    controlnet_residual: Tensor | None = None,
    latents: Tensor | None = None,
    block_idx: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute a block of Cosmos; its steps are modulated by low-rank layers each."""
    states = hidden_states
    if block.before_proj is not None:
        states = block.before_proj(states) + latents
    if extra_pos_emb is not None:
        states = states + extra_pos_emb

    def modulation(norm: Any) -> tuple[Tensor, Tensor, Tensor]:
        hidden = norm.linear_2(norm.linear_1(norm.activation(embedded_timestep)))
        shift, scale, gate = (hidden if temb is None else hidden + temb).chunk(3, dim=-1)
        return shift, scale, gate

    shift, scale, gate = modulation(block.norm1)
    normed = _modulate(block.norm1.norm, states, scale, shift, reader=block.attn1)
    attended = block.attn1(normed, image_rotary_emb=image_rotary_emb)
    shift, scale, next_gate = modulation(block.norm2)
    states, normed = _gate_and_norm(
        block.norm2.norm, states, attended, gate, scale, shift, reader=block.attn2
    )
    attended = block.attn2(
        normed, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask
    )
    shift, scale, gate = modulation(block.norm3)
    states, normed = _gate_and_norm(
        block.norm3.norm, states, attended, next_gate, scale, shift, reader=block.ff
    )
    states = _gate(states, feed_forward(block.ff, normed), gate)
    if controlnet_residual is not None:
        states += controlnet_residual
    if block.after_proj is not None:
        return states, block.after_proj(states)
    return states


def ltx_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """Compute a block of LTX, which scales rows without centring them."""
    states, table = hidden_states, block.scale_shift_table
    rows = temb.reshape(states.shape[0], temb.shape[1], table.shape[0], -1)
    modulation = (table[None, None].to(temb.device) + rows).unbind(dim=2)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation
    attended = block.attn1(
        hidden_states=_modulate_rms(block.norm1, states, scale, shift),
        encoder_hidden_states=None,
        image_rotary_emb=image_rotary_emb,
    )
    states = _gate(states, attended, gate)
    states = states + block.attn2(
        states,
        encoder_hidden_states=encoder_hidden_states,
        image_rotary_emb=None,
        attention_mask=encoder_attention_mask,
    )
    fed = feed_forward(block.ff, _modulate_rms(block.norm2, states, ff_scale, ff_shift))
    return _gate(states, fed, ff_gate)


def _is_plain(module: nn.Module) -> bool:
    """Return whether kernels may do a module's work: a known class, no hook, weights of floats."""
    if type(module) not in _READ or not fused.is_untouched(module):
        return False
    return all(
        weight is None or (type(weight) is nn.Parameter and weight.dtype in _FLOATS)
        for weight in module._parameters.values()
    )


def _modulate(
    norm: Any, states: Tensor, scale: Tensor, shift: Tensor, *, reader: Any = None
) -> Any:
    """Return states normalised and modulated, in fp8 where that is how `reader` takes them."""
    import svg_kernels

    given = dict(weight=norm.weight, bias=norm.bias, eps=norm.eps)
    if reader is not None and reads_fp8_rows(reader, states):
        rows, scales = svg_kernels.layer_norm_modulate_fp8(states, scale, shift, **given)
        return Fp8Rows(rows, scales, states.dtype)
    return svg_kernels.layer_norm_modulate(states, scale, shift, **given)


def _modulate_rms(norm: Any, states: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    import svg_kernels

    return svg_kernels.rms_norm(states, norm.weight, eps=norm.eps) * (1 + scale) + shift


def _gate_and_norm(
    norm: Any,
    states: Tensor,
    added: Tensor,
    gate: Tensor | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    reader: Any,
) -> tuple[Tensor, Any]:
    """Return the states with what is added, and these normalised and modulated.

    The latter in fp8 where that is how `reader` takes them.
    """
    import svg_kernels

    given = dict(scale=scale, shift=shift, weight=norm.weight, bias=norm.bias, eps=norm.eps)
    if reads_fp8_rows(reader, states):
        states, rows, scales = svg_kernels.gate_residual_norm_fp8(states, added, gate, **given)
        return states, Fp8Rows(rows, scales, states.dtype)
    return svg_kernels.gate_residual_norm(states, added, gate, **given)


def _gate(states: Tensor, added: Tensor, gate: Tensor) -> Tensor:
    import svg_kernels

    return svg_kernels.gate_residual(states, added, gate)


def _activate(activation: nn.GELU, states: Tensor, out: Tensor) -> None:
    import svg_kernels

    svg_kernels.gelu(states, approximate=activation.approximate, out=out)  # type: ignore[arg-type]


def _wan_norms(block: Any) -> tuple[nn.Module, ...]:
    return block.norm1, block.norm2, block.norm3


def _dual_stream_norms(block: Any) -> tuple[nn.Module, ...]:
    outer = (block.norm1, block.norm1_context)
    inner = (block.norm1.norm, block.norm1_context.norm, block.norm2, block.norm2_context)
    return (*outer, *inner)


def _single_stream_norms(block: Any) -> tuple[nn.Module, ...]:
    return block.norm, block.norm.norm, block.act_mlp


def _norms_in(*names: str) -> Callable[[Any], tuple[nn.Module, ...]]:
    def norms(block: Any) -> tuple[nn.Module, ...]:
        outer = [getattr(block, name) for name in names]
        return (*outer, *(module.norm for module in outer))

    return norms


WAN_BLOCKS = (
    BlockRule(
        blocks=("WanTransformerBlock", "SkyReelsV2TransformerBlock"),
        norms=_wan_norms,
        forward=wan_block,
    ),
    BlockRule(blocks=("WanVACETransformerBlock",), norms=_wan_norms, forward=vace_block),
)
HUNYUAN_VIDEO_BLOCKS = (
    BlockRule(
        blocks=("HunyuanVideoTransformerBlock", "HunyuanVideo15TransformerBlock"),
        norms=_dual_stream_norms,
        forward=dual_stream_block,
    ),
    BlockRule(
        blocks=("HunyuanVideoSingleTransformerBlock",),
        norms=_single_stream_norms,
        forward=single_stream_block,
        suits=lambda block: type(block.act_mlp) is nn.GELU,
    ),
)
COGVIDEOX_BLOCKS = (
    BlockRule(
        blocks=("CogVideoXBlock", "ConsisIDBlock"),
        norms=_norms_in("norm1", "norm2"),
        forward=cogvideox_block,
    ),
)
COSMOS_BLOCKS = (
    BlockRule(
        blocks=("CosmosTransformerBlock",),
        norms=_norms_in("norm1", "norm2", "norm3"),
        forward=cosmos_block,
    ),
)
LTX_BLOCKS = (
    BlockRule(
        blocks=("LTXVideoTransformerBlock",),
        norms=lambda block: (block.norm1, block.norm2),
        forward=ltx_block,
    ),
)
