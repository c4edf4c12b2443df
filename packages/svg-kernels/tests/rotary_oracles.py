"""Rotation by another route, for the tests of rope and qk_norm_rope."""

from __future__ import annotations

import torch


def normal(shape, dtype, device, generator):
    """Draw a normal tensor."""
    return torch.randn(shape, device=device, generator=generator).to(dtype)


def angles(length, dim, device, generator):
    """Draw angles `[length, dim / 2]`."""
    return torch.rand(length, dim // 2, device=device, generator=generator) * 6.28


def spread(table, pairing):
    """Return one value per channel from one per pair, as diffusers hands tables over."""
    if pairing == "half":
        return torch.cat((table, table), dim=-1)
    return table.repeat_interleave(2, dim=-1)


def rotated(x, theta, pairing, dtype):
    """Rotate by complex multiplication."""
    dim = x.shape[-1]
    x = x.to(dtype)
    if pairing == "half":
        pairs = torch.stack((x[..., : dim // 2], x[..., dim // 2 :]), dim=-1)
    else:
        pairs = x.unflatten(-1, (-1, 2))
    turn = torch.polar(torch.ones_like(theta, dtype=dtype), theta.to(dtype))
    out = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return out.transpose(-1, -2).flatten(-2) if pairing == "half" else out.flatten(-2)
