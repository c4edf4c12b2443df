"""The layers of a transformer around its attention, made faster for the length of a run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from svg_attention import UnsupportedError
from svg_models.caching import read_cache
from svg_models.errors import SettingError
from svg_models.families import Family
from svg_models.families.base import unwrap
from svg_models.families.blocks import FusedForward
from svg_models.families.decoders import BLENDS, blend, find_decoder_blocks
from svg_models.recipe import Layers
from svg_models.sparse.checks import why_not
from svg_models.sparse.linears import Fp8Linears, refuse_device
from svg_models.stand_in import standing_in

__all__ = ["FastDecoder", "FastLayers", "check_layers", "fp8_backend", "slow_in_fp8"]

# Who computes attention in fp8, by who computes sparse attention otherwise.
FP8_BACKENDS = {
    "auto": "cuda_fp8",
    "cuda": "cuda_fp8",
    "cuda_fp8": "cuda_fp8",
    "reference": "reference_fp8",
    "reference_fp8": "reference_fp8",
}


def fp8_backend(backend: str) -> str:
    """Return the backend that computes attention in fp8 for a run that was given `backend`.

    Raises:
        SettingError: if the one given has no fp8.
    """
    if backend not in FP8_BACKENDS:
        raise SettingError(
            f"attention='fp8' has a kernel of its own, and backend {backend!r} is another; leave "
            "backend out (or take 'reference', which computes slowly and anywhere)"
        )
    return FP8_BACKENDS[backend]


def check_layers(
    layers: Layers,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    backend: str = "auto",
    head_dim: int | None = None,
) -> None:
    """Refuse a precision that a device does not have.

    Args:
        layers: what is asked for.
        device: where it will run.
        dtype: of query, key and value.
        backend: who computes sparse attention.
        head_dim: of each head; 128 while it is not known.

    Raises:
        SettingError: if the backend has no fp8.
        UnsupportedError: if the device or the installation has none.
    """
    computes = fp8_backend(backend) if layers.attention == "fp8" else None
    if layers.linears == "fp8":
        refuse_device(torch.device(device))
    if computes is not None:
        reason = why_not(computes, device, dtype, head_dim=head_dim)
        if reason:
            raise UnsupportedError({"attention": f"attention='fp8' cannot run here: {reason}"})


def slow_in_fp8(layers: Layers, backend: str, head_dim: int | None) -> str:
    """Return in a sentence why attention in fp8 gains nothing; empty where it can."""
    padded = head_dim is not None and head_dim < 128
    if layers.attention != "fp8" or fp8_backend(backend) != "cuda_fp8" or not padded:
        return ""
    return (
        f"attention='fp8' pads heads of {head_dim} channels to 128, which takes as long as in bf16 "
        "or longer; it is for models whose heads have 128"
    )


class FastLayers:
    """What a run does to the blocks of one transformer beside their attention.

    Args:
        transformer: the transformer.
        family: its family.
        layers: what to do with them.
    """

    def __init__(self, transformer: nn.Module, family: Family, layers: Layers) -> None:
        joined = family.find_blocks(transformer) if layers.fuse else []
        self._forwards = FusedForward.install_all(joined)
        self.linears: Fp8Linears | None = None
        self._cached: weakref.ref[Any] | None = None
        try:
            if layers.linears == "fp8":
                self.linears = Fp8Linears(family.blocks_of(transformer))
            self._enable_cache(transformer, layers.cache)
        except BaseException:
            self.remove()
            raise

    def _enable_cache(self, transformer: nn.Module, name: str) -> None:
        """Put a cache over the blocks as they are now: it goes first when they are left."""
        cache = read_cache(name)
        if cache is not None:
            inner = unwrap(transformer)
            cache.enable(inner)
            self._cached = weakref.ref(inner)

    def begin_forward(self, *, fp8: bool, step: int | None) -> None:
        """Choose the precision of the products of a forward pass that starts.

        Args:
            fp8: whether products that can be in fp8 are.
            step: the denoising step, if it is known.
        """
        if self.linears is not None:
            self.linears.begin_forward(fp8=fp8, step=step)

    def release(self) -> None:
        """Let go of memory that only a pass in fp8 needs."""
        if self.linears is not None:
            self.linears.release()

    def remove(self) -> None:
        """Leave every layer as it was found."""
        cached = None if self._cached is None else self._cached()
        self._cached = None
        if cached is not None and cached.is_cache_enabled:
            cached.disable_cache()
        forwards, self._forwards = self._forwards, []
        for forward in forwards:
            forward.remove()
        linears, self.linears = self.linears, None
        if linears is not None:
            linears.remove()


class FastDecoder:
    """A run's hold on the decoder of a pipeline's VAE.

    Its blocks are joined if a rule covers them, and tiles of any of diffusers' own are blended by
    few launches. Pipelines may share a VAE: it is as it was found once the last run has let go of
    it, or is gone.

    Args:
        vae: the VAE, held weakly; None has no decoder.
        layers: what to do with it.
    """

    def __init__(self, vae: Any, layers: Layers) -> None:
        inner = unwrap(vae)
        self._leave: Callable[[], object] | None = None
        if layers.fuse and isinstance(inner, nn.Module):
            joined = _joined.get(inner)
            if joined is None or not joined.holds:
                joined = _joined[inner] = _JoinedDecoder(inner)
            joined.holds += 1
            self._leave = weakref.finalize(self, joined.leave)

    def remove(self) -> None:
        """Let go of the VAE; a second time does nothing."""
        if self._leave is not None:
            self._leave()


class _JoinedDecoder:
    """What stands in a VAE while runs hold it."""

    def __init__(self, vae: nn.Module) -> None:
        self.holds = 0
        self._forwards = FusedForward.install_all(find_decoder_blocks(vae))
        self._undo = ExitStack()
        if not type(vae).__module__.startswith("diffusers."):
            return
        for name, axis in BLENDS.items():
            own = vars(vae).get(name)
            if isinstance(own, partial) and own.func is blend:
                delattr(vae, name)  # of a VAE that this one is a copy of
            if hasattr(type(vae), name) and name not in vars(vae):
                self._undo.enter_context(standing_in(vae, name, partial(blend, axis=axis)))

    def leave(self) -> None:
        """Let one run go; after the last one, leave every block as it was found."""
        self.holds -= 1
        if self.holds:
            return
        self._undo.close()
        for forward in self._forwards:
            forward.remove()


_joined: weakref.WeakKeyDictionary[nn.Module, _JoinedDecoder] = weakref.WeakKeyDictionary()
