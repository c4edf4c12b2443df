"""Attention processors: what they have in common, for attention to video alone and with text."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from svg_models import attention_op
from svg_models.families.modes import foreign_mode
from svg_models.families.steps import Values, project_out

__all__ = [
    "JointProcessor",
    "SparseProcessor",
    "StandIn",
    "VideoProcessor",
    "original_of",
    "put_processor",
]


class StandIn:
    """Base of what stands in front of an attention processor for a while.

    Settings that diffusers keeps on processors (attention backend, parallel configuration) are read
    from and written to the one behind, so they survive `restore`. A deep copy of the model gets a
    copy of the one behind, so that it is a plain dense model; so does what is loaded from a pickle.

    Args:
        original: the processor behind.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the processor behind."""
        return _same, (self.original,)

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


class SparseProcessor(StandIn):
    """Base of the attention processors that ask a sparse run what to compute.

    Args:
        original: the processor it replaces.
        handle: names the run and the attention, from `svg_models.attention_op.make_handle`.
    """

    def __init__(self, original: Any, handle: Tensor) -> None:
        super().__init__(original)
        self.handle = handle

    def stands_aside(self) -> bool:
        """Return whether the processor that was replaced has to compute this call, and say so."""
        mode = foreign_mode()
        if not mode:
            return False
        if not torch.compiler.is_compiling():
            _tell(self.handle, mode)
        return True

    def begin(self, query: Tensor, key: Tensor) -> None:
        """Give what `attend` gets next while values are still to be computed."""
        attention_op.begin(query, key, self.handle)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend `[B, S, H, D]` to itself; under context parallelism S is this rank's share."""
        return attention_op.attention(query, key, value, self.handle)


class VideoProcessor(SparseProcessor, ABC):
    """Self-attention over video tokens alone; any other call goes to the processor it replaced.

    Attributes:
        rotation_name: what that processor calls the rotation; empty where it takes it fifth.
    """

    rotation_name: ClassVar[str] = ""

    @abstractmethod
    def prepare(
        self, attn: Any, hidden_states: Tensor, rotation: Any
    ) -> tuple[Tensor, Tensor, Values]:
        """Return query and key, normalised and rotated, and what computes the value.

        All are `[B, S, H, D]`.

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
        masked = encoder_hidden_states is not None or attention_mask is not None
        if masked or self.stands_aside():
            rotation = {self.rotation_name: image_rotary_emb} if self.rotation_name else {}
            given = (attn, hidden_states, encoder_hidden_states, attention_mask)
            rest = () if rotation else (image_rotary_emb,)
            out: Tensor = self.original(*given, *rest, **rotation)
            return out
        query, key, values = self.prepare(attn, hidden_states, image_rotary_emb)
        self.begin(query, key)
        return project_out(attn, self.attend(query, key, values()).type_as(query))


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
    ) -> tuple[Tensor, Tensor, Values]:
        """Return query and key, normalised, the video part rotated, and what computes the value.

        All are `[B, S, H, D]`.

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
        masked = attention_mask is not None and not self.mask_is_padding
        if masked or self.stands_aside():
            return self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        query, key, values = self.prepare(
            attn, hidden_states, encoder_hidden_states, image_rotary_emb
        )
        self.begin(query, key)
        return self.finish(attn, self.attend(query, key, values()), encoder_hidden_states.shape[1])


def original_of(processor: Any) -> Any:
    """Return the model's own processor behind those that were put in front of it."""
    while hasattr(processor, "original"):
        processor = processor.original
    return processor


def put_processor(module: Any, processor: Any) -> None:
    """Put a processor into an attention; that of Mochi has no method for it."""
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


def _tell(handle: Tensor, mode: str) -> None:
    owner = attention_op.owner(int(handle[0]))
    if owner is not None:
        owner.tell(
            f"{mode} may change or watch torch's attention, so under it attention is dense, by the "
            "model's own processors"
        )


def _same(processor: Any) -> Any:
    return processor
