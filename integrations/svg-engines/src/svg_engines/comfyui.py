"""ComfyUI: an attention override for its models of Wan and HunyuanVideo.

ComfyUI calls `transformer_options["optimized_attention_override"]` in place of each attention. That
call knows neither the grid of the video nor the step, so a wrapper around the whole forward pass of
the model, which sees the latents, leaves both in the same options.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svg_attention import TokenLayout
from svg_engines.generation import Generation, Reasons
from svg_engines.settings import Settings

KEY = "sparse_videogen"
OVERRIDE = "optimized_attention_override"
# How often a range of sampling is halved to find how far it is, and decimals that this leaves.
_HALVINGS, _DECIMALS = 24, 5
# Overrides that stand before each other; more than anybody would chain.
_MOST_OVERRIDES = 32


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What the attention calls of one forward pass share.

    Attributes:
        grid: latent frames, rows and columns after patching.
        double_blocks: blocks before HunyuanVideo's single ones; None for Wan.
        step: denoising step from 0.
        num_steps: denoising steps.
        progress: share of the sampling that is done.
        branch: guidance branches of the batch.
    """

    grid: tuple[int, int, int]
    double_blocks: int | None
    step: int
    num_steps: int
    progress: float
    branch: str


class SparseModel:
    """What one patched model remembers while it samples.

    Args:
        settings: what was asked for.
        percent_to_sigma: noise level at a share of the sampling, as the model's schedule has it.
    """

    def __init__(self, settings: Settings, percent_to_sigma: Callable[[float], float]) -> None:
        self._settings = settings
        self._percent_to_sigma = percent_to_sigma
        self.reasons = Reasons("comfyui")
        self.generation = Generation(settings, self.reasons)

    def reset(self, *_: Any) -> None:
        """Forget the video that was sampled."""
        self.generation = Generation(self._settings, self.reasons)

    def begin(self, *_: Any) -> None:
        """Begin a run: nothing of the one before is remembered, and reasons are said again."""
        self.reasons.forget()
        self.reset()

    def forward(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward pass with what is known of it in its options."""
        values = [*args, *kwargs.values()]
        options = next((o for o in values if isinstance(o, dict) and "uuids" in o), None)
        if options is None:
            self.reasons("the forward pass has no transformer_options; it stays dense")
            return executor(*args, **kwargs)
        outer = options.get(KEY)
        options[KEY] = self._describe(executor.class_obj, args[0], options)
        try:
            return executor(*args, **kwargs)
        finally:
            options[KEY] = outer

    def install(self, options: dict[str, Any]) -> None:
        """Put our override before the one that is there, unless ours already stands before it.

        Nodes that are applied later may put theirs in its place, so this runs before each step.
        """
        previous = options.get(OVERRIDE)
        if not reaches(previous, self):
            options[OVERRIDE] = Override(self, previous)

    def prepare(self, patcher: Any, timestep: Any, model_options: Any = None) -> None:
        """Install the override in the options of the step that begins."""
        options = patcher.model_options if model_options is None else model_options
        self.install(options["transformer_options"])

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: dict[str, Any],
        scale: float | None,
    ) -> Tensor | None:
        """Compute a call sparsely, or return None; tensors are `[B, H, S, D]`."""
        forward = options.get(KEY)
        if not isinstance(forward, Forward):
            return None  # said in `_describe`
        video = math.prod(forward.grid)
        text = query.shape[2] - video
        if key.shape[2] != query.shape[2] or text < 0:
            return None  # cross-attention and the refiner of the text
        if text and forward.double_blocks is None:
            self.reasons(
                f"{query.shape[2]} tokens are more than the {video} of the video; with reference "
                "frames in its sequence, Wan stays dense"
            )
            return None
        index, kind = options.get("block_index"), options.get("block_type")
        if index is None or kind is None:
            self.reasons("this ComfyUI does not say which block calls; update it")
            return None
        layer = index + (forward.double_blocks or 0 if kind == "single" else 0)
        return self.generation.attend(
            query,
            key,
            value,
            layout=TokenLayout(grid=forward.grid, text_tokens=text, text_position="first"),
            step=forward.step,
            num_steps=forward.num_steps,
            progress=forward.progress,
            layer=layer,
            branch=forward.branch,
            scale=scale,
        )

    def _describe(self, model: Any, latents: Tensor, options: dict[str, Any]) -> Forward | None:
        """Return what the calls of a forward pass share; None if they stay dense, and say why."""
        name = type(model).__name__
        if name not in ("WanModel", "HunyuanVideo"):
            self.reasons(f"{name} is none of the models that are known (Wan, HunyuanVideo)")
            return None
        double = getattr(model, "double_blocks", None)
        if double is not None and getattr(double[0], "flipped_img_txt", False):
            self.reasons("this ComfyUI puts HunyuanVideo's text behind the video; update it")
            return None
        patch = tuple(model.patch_size)
        if latents.ndim != 5 or len(patch) != 3:
            self.reasons("the latents are no video")
            return None
        sigmas = options.get("sample_sigmas")
        if sigmas is None or options.get("sigmas") is None:
            self.reasons("the sampler does not say its noise levels (sample_sigmas)")
            return None
        levels = torch.as_tensor(sigmas).flatten().tolist()
        sigma = float(options["sigmas"].flatten()[0])
        tolerance = 1e-4 * max(sigma, 1e-3)
        done = sum(level >= sigma - tolerance for level in levels[:-1])
        frames, rows, columns = (
            -(-size // side) for size, side in zip(latents.shape[2:], patch, strict=True)
        )
        return Forward(
            grid=(frames, rows, columns),
            double_blocks=None if double is None else len(double),
            step=max(done - 1, 0),
            num_steps=max(len(levels) - 1, 1),
            progress=self._progress(sigma),
            branch="/".join(str(uuid) for uuid in options["uuids"]),
        )

    def _progress(self, sigma: float) -> float:
        """Return the share of the sampling at which the noise is down to a level."""
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if float(self._percent_to_sigma(middle)) >= sigma:
                low = middle
            else:
                high = middle
        return round(low, _DECIMALS)


class Override:
    """An attention override; calls that stay dense go to the override that was there before.

    Args:
        sparse: what decides and computes.
        previous: the override before this one, or None.
    """

    def __init__(self, sparse: SparseModel, previous: Callable[..., Tensor] | None) -> None:
        self.sparse = sparse
        self.previous = previous

    def __call__(
        self,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Compute one attention call of the model, in ComfyUI's layouts."""
        out = None
        options = kwargs.get("transformer_options") or {}
        same = q.shape == k.shape == v.shape
        if mask is not None and same:
            self.sparse.reasons("calls with an attention mask stay dense")
        elif same:
            query, key, value = (
                (t if skip_reshape else t.unflatten(2, (heads, -1)).transpose(1, 2))
                for t in (q, k, v)
            )
            out = self.sparse.attend(query, key, value, options, kwargs.get("scale"))
        if out is not None:
            return out if skip_output_reshape else out.transpose(1, 2).flatten(2)
        keywords = {
            "mask": mask,
            "attn_precision": attn_precision,
            "skip_reshape": skip_reshape,
            "skip_output_reshape": skip_output_reshape,
            **kwargs,
        }
        if self.previous is None:
            return func(q, k, v, heads, **keywords)
        return self.previous(func, q, k, v, heads, **keywords)


def reaches(override: Any, sparse: SparseModel) -> bool:
    """Return whether an override of a model is somewhere in a chain of overrides.

    Those of other nodes are mostly functions that hold the one before them in a closure.
    """
    waiting, seen = [override], 0
    while waiting and seen < _MOST_OVERRIDES:
        one, seen = waiting.pop(), seen + 1
        if isinstance(one, Override):
            if one.sparse is sparse:
                return True
            waiting.append(one.previous)
        for cell in getattr(one, "__closure__", None) or ():
            held = cell.cell_contents
            if callable(held) and not isinstance(held, type):
                waiting.append(held)
    return False


def apply(model: Any, settings: Settings) -> Any:
    """Return a copy of a `ModelPatcher` whose self-attention is sparse.

    Args:
        model: what ComfyUI's loaders give.
        settings: which calls become sparse.
    """
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    sampling = model.get_model_object("model_sampling")
    sparse = SparseModel(settings, sampling.percent_to_sigma)
    patched = model.clone()
    sparse.install(patched.model_options.setdefault("transformer_options", {}))
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, sparse.forward)
    patched.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, sparse.begin)
    patched.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, KEY, sparse.prepare)
    patched.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, sparse.reset)
    return patched
