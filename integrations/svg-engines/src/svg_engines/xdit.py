"""xDiT: a registered attention function for its Wan transformers.

xDiT calls an attention function by the name of a backend, and tells it neither layer nor step.
Hooks on the transformer know both. Names cannot be added, so ours stands behind one that is there
for as long as something is attached.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from svg_attention import TokenLayout
from svg_engines.generation import Generation, Reasons
from svg_engines.settings import Settings

# torch's slowest attention, which nobody generates video with, and no check of xDiT refuses.
NAME = "SDPA_MATH"


def attach(*transformers: nn.Module, num_steps: int, settings: Settings | None = None) -> Attached:
    """Make xDiT's Wan transformers sparse; they must run with the attention backend `NAME`.

    ```python
    attached = attach(pipe.transformer, num_steps=50)
    get_runtime_state().set_attention_backend("SDPA_MATH")
    ```

    Args:
        transformers: those of one pipeline; Wan 2.2 has two.
        num_steps: denoising steps of a video.
        settings: which calls become sparse; `Settings()` when None.

    Returns:
        A handle, whose `detach` takes everything back.

    Raises:
        ValueError: if a transformer has no blocks as Wan's, or ring attention is on.
    """
    from xfuser.core.distributed import get_ring_parallel_world_size

    if get_ring_parallel_world_size() > 1:
        raise ValueError(
            "a sparse plan needs the keys of the whole sequence; set ring_degree to 1, use Ulysses"
        )
    for transformer in transformers:
        blocks = getattr(transformer, "blocks", None)
        if not blocks or not all(hasattr(block, "attn1") for block in blocks):
            raise ValueError(
                f"{type(transformer).__name__} has no blocks with attn1, as Wan's transformers have"
            )
    return Attached(transformers, num_steps, settings or Settings())


class Attached:
    """Hooks on transformers, and the function behind `NAME`, until `detach`."""

    def __init__(
        self, transformers: Iterable[nn.Module], num_steps: int, settings: Settings
    ) -> None:
        from xfuser.core.distributed import attention_backend

        self.reasons = Reasons("xdit")
        self.generation = Generation(settings, self.reasons)
        self._settings, self._num_steps = settings, num_steps
        self._layout: TokenLayout | None = None
        self._step, self._branch, self._level = 0, "", float("-inf")
        self._site: tuple[str, int] | None = None
        self._registry = attention_backend.ATTENTION_FUNCTION_REGISTRY
        self._name = attention_backend.AttentionBackendType[NAME]
        self._original = self._registry[self._name]
        attention_backend.register_attention_function(self._name)(self.attend)
        self._hooks: list[Any] = []
        for number, transformer in enumerate(transformers):
            name = f"transformer {number}"
            self._hook(transformer, before=self._begin, with_kwargs=True)
            for layer, block in enumerate(transformer.blocks):  # type: ignore[arg-type]

                def enter(*_: Any, site: tuple[str, int] = (name, layer)) -> None:
                    self._site = site

                self._hook(block.attn1, before=enter, after=self._leave)

    def detach(self) -> None:
        """Take the hooks off and put back the function that was there."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._registry[self._name] = self._original

    @torch.compiler.disable
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float,
        is_causal: bool,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, None]:
        """Compute one call, as xDiT asks its attention functions; tensors are `[B, H, S, D]`."""
        out = None
        if self._site is not None and self._layout is not None:
            masked = (attention_kwargs or {}).get("attn_mask") is not None
            if is_causal or masked or dropout_p:
                self.reasons("causal, masked and dropped attention stays dense")
            else:
                transformer, layer = self._site
                out = self.generation.attend(
                    *(query, key, value),
                    layout=self._layout,
                    step=self._step,
                    num_steps=self._num_steps,
                    layer=layer,
                    branch=self._branch,
                    transformer=transformer,
                )
        if out is None:
            mask = (attention_kwargs or {}).get("attn_mask")
            out = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal
            )
        return out, None

    def _hook(self, module: Any, *, before: Any, after: Any = None, **options: Any) -> None:
        self._hooks.append(module.register_forward_pre_hook(before, **options))
        if after is not None:
            self._hooks.append(module.register_forward_hook(after, always_call=True))

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read step, branch and grid of a forward pass; a noise level that rises is a new video."""
        names = ("hidden_states", "timestep")
        latents, timestep = (
            kwargs[name] if name in kwargs else args[place] for place, name in enumerate(names)
        )
        level = float(timestep.flatten().max())
        if level > self._level:
            self.generation = Generation(self._settings, self.reasons)
        self._level, self._site = level, None
        self._step = self.generation.step_of(level)
        self._branch = self.generation.branch(self._step, "forward", 0)
        sides = module.config.patch_size
        frames, rows, columns = (
            size // side for size, side in zip(latents.shape[2:], sides, strict=True)
        )
        self._layout = TokenLayout(grid=(frames, rows, columns))

    def _leave(self, *_: Any) -> None:
        self._site = None
