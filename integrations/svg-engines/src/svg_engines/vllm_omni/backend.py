"""The classes that vLLM-Omni loads; its own are imported here, which `register` leaves to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
)
from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum
from vllm_omni.platforms import current_omni_platform

from svg_engines.vllm_omni import Layer, settings_from


class SparseVideoGenImpl(AttentionImpl):  # type: ignore[misc]
    """One attention layer: sparse where it can be, else what the platform has for dense ones."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        **extra_impl_args: Any,
    ) -> None:
        settings = settings_from(backend_kwargs)
        self.layer = Layer(settings, prefix, softmax_scale, causal)
        flash = current_omni_platform.supports_diffusion_dense_flash_attention()
        dense = DiffusionAttentionBackendEnum["FLASH_ATTN" if flash else "TORCH_SDPA"].get_class()
        self.dense = dense.get_impl_cls()(
            num_heads=num_heads,
            head_size=head_size,
            softmax_scale=softmax_scale,
            causal=causal,
            num_kv_heads=num_kv_heads,
            prefix=prefix,
            qkv_layout=qkv_layout,
        )

    def forward_cuda(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> Tensor:
        """Compute one call; tensors are `[B, S, H, D]`."""
        out = self.layer.attend(query, key, value, attn_metadata)
        if out is None:
            out = self.dense.forward_cuda(query, key, value, attn_metadata)
        return out


class SparseVideoGenBackend(AttentionBackend):  # type: ignore[misc]
    """Sparse VideoGen, as vLLM-Omni sees it."""

    supported_platforms: tuple[str, ...] = ("cuda",)

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        """Return True: calls with a mask are computed by the dense implementation."""
        return True

    @staticmethod
    def get_name() -> str:
        """Return the name that logs show."""
        return "SPARSE_VIDEO_GEN"

    @staticmethod
    def get_impl_cls() -> type[SparseVideoGenImpl]:
        """Return the implementation."""
        return SparseVideoGenImpl

    @staticmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        """Return vLLM-Omni's own metadata."""
        return AttentionMetadata

    @staticmethod
    def get_builder_cls() -> None:
        """Return None: the metadata are the model's."""
        return None

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Return an empty list, which stands for any size."""
        return []
