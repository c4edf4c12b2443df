"""vLLM-Omni: an attention backend of its diffusion models, and the function form of later versions.

Version 0.30 knows its backends by an enumeration that cannot be added to. So the plug-in takes the
class behind one of its names, `RAINFUSION_ATTN`, which runs on NPUs alone and whose settings for
block-sparse attention are those that are needed here. On an NPU nothing is registered.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svg_attention import TokenLayout
from svg_engines.generation import Generation, Reasons
from svg_engines.settings import Settings, layers

NAME = "RAINFUSION_ATTN"
_HELD = "_sparse_videogen"  # where a forward context keeps its generation
# What `params` of the function may set; it holds other things, too.
SETTINGS = frozenset(field.name for field in fields(Settings)) - {"method"}
_ordinals = itertools.count()
_reasons = Reasons("vllm-omni")


def register() -> None:
    """Put our backend behind its name; the entry point in `vllm_omni.general_plugins`."""
    from vllm_omni.diffusion.attention.backends.registry import (
        DiffusionAttentionBackendEnum,
        register_diffusion_backend,
    )
    from vllm_omni.platforms import current_omni_platform

    if not current_omni_platform.is_npu():
        path = "svg_engines.vllm_omni.backend.SparseVideoGenBackend"
        register_diffusion_backend(DiffusionAttentionBackendEnum[NAME], path)


def settings_from(kwargs: Mapping[str, Any] | None) -> Settings:
    """Return the settings that a `block_sparse` block of vLLM-Omni's configuration asks for.

    Raises:
        ValueError: if it asks for what this backend does not have.
    """
    given = dict(kwargs or {})
    precision = given.pop("precision", "bf16")
    if precision != "bf16":
        raise ValueError(f"block_sparse.precision must be 'bf16' here, got {precision!r}")
    found: dict[str, Any] = {}
    if "sparsity" in given:
        found["density"] = 1.0 - float(given.pop("sparsity"))
    # 0, their default, keeps the share of the preset dense: early steps suffer most.
    found["start_step"] = int(given.pop("start_step", 0)) or None
    found["end_steps"] = int(given.pop("end_step", 0))
    found["dense_layers"] = layers(given.pop("skip_layers", ()))
    return Settings.from_mapping(found | given)


class Layer:
    """One self-attention layer of a model: what is known of it before the first call.

    Args:
        settings: which calls become sparse.
        prefix: dotted name of the layer in its model.
        scale: factor of the logits.
        causal: whether the layer is causal, which stays dense.
    """

    def __init__(self, settings: Settings, prefix: str, scale: float, causal: bool = False) -> None:
        numbers = [int(part) for part in prefix.split(".") if part.isdecimal()]
        self.number = numbers[0] if len(numbers) == 1 else None
        # Wan 2.2 gives the layers of both its transformers the same names.
        self.name = f"{prefix} {next(_ordinals)}"
        self.settings, self.scale, self.causal = settings, scale, causal

    @torch.compiler.disable
    def attend(self, query: Tensor, key: Tensor, value: Tensor, metadata: Any) -> Tensor | None:
        """Compute a call sparsely, or return None; tensors are `[B, S, H, D]`."""
        from vllm_omni.diffusion.forward_context import (
            get_forward_context,
            is_forward_context_available,
        )

        if self.settings.density == 1.0:
            return None
        context = get_forward_context() if is_forward_context_available() else None
        layout = self._layout(metadata)
        if isinstance(layout, str) or context is None:
            _reasons(f"{layout if context else 'no forward context is set'}; such calls stay dense")
            return None
        step = context.denoise_step_idx
        generation = generation_of(context, step, self.settings)
        out = generation.attend(
            *(t.transpose(1, 2) for t in (query, key, value)),
            layout=layout,
            step=step,
            num_steps=context.total_denoise_steps,
            layer=self.number or 0,
            branch=generation.branch(step, self.name, 0),
            transformer=self.name,
            scale=self.scale,
        )
        return None if out is None else out.transpose(1, 2)

    def _layout(self, metadata: Any) -> TokenLayout | str:
        """Return where the tokens of a call are, or why that is not known."""
        if self.causal:
            return "causal attention is not supported"
        if self.number is None and self.settings.dense_layers:
            return f"the name {self.name!r} says no number of a layer for skip_layers"
        video = getattr(metadata, "video_layout", None)
        if video is None:
            return "the model publishes no video_layout"
        if metadata.attn_mask is not None or metadata.full_attn_spans is not None:
            return "calls with a mask are not supported"
        if metadata.joint_query is not None:
            return "joint queries beside the sequence are not supported"
        if video.video_spans or video.latent_grid is None:
            return "several videos in one sequence are not supported"
        return TokenLayout(
            grid=video.latent_grid, text_tokens=video.prefix_len or 0, text_position="first"
        )


def generation_of(context: Any, step: int | None, settings: Settings) -> Generation:
    """Return what a forward context, which lives as long as its request, remembers.

    A step before the last one begins a new generation in the same context.
    """
    held = getattr(context, _HELD, None)
    if held is None or (step is not None and step < held[1]):
        held = (Generation(settings, _reasons), -1)
    setattr(context, _HELD, (held[0], held[1] if step is None else step))
    return held[0]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: Mapping[str, Any],
    is_causal: bool,
    softmax_scale: float,
) -> Tensor:
    """Compute attention, sparsely where it can be; the entry point in `vllm_omni.sparse_attn`.

    A function is told neither its layer nor its branch. The calls of a step come in the same order
    in each step, so the number of a call stands for both.

    Args:
        query: `[B, S, H, D]`.
        key: `[B, S, H, D]`.
        value: `[B, S, H, D]`.
        params: settings of `svg_engines.Settings`, and what vLLM-Omni knows of this call.
        is_causal: whether attention is causal.
        softmax_scale: factor of the logits.

    Returns:
        Tensor shaped and typed as `query`.

    Raises:
        ValueError: if a setting is out of range, or names layers, which are not known here.
    """
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = _attend(q, k, v, params, is_causal, softmax_scale)
    if out is None:
        out = F.scaled_dot_product_attention(
            *(q, k, v),
            attn_mask=_mask(params.get("attn_mask")),
            is_causal=is_causal,
            scale=softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return out.transpose(1, 2)


attend.capabilities = {"supports_attention_mask": True}  # type: ignore[attr-defined]


@torch.compiler.disable
def _attend(
    query: Tensor, key: Tensor, value: Tensor, params: Mapping[str, Any], causal: bool, scale: float
) -> Tensor | None:
    """Compute a call of the function sparsely, or return None; tensors are `[B, H, S, D]`."""
    from vllm_omni.diffusion.forward_context import (
        get_forward_context,
        is_forward_context_available,
    )

    settings = Settings.from_mapping({n: v for n, v in params.items() if n in SETTINGS})
    if settings.dense_layers:
        raise ValueError("dense_layers needs the backend: a function is not told its layer")
    context = get_forward_context() if is_forward_context_available() else None
    layout = _layout_of(params, query.shape[2])
    reason = None
    if causal or params.get("attn_mask") is not None:
        reason = "causal and masked attention are not supported"
    elif context is None:
        reason = "no forward context is set"
    elif layout is None:
        reason = "the model publishes no geometry of its latents"
    if reason is not None or context is None or layout is None:
        _reasons(f"{reason}; such calls stay dense")
        return None
    step = _number(context.denoise_step_idx, params.get("denoise_step_idx"))
    num_steps = _number(context.total_denoise_steps, params.get("total_denoise_steps"))
    generation = generation_of(context, step, settings)
    return generation.attend(
        *(query, key, value),
        layout=layout,
        step=step,
        num_steps=num_steps,
        layer=0,
        branch=generation.branch(step, "function", 0),
        transformer="function",
        scale=scale,
    )


def _layout_of(params: Mapping[str, Any], tokens: int) -> TokenLayout | None:
    """Return where the tokens of a call of the function are, or None if that is not known."""
    frames = _number(params.get("total_latent_frames"))
    patches = _number(params.get("patches_per_frame"))
    if frames and patches:
        grid = (frames, 1, patches)
    elif params.get("latent_shape") is not None and params.get("patch_size") is not None:
        sizes, sides = (
            torch.as_tensor(params[n]).view(-1, 3)[0] for n in ("latent_shape", "patch_size")
        )
        frames, rows, columns = (int(n) for n in (sizes // sides))
        grid = (frames, rows, columns)
    else:
        return None
    return TokenLayout(grid=grid)


def _number(*values: Any) -> int | None:
    """Return the first value that is given: a number, or a tensor with one per sample."""
    for value in values:
        if isinstance(value, Tensor):
            return int(value.flatten()[0])
        if value is not None:
            return int(value)
    return None


def _mask(mask: Tensor | None) -> Tensor | None:
    """Return a mask of keys `[B, S]` as torch's attention takes it; others as they are."""
    return mask if mask is None or mask.ndim != 2 else mask.bool()[:, None, None]
