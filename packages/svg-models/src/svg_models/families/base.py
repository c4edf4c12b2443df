"""What a model family declares, and the steps its attention processor shares with all others."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from svg_models import operator
from svg_models.recipes import Published

__all__ = [
    "DenseKernel",
    "Family",
    "JointProcessor",
    "SparseProcessor",
    "VideoProcessor",
    "dense_attention",
    "patch_grid",
    "project_heads",
    "project_out",
    "project_qkv",
    "rotate_pairs",
    "rotate_video",
    "split_heads",
    "torch_attention",
]


class DenseKernel(Protocol):
    """Dense attention exactly as the model's own processor computes it."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        backend: Any = None,
        key_lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Attend `[B, S, H, D]` to the first `key_lengths` keys of each sample."""
        ...


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    backend: Any = None,
    key_lengths: tuple[int, ...] | None = None,
) -> Tensor:
    """Compute dense attention by diffusers' dispatcher, the kernel the stock processor would use.

    Padding is cut off instead of masked: the result is the same within rounding, but a mask rules
    out the fastest kernels and some stock processors make one of `S` times `S`.

    Args:
        query: `[B, S, H, D]`.
        key: as `query`.
        value: as `query`.
        backend: what the user set with `set_attention_backend`, or None for the active one.
        key_lengths: only that many first keys of each sample are read; None for all.

    Returns:
        `[B, S, H, D]`.
    """
    if key_lengths is not None and len(set(key_lengths)) > 1:
        samples = [
            dense_attention(
                *(x[i : i + 1] for x in (query, key, value)), backend=backend, key_lengths=(length,)
            )
            for i, length in enumerate(key_lengths)
        ]
        return torch.cat(samples)
    if key_lengths is not None:
        key, value = key[:, : key_lengths[0]], value[:, : key_lengths[0]]
    out: Tensor = dispatch_attention_fn(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, backend=backend
    )
    return out


def torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    backend: Any = None,
    key_lengths: tuple[int, ...] | None = None,
) -> Tensor:
    """Compute dense attention by torch, for stock processors that ask no dispatcher.

    Takes and returns what `dense_attention` does; `backend` is not read.
    """
    return dense_attention(query, key, value, backend="native", key_lengths=key_lengths)


def text_to_video(transformer: Any) -> str:
    """Name the only task of a transformer that has one."""
    return "t2v"


def no_padding(transformer: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """Say that all text tokens count."""
    return None


def no_objection(transformer: Any) -> str:
    """Find nothing against making a transformer sparse."""
    return ""


def patch_grid(transformer: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the token grid of `[B, C, F, H, W]` latents: their sizes over those of a patch.

    Args:
        transformer: has three numbers as `config.patch_size`, or one beside `config.patch_size_t`.
        arguments: of its forward pass, with `hidden_states`.

    Returns:
        Latent frames, rows and columns of tokens.
    """
    frames, rows, columns = arguments["hidden_states"].shape[2:]
    patch = transformer.config.patch_size
    if isinstance(patch, int):
        patch = (transformer.config.patch_size_t, patch, patch)
    return frames // patch[0], rows // patch[1], columns // patch[2]


def nothing_unusual(transformer: Any) -> Mapping[str, Any]:
    """Leave what a clip is like by default to the pipeline."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that one kind of transformer has of its own.

    Attributes:
        name: short name, for example `"wan"`.
        title: the models it covers, for people.
        transformers: class names of the transformers; subclasses count too.
        attentions: regular expression that the module path of each video self-attention matches;
            or several, where modules run in another order than the model lists them.
        stock_processors: class names of the processors that `processor` reproduces; any other is
            refused, because replacing it would lose what it does.
        processor: the attention processor that takes their place.
        grid: latent frames, rows and columns of tokens, from the transformer and the arguments of
            its forward pass by name.
        task: names what a transformer was trained for, `"t2v"` or `"i2v"`: which recipes fit it.
        checkpoints: names on the hub of those whose attentions were checked.
        recipes: published settings; without any, those that most models share.
        text_position: where text tokens stand in the self-attention's sequence; None if nowhere.
        text_lengths: valid text tokens of each sample, integers `[B]` on the model's device, from
            the transformer and the arguments of its forward pass by name; None if all count. The
            valid ones come first.
        dense: the kernel of dense steps.
        usual: what a clip is like by default, from the transformer, where the pipeline's call does
            not say it or says it for another checkpoint; fields of `svg_models.loading.Defaults`.
        objection: says in one sentence why a certain transformer of these classes cannot be made
            sparse; empty where nothing speaks against it.
    """

    name: str
    title: str
    transformers: tuple[str, ...]
    attentions: str | tuple[str, ...]
    stock_processors: tuple[str, ...]
    processor: type[SparseProcessor]
    grid: Callable[[Any, Mapping[str, Any]], tuple[int, int, int]]
    task: Callable[[Any], str] = text_to_video
    checkpoints: tuple[str, ...] = ()
    recipes: tuple[Published, ...] = ()
    text_position: Literal["first", "last"] | None = None
    text_lengths: Callable[[Any, Mapping[str, Any]], Tensor | None] = no_padding
    dense: DenseKernel = dense_attention
    usual: Callable[[Any], Mapping[str, Any]] = nothing_unusual
    objection: Callable[[Any], str] = no_objection

    def __post_init__(self) -> None:
        if self.text_lengths is not no_padding and self.text_position != "last":
            raise ValueError(
                f"family {self.name!r} has padded text, which must stand last, "
                f"got text_position {self.text_position!r}"
            )

    def covers(self, transformer: nn.Module) -> bool:
        """Tell whether `transformer` is of this family."""
        return any(cls.__name__ in self.transformers for cls in type(transformer).__mro__)

    def find_attentions(self, transformer: nn.Module) -> list[tuple[str, Any]]:
        """Return path and module of each video self-attention, in the order they run.

        Raises:
            ValueError: if there is none, or one has a processor that is not reproduced.
        """
        patterns = (self.attentions,) if isinstance(self.attentions, str) else self.attentions
        found: list[tuple[str, Any]] = [
            (path, module)
            for pattern in patterns
            for path, module in transformer.named_modules()
            if re.fullmatch(pattern, path)
        ]
        if not found:
            raise ValueError(
                f"{type(transformer).__name__} has no module matching {self.attentions!r}, "
                f"so family {self.name!r} cannot make it sparse"
            )
        for path, module in found:
            processor = type(module.processor).__name__
            if processor not in self.stock_processors:
                raise ValueError(
                    f"expected {' or '.join(self.stock_processors)} at {path}, got {processor}; "
                    "call sparsify before installing other attention processors"
                )
        return found


class SparseProcessor:
    """Base of the attention processors that ask a sparse run what to compute.

    It stands in front of the processor it replaced: settings that diffusers keeps on processors
    (attention backend, parallel configuration) are read from and written to that one, so they
    survive `restore`. A deep copy of the model gets a copy of the replaced processor, so that it is
    a plain dense model.

    Args:
        original: the processor it replaces.
        handle: names the run and the attention, from `svg_models.operator.make_handle`.
    """

    def __init__(self, original: Any, handle: Tensor) -> None:
        self.original = original
        self.handle = handle

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend `[B, S, H, D]` to itself; under context parallelism S is this rank's share."""
        parallel = getattr(self.original, "_parallel_config", None)
        if parallel is None:
            return operator.attention(query, key, value, self.handle)
        return _attend_over_ranks(query, key, value, self.handle, parallel)


class VideoProcessor(SparseProcessor, ABC):
    """Self-attention over video tokens alone; any other call goes to the processor it replaced."""

    @abstractmethod
    def prepare(
        self, attn: Any, hidden_states: Tensor, rotation: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value as `[B, S, H, D]`, normalised and rotated.

        Args:
            attn: the attention module.
            hidden_states: `[B, S, C]`.
            rotation: what the model hands to its attentions, usually cosines and sines; or None.
        """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        """Compute the attention of one block, `[B, S, C]` in and out."""
        if encoder_hidden_states is not None or attention_mask is not None:
            out: Tensor = self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return out
        query, key, value = self.prepare(attn, hidden_states, image_rotary_emb)
        return project_out(attn, self.attend(query, key, value).type_as(query))


class JointProcessor(SparseProcessor, ABC):
    """Attention of text and video in one sequence.

    Attributes:
        mask_is_padding: whether an attention mask only cuts off padded text, of which the run knows
            by `Family.text_lengths`; otherwise a masked call goes to the processor it replaced.
    """

    mask_is_padding: ClassVar[bool] = False

    @abstractmethod
    def prepare(
        self, attn: Any, video: Tensor, text: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value as `[B, S, H, D]`, normalised and the video part rotated.

        Args:
            attn: the attention module.
            video: `[B, S_video, C]`.
            text: `[B, S_text, C]`.
            rotation: cosines and sines of the video tokens, or None.
        """

    @abstractmethod
    def finish(self, attn: Any, states: Tensor, text: int) -> tuple[Tensor, Tensor]:
        """Part what attention returned into video and text and project both.

        Args:
            attn: the attention module.
            states: `[B, S, H, D]`.
            text: how many of the tokens are text.
        """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """Compute the attention of one block; return video and text, shaped as they came."""
        if attention_mask is not None and not self.mask_is_padding:
            return self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        query, key, value = self.prepare(
            attn, hidden_states, encoder_hidden_states, image_rotary_emb
        )
        return self.finish(attn, self.attend(query, key, value), encoder_hidden_states.shape[1])


def _attend_over_ranks(
    query: Tensor, key: Tensor, value: Tensor, handle: Tensor, config: Any
) -> Tensor:
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    def local_heads(
        _: Any, q: Tensor, k: Tensor, v: Tensor, *unused: Any, **options: Any
    ) -> Tensor:
        return operator.attention(q.contiguous(), k.contiguous(), v.contiguous(), handle)

    out: Tensor = _templated_context_parallel_attention(
        query, key, value, forward_op=local_heads, backward_op=None, _parallel_config=config
    )
    return out


def project_qkv(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project tokens to query, key and value, each `[B, S, H * D]`, by one or three layers.

    Only calls modules and reads no weights, so LoRA, quantised layers and offloading keep working.
    """
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return query, key, value
    return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)


def split_heads(states: Tensor, heads: int) -> Tensor:
    """View `[B, S, H * D]` as `[B, S, H, D]`."""
    return states.unflatten(2, (heads, -1))


def project_heads(attn: Any, *streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project tokens to query, key and value, `[B, S, H, D]`, and normalise the first two by head.

    For attentions whose norms take one head at a time, of whatever kind these are.

    Args:
        attn: the attention module.
        *streams: one or more `[B, S_i, C]`, joined in this order.

    Returns:
        Three tensors `[B, S, H, D]`.
    """
    states = streams[0] if len(streams) == 1 else torch.cat(streams, dim=1)
    query, key, value = (split_heads(x, attn.heads) for x in project_qkv(attn, states))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value


def rotate_video(
    query: Tensor, key: Tensor, rotation: tuple[Tensor, Tensor] | None, video: slice
) -> None:
    """Rotate neighbouring channels of the video tokens in place, by diffusers' own function.

    Args:
        query: `[B, S, H, D]`.
        key: as `query`.
        rotation: cosines and sines, `[S_video, D]`; None for a model without.
        video: where the video tokens are in the sequence.
    """
    if rotation is not None:
        for states in (query, key):
            states[:, video] = apply_rotary_emb(states[:, video], rotation, sequence_dim=1)


def rotate_pairs(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels of `[B, S, H, D]` by their position's angle.

    `y[2i] = x[2i] cos - x[2i+1] sin`, `y[2i+1] = x[2i] sin + x[2i+1] cos`, multiplied in the wider
    of both dtypes and rounded once, in diffusers' order of operations, so that the bits agree.

    Args:
        states: `[B, S, H, D]`.
        cos: `[1, S, 1, D]`, each angle's value twice.
        sin: as `cos`.

    Returns:
        Tensor shaped and typed as `states`.
    """
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(states)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def project_out(attn: Any, states: Tensor) -> Tensor:
    """Join the heads of `[B, S, H, D]` and apply the output projection."""
    states = attn.to_out[0](states.flatten(2, 3))
    out: Tensor = attn.to_out[1](states)
    return out
