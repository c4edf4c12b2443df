"""Fused CUDA kernels for video diffusion transformers."""

from svg_kernels import modulation, norm, norm_fp8, permute, quantize
from svg_kernels._dispatch import BackendStatus
from svg_kernels.attention import block_sparse_attention
from svg_kernels.attention_fp8 import block_sparse_attention_fp8
from svg_kernels.conv_input import conv_input
from svg_kernels.errors import UnsupportedError
from svg_kernels.gelu import gelu
from svg_kernels.key_value_fp8 import Fp8KeyValue, quantize_key_value
from svg_kernels.modulation import *  # noqa: F403
from svg_kernels.norm import *  # noqa: F403
from svg_kernels.norm_fp8 import *  # noqa: F403
from svg_kernels.permute import *  # noqa: F403
from svg_kernels.probe_sums import ProbeSums, probe_sums
from svg_kernels.qk_norm_rope import qk_norm_rope
from svg_kernels.quantize import *  # noqa: F403
from svg_kernels.residual_norm import gate_residual_norm
from svg_kernels.rope import rope
from svg_kernels.status import Status, status

__version__ = "0.1.0"

__all__ = [
    *norm.__all__,
    *modulation.__all__,
    "gate_residual_norm",
    *norm_fp8.__all__,
    "conv_input",
    "rope",
    "qk_norm_rope",
    *permute.__all__,
    "gelu",
    *quantize.__all__,
    "block_sparse_attention",
    "probe_sums",
    "ProbeSums",
    "quantize_key_value",
    "block_sparse_attention_fp8",
    "Fp8KeyValue",
    "BackendStatus",
    "Status",
    "UnsupportedError",
    "status",
]
