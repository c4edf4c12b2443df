"""The operations of svg-kernels at the shapes of real models, each with what it is compared to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _harness import UNAVAILABLE, reason
from torch import Tensor

import svg_kernels

BF16 = torch.bfloat16
APART = "ours, one after the other"
missing: dict[str, str] = {}  # peers that did not run somewhere, and why
LAST = 512  # rows that are checked where checking all would take longer than measuring
NORM_SHAPES = (
    (2097152, 32),
    (1048576, 64),
    (524288, 128),
    (262144, 256),
    (75600, 5120),
    (118806, 3072),
)
WIDE = NORM_SHAPES[-2:]
HIDDEN_SHAPES = ((75600, 13824), (118806, 12288))
# Of a tile of 256 x 256 pixels and 17 frames in HunyuanVideo's decoder.
DECODER_SHAPES = ((1, 128, 17, 256, 256), (1, 256, 17, 128, 128), (1, 512, 5, 32, 32))
ROPE_SHAPES = (
    (1, 32, 1024, 64),
    (1, 32, 4096, 64),
    (1, 32, 16384, 64),
    (4, 32, 1024, 64),
    (4, 32, 4096, 64),
    (4, 32, 16384, 64),
    (1, 40, 75600, 128),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one shape.

    `ours` and `peers` are timed; `checks` yields pairs (ours, expected) to compare first. `bytes`
    counts each tensor once in and once out, tables and modulation not at all.
    """

    op: str
    shape: str
    bytes: int
    ours: Callable[[], Any]
    checks: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    peers: dict[str, Callable[[], Any]]


def cases(compiled: bool) -> Iterator[Case]:
    """Yield the cases one by one, so that one case's tensors are gone when the next is made."""
    for rows, width in NORM_SHAPES:
        yield rms_norm(rows, width, compiled and (rows, width) in WIDE)
        yield layer_norm(rows, width, compiled and (rows, width) in WIDE)
    for rows, width in WIDE:
        yield layer_norm_modulate(rows, width, compiled)
        yield gate_residual(rows, width, compiled)
        yield gate_residual_norm(rows, width)
        yield gate_residual_norm(rows, width, learned=True)
        yield layer_norm_modulate_fp8(rows, width)
        yield gate_residual_norm_fp8(rows, width)
        yield quantize_rows(rows, width)
    for rows, width in HIDDEN_SHAPES:
        yield quantize_rows(rows, width, activation="gelu_tanh")
    for shape in ROPE_SHAPES:
        yield rope(shape)
    for shape in ROPE_SHAPES:
        if shape[2] >= 16384:
            yield rope(shape, single=True)
    for shape in ROPE_SHAPES[:-1]:
        yield rope_pair(shape)
    yield wan_qk(compiled)
    yield hunyuan_qk(compiled)
    yield permute(inverse=False)
    yield permute(inverse=True)
    for decoder_shape in DECODER_SHAPES:
        yield conv_input(decoder_shape)


def rms_norm(rows: int, width: int, compiled: bool) -> Case:
    from diffusers.models.normalization import RMSNorm

    x, weight = randn(rows, width), torch.ones(width, device="cuda", dtype=BF16)
    peers = {
        "diffusers": partial(RMSNorm(width, eps=1e-6).cuda().to(BF16), x),
        "torch": partial(torch.nn.RMSNorm(width, eps=1e-6).cuda().to(BF16), x),
    }
    if compiled:

        def plain(x: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x, (width,), weight, 1e-6)

        peers["torch.compile"] = partial(torch.compile(plain, dynamic=False), x, weight)

    def checks() -> Iterator[tuple[Tensor, Tensor]]:
        yield svg_kernels.rms_norm(x, weight)[-LAST:], want

    want = svg_kernels.rms_norm(x[-LAST:], weight, backend="reference")
    peers |= others({"FlashInfer": flashinfer_rms_norm, "QuACK": quack_rms_norm}, want, x, weight)

    return Case(
        op="rms_norm",
        shape=f"{rows}x{width}",
        bytes=2 * size(x),
        ours=partial(svg_kernels.rms_norm, x, weight),
        checks=checks,
        peers=peers,
    )


def layer_norm(rows: int, width: int, compiled: bool) -> Case:
    from diffusers.models.normalization import FP32LayerNorm

    x, weight = randn(rows, width), torch.ones(width, device="cuda", dtype=BF16)
    bias = torch.zeros_like(weight)
    peers = {
        "diffusers": partial(FP32LayerNorm(width, eps=1e-6).cuda().to(BF16), x),
        "torch": partial(torch.nn.LayerNorm(width, eps=1e-6).cuda().to(BF16), x),
    }
    if compiled:

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x, (width,), weight, bias, 1e-6)

        peers["torch.compile"] = partial(torch.compile(plain, dynamic=False), x, weight, bias)

    def checks() -> Iterator[tuple[Tensor, Tensor]]:
        yield svg_kernels.layer_norm(x, weight, bias)[-LAST:], want

    want = svg_kernels.layer_norm(x[-LAST:], weight, bias, backend="reference")
    makers = {"FlashInfer": flashinfer_layer_norm, "QuACK": quack_layer_norm}
    peers |= others(makers, want, x, weight.float(), bias.float())

    return Case(
        op="layer_norm",
        shape=f"{rows}x{width}",
        bytes=2 * size(x),
        ours=partial(svg_kernels.layer_norm, x, weight, bias),
        checks=checks,
        peers=peers,
    )


def stock_modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What a Wan block of diffusers does with its first norm."""
    return (F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift).type_as(x)


def layer_norm_modulate(rows: int, width: int, compiled: bool) -> Case:
    x = randn(1, rows, width)
    scale, shift = randn(2, 1, 1, width, dtype=torch.float32).unbind(0)
    peers = {"diffusers": partial(stock_modulate, x, scale, shift)}
    if compiled:
        fused = torch.compile(stock_modulate, dynamic=False)
        peers["torch.compile"] = partial(fused, x, scale, shift)
    ours = partial(svg_kernels.layer_norm_modulate, x, scale, shift)

    def checks() -> Iterator[tuple[Tensor, Tensor]]:
        yield ours()[:, -LAST:], stock_modulate(x[:, -LAST:], scale, shift)

    return Case(
        op="layer_norm_modulate",
        shape=f"1x{rows}x{width}",
        bytes=2 * size(x),
        ours=ours,
        checks=checks,
        peers=peers,
    )


def stock_gate(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """What a Wan block of diffusers does after attention."""
    return (residual.float() + x * gate).type_as(residual)


def gate_residual(rows: int, width: int, compiled: bool) -> Case:
    residual, x = randn(2, 1, rows, width).unbind(0)
    gate = randn(1, 1, width, dtype=torch.float32)
    peers = {"diffusers": partial(stock_gate, residual, x, gate)}
    if compiled:
        fused = torch.compile(stock_gate, dynamic=False)
        peers["torch.compile"] = partial(fused, residual, x, gate)
    ours = partial(svg_kernels.gate_residual, residual, x, gate)

    def checks() -> Iterator[tuple[Tensor, Tensor]]:
        yield ours()[:, -LAST:], stock_gate(residual[:, -LAST:], x[:, -LAST:], gate)

    return Case(
        op="gate_residual",
        shape=f"1x{rows}x{width}",
        bytes=3 * size(x),
        ours=ours,
        checks=checks,
        peers=peers,
    )


def gate_residual_norm(rows: int, width: int, *, learned: bool = False) -> Case:
    """Return the sum and the norm, modulated or with a weight and a bias that were learned."""
    residual, x, gate, rest = summands(rows, width, learned=learned)

    def apart(residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = svg_kernels.gate_residual(residual, x, gate)
        norm = svg_kernels.layer_norm if learned else svg_kernels.layer_norm_modulate
        return y, norm(y, **rest)

    def together(residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return svg_kernels.gate_residual_norm(residual, x, gate, **rest)

    def checks() -> Iterator[tuple[Tensor, Tensor]]:
        last = (residual[:, -LAST:], x[:, -LAST:])
        yield from zip((t[:, -LAST:] for t in together(residual, x)), apart(*last), strict=True)

    return Case(
        op="gate_residual_norm",
        shape=f"1x{rows}x{width}" + (", weight and bias" if learned else ""),
        bytes=4 * size(x),
        ours=partial(together, residual, x),
        checks=checks,
        peers={APART: partial(apart, residual, x)},
    )


def summands(
    rows: int, width: int, *, learned: bool
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return two terms, a gate, and scale and shift or weight and bias by their names."""
    residual, x = randn(2, 1, rows, width).unbind(0)
    gate, first, second = randn(3, 1, 1, width, dtype=torch.float32).unbind(0)
    if learned:
        return residual, x, gate, {"weight": first.flatten(), "bias": second.flatten()}
    return residual, x, gate, {"scale": first, "shift": second}


def layer_norm_modulate_fp8(rows: int, width: int) -> Case:
    x = randn(1, rows, width)
    scale, shift = randn(2, 1, 1, width, dtype=torch.float32).unbind(0)
    ours = partial(svg_kernels.layer_norm_modulate_fp8, x, scale, shift)

    def apart(x: Tensor) -> tuple[Tensor, Tensor]:
        return svg_kernels.quantize_rows(svg_kernels.layer_norm_modulate(x, scale, shift))

    return Case(
        op="layer_norm_modulate_fp8",
        shape=f"1x{rows}x{width}",
        bytes=size(x) + x.numel(),
        ours=ours,
        checks=lambda: both_quantised(ours(), apart(x[:, -LAST:])),
        peers={APART: partial(apart, x)},
    )


def gate_residual_norm_fp8(rows: int, width: int) -> Case:
    residual, x, gate, rest = summands(rows, width, learned=False)

    def apart(residual: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        y, z = svg_kernels.gate_residual_norm(residual, x, gate, **rest)
        return y, *svg_kernels.quantize_rows(z)

    ours = partial(svg_kernels.gate_residual_norm_fp8, residual, x, gate, **rest)

    def checks() -> Iterator[tuple[Tensor, Tensor]]:
        (y, *found), (sums, *wanted) = ours(), apart(residual[:, -LAST:], x[:, -LAST:])
        yield y[:, -LAST:], sums
        yield from both_quantised(found, wanted)

    return Case(
        op="gate_residual_norm_fp8",
        shape=f"1x{rows}x{width}",
        bytes=3 * size(x) + x.numel(),
        ours=ours,
        checks=checks,
        peers={APART: partial(apart, residual, x)},
    )


def quantize_rows(rows: int, width: int, activation: str = "none") -> Case:
    x = randn(1, rows, width)

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.float() if activation == "none" else F.gelu(x.float(), approximate="tanh")
        scale = y.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
        return (y / scale).to(torch.float8_e4m3fn), scale

    ours = partial(svg_kernels.quantize_rows, x, activation=activation)
    return Case(
        op="quantize_rows",
        shape=f"1x{rows}x{width}" + ("" if activation == "none" else f", {activation}"),
        bytes=size(x) + x.numel(),
        ours=ours,
        checks=lambda: both_quantised(ours(), plain(x[:, -LAST:])),
        peers={"torch": partial(plain, x)},
    )


def both_quantised(found: Any, wanted: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the last rows of what was found, and what is wanted there, in the range of 1."""
    (q, scale), (rows, row_scale) = found, wanted
    yield scale[:, -LAST:], row_scale
    # Half a step of e4m3 is 16 of 448.
    yield q[:, -LAST:].float() / 1600, rows.float() / 1600


def rope(shape: tuple[int, int, int, int], *, single: bool = False) -> Case:
    """Rotate with diffusers' tables, which hold each value twice, or with one value per pair."""
    from diffusers.models.embeddings import apply_rotary_emb

    x, doubled = randn(*shape), angles(*shape[2:])
    tables = tuple(table[:, ::2].contiguous() for table in doubled) if single else doubled

    def checks() -> Iterator[tuple[Tensor, Tensor]]:
        want = svg_kernels.rope(x[:, -2:], *tables, backend="reference")
        yield svg_kernels.rope(x, *tables)[:, -2:], want

    return Case(
        op="rope",
        shape="x".join(map(str, shape)) + (", tables of pairs" if single else ""),
        bytes=2 * size(x),
        ours=partial(svg_kernels.rope, x, *tables, inplace=True),
        checks=checks,
        peers={"diffusers": partial(apply_rotary_emb, x, doubled)},
    )


def rope_pair(shape: tuple[int, int, int, int]) -> Case:
    """Query and key by one call, which is what the seeds time."""
    from diffusers.models.embeddings import apply_rotary_emb

    pair, tables = randn(2, *shape).unbind(0), angles(*shape[2:])

    def stock() -> list[Tensor]:
        return [apply_rotary_emb(x, tables) for x in pair]

    def checks() -> Iterator[tuple[Tensor, Tensor]]:
        for got, x in zip(svg_kernels.rope(pair, *tables), pair, strict=True):
            yield got[:, -2:], svg_kernels.rope(x[:, -2:], *tables, backend="reference")

    return Case(
        op="rope",
        shape="q, k of " + "x".join(map(str, shape)),
        bytes=4 * size(pair[0]),
        ours=partial(svg_kernels.rope, pair, *tables, inplace=True),
        checks=checks,
        peers={"diffusers": stock},
    )


def wan_qk(compiled: bool) -> Case:
    """Wan 2.1 14B at 720p: the norm runs across all heads."""
    heads, tokens = 40, 75600
    norm = torch.nn.RMSNorm(heads * 128, eps=1e-6).cuda().to(BF16)

    def stock(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = norm(x).unflatten(2, (heads, -1)).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos[None, :, None, 0::2], sin[None, :, None, 1::2]
        out = x.new_empty(x.shape).unflatten(2, (heads, -1))
        out[..., 0::2] = a * cos - b * sin
        out[..., 1::2] = a * sin + b * cos
        return out

    return qk_norm_rope("Wan", tokens, heads, heads * 128, stock, compiled)


def hunyuan_qk(compiled: bool) -> Case:
    """HunyuanVideo at 720p: the norm runs over each head."""
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.normalization import RMSNorm

    heads, tokens = 24, 118806
    norm = RMSNorm(128, eps=1e-6).cuda().to(BF16)

    def stock(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = norm(x.unflatten(2, (heads, -1)))
        y: Tensor = apply_rotary_emb(x, (cos, sin), sequence_dim=1)
        return y

    return qk_norm_rope("HunyuanVideo", tokens, heads, 128, stock, compiled)


def qk_norm_rope(
    name: str,
    tokens: int,
    heads: int,
    normed: int,
    stock: Callable[[Tensor, Tensor, Tensor], Tensor],
    compiled: bool,
) -> Case:
    q, k = randn(2, 1, tokens, heads * 128).unbind(0)
    weight = torch.ones(normed, device="cuda", dtype=BF16)
    cos, sin = angles(tokens, 128)

    def both(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        return [function(x, cos, sin) for x in (q, k)]

    ours = partial(svg_kernels.qk_norm_rope, q, k, weight, weight, cos, sin, heads=heads)
    peers = {"diffusers": partial(both, stock)}
    if compiled:
        peers["torch.compile"] = partial(both, torch.compile(stock, dynamic=False))

    def checks() -> Iterator[tuple[Tensor, Tensor]]:
        for got, x in zip(ours(), (q, k), strict=True):
            want = stock(x[:, -LAST:], cos[-LAST:], sin[-LAST:])
            yield got[:, :, -LAST:], want.transpose(1, 2)

    return Case(
        op="qk_norm_rope",
        shape=f"{name} 1x{tokens}x{heads}x128",
        bytes=4 * size(q),
        ours=ours,
        checks=checks,
        peers=peers,
    )


def permute(*, inverse: bool) -> Case:
    """Query, key and value of Wan 720p in random order, the worst there is."""
    shape = (1, 40, 75600, 128)
    tensors = randn(3, *shape).unbind(0)
    noise = torch.rand(2, *shape[:3], device="cuda")
    q_order, k_order = noise.argsort(-1).int().unbind(0)
    orders = (q_order, k_order, k_order)
    indices = [order.long()[..., None].expand(shape) for order in orders]
    function = svg_kernels.unpermute_rows if inverse else svg_kernels.permute_rows
    ours = partial(function, tensors, orders)

    def stock() -> list[Tensor]:
        pairs = zip(tensors, indices, strict=True)
        if inverse:
            return [torch.empty_like(x).scatter_(2, index, x) for x, index in pairs]
        return [x.gather(2, index) for x, index in pairs]

    def checks() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(ours(), stock(), strict=True)

    return Case(
        op=function.__name__,
        shape="q, k, v of 1x40x75600x128",
        bytes=6 * size(tensors[0]),
        ours=ours,
        checks=checks,
        peers={"torch": stock},
    )


def others(
    makers: dict[str, Callable[..., Callable[[], Tensor]]], want: Tensor, *tensors: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Return the norms of other packages that are installed, take this shape and are right."""
    found = {}
    for name, make in makers.items():
        try:
            call = make(*tensors)
            torch.testing.assert_close(call()[-LAST:].float(), want.float(), rtol=2e-2, atol=2e-2)
        except UNAVAILABLE as error:
            missing.setdefault(name, reason(error))
        else:
            found[name] = call
    return found


def flashinfer_rms_norm(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    from flashinfer.norm import rmsnorm

    return partial(rmsnorm, x, weight, 1e-6)


def flashinfer_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    from flashinfer.norm import layernorm

    return partial(layernorm, x, weight, bias, 1e-6)


def quack_rms_norm(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    from quack.rmsnorm import rmsnorm_fwd

    return lambda: rmsnorm_fwd(x, weight, eps=1e-6)[0]


def quack_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    from quack.rmsnorm import layernorm_fwd

    return lambda: layernorm_fwd(x, weight, bias, eps=1e-6)


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def angles(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin `[tokens, dim]` as diffusers hands them over, each value twice."""
    theta = torch.rand(tokens, dim // 2, device="cuda").repeat_interleave(2, dim=-1) * 6.28
    return theta.cos(), theta.sin()


def size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def conv_input(shape: tuple[int, int, int, int, int]) -> Case:
    """Group norm, SiLU and the padding of a causal convolution."""
    padding, channels = (1, 1, 1, 1, 2, 0), shape[1]
    x = randn(*shape)
    norm = torch.nn.GroupNorm(32, channels, eps=1e-6).cuda().to(BF16)
    last = x.contiguous(memory_format=torch.channels_last_3d)

    def stock() -> Tensor:
        return F.pad(F.silu(norm(x)), padding, mode="replicate")

    def ours() -> Tensor:
        return svg_kernels.conv_input(
            last, norm.weight, norm.bias, groups=32, silu=True, padding=padding
        )

    def checks() -> Iterator[tuple[Tensor, Tensor]]:
        yield ours(), stock()

    return Case(
        op="conv_input",
        shape="x".join(map(str, shape)),
        bytes=2 * size(x) + size(stock()),
        ours=ours,
        checks=checks,
        peers={"diffusers": stock},
    )
