"""SGLang: its Sparse VideoGen 2 backend, computed by ours.

SGLang brings a backend `sparse_video_gen_2_attn` that needs the package `svg`. Two hooks take the
place of that need: one of how the backend is found, one of what it computes. Its metadata, options
and flags stay. Hooks are registered by name, so that nothing of SGLang's runtime is imported early.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svg_attention import SVG2, TokenLayout, cluster_counts
from svg_engines.generation import Generation, Reasons
from svg_engines.settings import Settings

BACKEND = "sglang.multimodal_gen.runtime.layers.attention.backends.sparse_video_gen_2_attn"
RESOLVER = (
    "sglang.multimodal_gen.runtime.platforms.cuda._SparseVideoGen2AttentionBackendResolver.resolve"
)
IMPL = f"{BACKEND}.SparseVideoGen2AttentionImpl"
_HELD = "_sparse_videogen"  # where the cache of a request keeps its generation
_reasons = Reasons("sglang")


def register() -> None:
    """Register the hooks; the entry point in `sglang.multimodal_gen.plugins`."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookType, plugin_hook

    for target, hook in (
        (RESOLVER, resolve),
        (f"{IMPL}.__init__", initialize),
        (f"{IMPL}.forward", forward),
    ):
        plugin_hook(target, HookType.REPLACE)(hook)


def resolve(resolver: Any, platform: Any) -> str:
    """Return where the backend is; SGLang's own looks for the package `svg` first."""
    return f"{BACKEND}.SparseVideoGen2AttentionBackend"


def initialize(
    impl: Any,
    num_heads: int,
    head_size: int,
    causal: bool,
    softmax_scale: float,
    num_kv_heads: int | None = None,
    prefix: str = "",
    **extra_impl_args: Any,
) -> None:
    """Initialize one layer of the backend, without the package `svg`.

    Raises:
        ValueError: if the layer is causal, or its name says no number.
    """
    if causal:
        raise ValueError("Sparse VideoGen has no causal attention; choose another backend")
    impl.prefix, impl.layer_idx = prefix, impl._get_layer_idx(prefix)
    impl.softmax_scale = softmax_scale


@torch.compiler.disable
def forward(impl: Any, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any) -> Tensor:
    """Compute one call of a layer; tensors are `[B, S, H, D]`.

    Which steps and layers are dense is SGLang's to say (`svg2_first_times_fp`,
    `svg2_first_layers_fp`), as are clusters and `top_p`.
    """
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = None
    timestep = attn_metadata.current_timestep
    early = timestep > attn_metadata.first_times_fp
    if not early and impl.layer_idx >= attn_metadata.first_layers_fp:
        out = _attend(impl, q, k, v, attn_metadata)
    if out is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=impl.softmax_scale)
    return out.transpose(1, 2).contiguous()


def _attend(impl: Any, query: Tensor, key: Tensor, value: Tensor, metadata: Any) -> Tensor | None:
    """Compute a call sparsely, or return None."""
    text, video = metadata.context_length, metadata.num_frame * metadata.frame_size
    if query.shape[2] != text + video:
        _reasons(
            f"{query.shape[2]} tokens are not {video} of video and {text} of text; such calls stay "
            "dense"
        )
        return None
    generation = generation_of(metadata)
    step = generation.step_of(metadata.current_timestep)
    lengths = None
    if metadata.prompt_length is not None and metadata.prompt_length < text:
        lengths = torch.full((query.shape[0],), metadata.prompt_length, device=query.device)
    return generation.attend(
        *(query, key, value),
        layout=TokenLayout(grid=(metadata.num_frame, 1, metadata.frame_size), text_tokens=text),
        step=step,
        num_steps=None,
        layer=impl.layer_idx,
        branch=generation.branch(step, impl.prefix, impl.layer_idx),
        transformer=impl.prefix,
        text_lengths=lengths,
        scale=impl.softmax_scale,
    )


def generation_of(metadata: Any) -> Generation:
    """Return what a request remembers; it lives in the cache that SGLang keeps for the request."""
    cache = metadata.cache
    generation = getattr(cache, _HELD, None)
    if generation is None:
        tokens = metadata.num_frame * metadata.frame_size
        clusters = cluster_counts(tokens, metadata.num_q_centroids, metadata.num_k_centroids)
        method = SVG2(
            q_clusters=clusters[0],
            k_clusters=clusters[1],
            top_p=metadata.top_p_kmeans,
            min_keep=metadata.min_kc_ratio,
            first_iterations=metadata.kmeans_iter_init,
            step_iterations=metadata.kmeans_iter_step,
        )
        settings = Settings(method=method, dense_steps=0.0, min_tokens=0)
        generation = Generation(settings, _reasons)
        setattr(cache, _HELD, generation)
    return generation
