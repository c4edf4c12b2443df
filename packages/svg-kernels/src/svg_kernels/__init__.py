"""Fused CUDA kernels for video diffusion transformers."""

from svg_kernels._backends import Tier
from svg_kernels.attention import block_sparse_attention
from svg_kernels.errors import UnsupportedError
from svg_kernels.modulation import gate_residual, layer_norm_modulate
from svg_kernels.norm import layer_norm, rms_norm
from svg_kernels.permute import permute_rows, unpermute_rows
from svg_kernels.rotary import qk_norm_rope, rope
from svg_kernels.status import Status, status

__version__ = "0.1.0"

__all__ = [
    "block_sparse_attention",
    "gate_residual",
    "layer_norm",
    "layer_norm_modulate",
    "permute_rows",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "unpermute_rows",
    "Status",
    "Tier",
    "UnsupportedError",
    "status",
]
