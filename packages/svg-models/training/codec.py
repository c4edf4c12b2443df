"""Run a Wan autoencoder over a whole clip at once, exactly as its chunked form would.

`AutoencoderKLWan` walks through a clip four frames at a time with a cache, which is right for long
videos and slow for training: thousands of small launches. The first frame is special (it is never
merged with others), every other operation is causal, so one pass over all frames gives the same
numbers. Only the residual form with `patch_size` is handled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    patchify,
    unpatchify,
)
from torch import Tensor


def _norm_silu(x: Tensor, gamma: Tensor, scale: float) -> Tensor:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().sum(1, keepdim=True).clamp_min(1e-24))
    return F.silu(wide * inverse * scale * gamma).to(x.dtype)


def _causal_conv(conv: WanCausalConv3d, x: Tensor) -> Tensor:
    width, height, before = conv._padding[0], conv._padding[2], conv._padding[4]
    if before:
        x = F.pad(x, (0, 0, 0, 0, before, 0))
    weight, bias = conv.weight, conv.bias
    if x.dtype != weight.dtype:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.conv3d(x, weight, bias, conv.stride, (0, height, width))


def _resample(module: WanResample, x: Tensor, *_: object, **__: object) -> Tensor:
    if module.mode == "upsample3d":
        rest = module.time_conv(x[:, :, 1:])
        batch, channels, frames, height, width = rest.shape
        rest = rest.view(batch, 2, channels // 2, frames, height, width)
        rest = rest.transpose(1, 2).transpose(2, 3).flatten(2, 3)
        x = torch.cat((x[:, :, :1], rest), dim=2)
    frames = x.shape[2]
    flat = x.transpose(1, 2).flatten(0, 1)
    if module.mode.startswith("upsample"):
        flat = module.resample[1](F.interpolate(flat, scale_factor=2.0, mode="nearest-exact"))
    else:
        flat = module.resample(flat)
    x = flat.unflatten(0, (-1, frames)).transpose(1, 2)
    if module.mode == "downsample3d":
        x = torch.cat((x[:, :, :1], module.time_conv(x)), dim=2)
    return x


def _residual_block(
    module: WanResidualBlock,
    activate: Callable[[Tensor, Tensor, float], Tensor],
    x: Tensor,
    *_: object,
    **__: object,
) -> Tensor:
    shortcut = module.conv_shortcut(x)
    x = activate(x, module.norm1.gamma, module.norm1.scale)
    x = module.conv1(x)
    x = activate(x, module.norm2.gamma, module.norm2.scale)
    return module.conv2(x) + shortcut


class WholeClip:
    """Encode and decode whole clips with the weights of an `AutoencoderKLWan`.

    The module's `forward` methods are replaced on its instances until `restore`.
    """

    def __init__(self, vae: Any, *, compiled: bool = False) -> None:
        """Take over `vae`; `compiled` fuses norms and activations with `torch.compile`."""
        if not vae.config.is_residual or vae.config.patch_size is None:
            raise ValueError(
                "WholeClip needs is_residual=True and a patch_size in the vae's config"
            )
        self.vae = vae
        if compiled:
            torch._dynamo.config.recompile_limit = 64
        activate = torch.compile(_norm_silu, dynamic=True) if compiled else _norm_silu
        self._patched = []
        for module in vae.modules():
            if isinstance(module, WanResample):
                module.forward = partial(_resample, module)
            elif isinstance(module, WanResidualBlock):
                module.forward = partial(_residual_block, module, activate)
            elif isinstance(module, WanCausalConv3d):
                module.forward = partial(_causal_conv, module)
            else:
                continue
            self._patched.append(module)

    def restore(self) -> None:
        """Give every module its own `forward` back."""
        for module in self._patched:
            module.__dict__.pop("forward", None)
        self._patched = []

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Encode `[B, 3, T, H, W]` to the posterior's mean and clamped log variance."""
        x = patchify(video, self.vae.config.patch_size)
        if x.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        mean, logvar = self.vae.quant_conv(self.vae.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents `[B, C, t, h, w]` to a video, not clamped."""
        if latents.is_cuda:
            latents = latents.contiguous(memory_format=torch.channels_last_3d)
        x = self.vae.post_quant_conv(latents)
        return unpatchify(self.vae.decoder(x, first_chunk=True), self.vae.config.patch_size)
