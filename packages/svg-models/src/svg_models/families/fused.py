"""Norm and rotation of queries and keys by one kernel of svg-kernels, where one can do both.

The kernel reads the weights of the norms, which is right only while nothing else has a say in what
these modules do. Each function returns None where it does not apply; its caller then does what the
original processor does.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

__all__ = [
    "Pairing",
    "drops_nothing",
    "has_own_forward",
    "is_hooked",
    "is_untouched",
    "is_wrapped",
    "norm_rope",
    "rope",
    "serves",
    "serves_tensor",
    "takes_norm_rope",
]

Pairing = Literal["interleaved", "half"]
_NORMS = (nn.RMSNorm, RMSNorm)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_served: dict[torch.device, bool] = {}


@torch.compiler.assume_constant_result
def serves(device: torch.device) -> bool:
    """Return whether svg-kernels has kernels for `device`; asks once for each device.

    Its reference backend does not count: it would be no faster, and a CPU keeps the original bits.
    """
    if device not in _served:
        _served[device] = _find(device)
    return _served[device]


def norm_rope(
    query: Tensor,
    key: Tensor,
    norms: tuple[Any, Any],
    heads: int,
    rotation: tuple[Tensor, Tensor] | None,
    video: slice,
    *,
    across_heads: bool,
    pairing: Pairing,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Normalise all tokens, rotate those of the video and lay them out by head, in one launch.

    Rounds once, where separate modules round after each step.

    Args:
        query: `[B, S, H * D]`, as projected.
        key: as `query`.
        norms: the modules that normalise queries and keys.
        heads: H.
        rotation: cosines and sines of the video tokens, or None.
        video: where the video tokens are in the sequence, both ends given.
        across_heads: whether a norm spans all heads.
        pairing: which two channels of a head rotate together.
        out: where to write both, `[B, H, S, D]`, tokens of a longer sequence; None allocates.

    Returns:
        Query and key, `[B, S, H, D]` views of head-major memory; None if the kernel cannot stand
        for the modules here.
    """
    if not takes_norm_rope(query, key, norms, heads, rotation, video, across_heads=across_heads):
        return None
    import svg_kernels

    cos, sin = (None, None) if rotation is None else rotation
    query, key = svg_kernels.qk_norm_rope(
        query, key, norms[0].weight, norms[1].weight, cos, sin,
        heads=heads, eps=norms[0].eps, pairing=pairing, start=video.start, out=out,
    )  # fmt: skip
    return query.transpose(1, 2), key.transpose(1, 2)


def takes_norm_rope(
    query: Tensor,
    key: Tensor,
    norms: tuple[Any, Any],
    heads: int,
    rotation: tuple[Tensor, Tensor] | None,
    video: slice,
    *,
    across_heads: bool,
) -> bool:
    """Return whether `norm_rope` can stand for the modules; takes what it takes."""
    width = query.shape[2]
    dim = width // heads
    size = width if across_heads else dim
    return (
        serves_tensor(query)
        and key.shape == query.shape
        and key.dtype == query.dtype
        and dim % 2 == 0
        and all(_is_plain(norm, size, query) for norm in norms)
        and norms[0].eps == norms[1].eps
        and (rotation is None or _fits(rotation, video, dim, query))
    )


def rope(
    query: Tensor,
    key: Tensor,
    rotation: tuple[Tensor, Tensor],
    video: slice,
    *,
    pairing: Pairing,
) -> tuple[Tensor, Tensor] | None:
    """Rotate the video tokens of queries and keys in one launch; text tokens are copied.

    Args:
        query: `[B, S, H, D]`; not changed.
        key: as `query`; H may differ.
        rotation: cosines and sines of the video tokens.
        video: where the video tokens are in the sequence, both ends given.
        pairing: which two channels of a head rotate together.

    Returns:
        Query and key, `[B, S, H, D]` views of head-major memory; None if the kernel does not apply
        here.
    """
    dim = query.shape[3]
    if not (
        serves_tensor(query)
        and serves_tensor(key)
        and key.shape[:2] == query.shape[:2]
        and key.shape[3] == dim
        and key.dtype == query.dtype
        and key.device == query.device
        and dim % 2 == 0
        and _fits(rotation, video, dim, query)
    ):
        return None
    import svg_kernels

    cos, sin = rotation
    query, key = svg_kernels.rope(
        (query.transpose(1, 2), key.transpose(1, 2)), cos, sin, pairing=pairing, start=video.start
    )
    return query.transpose(1, 2), key.transpose(1, 2)


def _find(device: torch.device) -> bool:
    if device.type != "cuda" or find_spec("svg_kernels") is None:
        return False
    import svg_kernels

    return svg_kernels.status(device).auto != "reference"


def serves_tensor(x: Tensor) -> bool:
    """Return whether the kernels take `x` and whatever comes of it needs no gradient."""
    return (
        type(x) is Tensor
        and x.dtype in _FLOATS
        and not torch.is_grad_enabled()
        and serves(x.device)
    )


def is_untouched(module: nn.Module) -> bool:
    """Return whether a module does what its class does, on its own device, when it is called.

    Hooks stand for offloading, quantisation and whatever else moves or changes a weight. Those of
    accelerate and diffusers put a function over `forward`; their attributes tell so, too.
    """
    return not is_hooked(module) and not has_own_forward(module)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a module has a `forward` of its own, other than its class's.

    A hook of accelerate or diffusers that is taken off leaves the class's in the module.
    """
    if "forward" not in module.__dict__:
        return False
    own: Any = module.__dict__["forward"]
    of, function = getattr(own, "__self__", None), getattr(own, "__func__", None)
    return not (of is module and function is type(module).forward)


def drops_nothing(module: nn.Module) -> bool:
    """Return whether a module is a dropout that returns what it is given."""
    off = type(module) is nn.Dropout and (module.p == 0.0 or not module.training)
    return off and is_untouched(module)


def is_hooked(module: nn.Module) -> bool:
    """Return whether something wants to see a module called."""
    hooked = bool(module._forward_pre_hooks or module._forward_hooks)
    return hooked or is_wrapped(module)


def is_wrapped(module: nn.Module) -> bool:
    """Return whether a hook of accelerate or diffusers stands over the `forward` of a module.

    Diffusers leaves a module the registry of its hooks after the last one is taken off.
    """
    own = module.__dict__
    return "_hf_hook" in own or ("_diffusers_hook" in own and bool(own["_diffusers_hook"].hooks))


def _is_plain(norm: Any, size: int, x: Tensor) -> bool:
    """Return whether a norm only scales rows of `x` by a weight `[size]` of its dtype."""
    if type(norm) not in _NORMS:
        return False
    # Asking a module for an attribute that it has not takes torch as long as all the rest here.
    weight = norm.weight
    return (
        is_untouched(norm)
        and type(weight) is nn.Parameter
        and weight.shape == (size,)
        and weight.dtype == x.dtype
        and weight.device == x.device
        and "bias" not in norm._parameters
        and norm.eps is not None
    )


def _fits(rotation: tuple[Tensor, Tensor], video: slice, dim: int, x: Tensor) -> bool:
    """Return whether cosines and sines are real, one row for each video token, beside `x`."""
    cos, sin = rotation
    tokens = video.stop - video.start
    return (
        cos.shape in ((tokens, dim), (1, tokens, 1, dim))
        and sin.shape == cos.shape
        and cos.is_floating_point()
        and sin.is_floating_point()
        and cos.device == x.device
        and sin.device == x.device
    )
