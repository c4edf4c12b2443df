"""What every method offers, and what they share about token order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from svg_attention.layout import TokenLayout
from svg_attention.memory import LayerMemory
from svg_attention.plan import SparsePlan
from svg_attention.tiles import TILE_ROWS, count_tiles

if TYPE_CHECKING:
    from typing_extensions import Self


@runtime_checkable
class Method(Protocol):
    """Choose, for one self-attention call, which keys each query reads.

    A method is its own configuration: an immutable dataclass with a JSON round trip.
    """

    def plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: TokenLayout,
        memory: LayerMemory,
        text_lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
        scale: float | None = None,
    ) -> SparsePlan:
        """Return the plan of this call, built on the device without a host synchronisation.

        Args:
            query: `[B, H, S, D]`.
            key: `[B, H_kv, S, D]`, `H` a multiple of `H_kv`.
            value: `[B, H_kv, S, D]`.
            layout: where the video and text tokens are.
            memory: what this method left at the previous step of this layer; it is updated.
            text_lengths: integers `[B]` on the device, valid text tokens; None for all.
            generator: source of all random draws.
            scale: factor of the logits, `D ** -0.5` when None.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the fields as plain JSON values."""
        ...


class MethodConfig:
    """Give a method's dataclass its JSON round trip."""

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the fields as plain JSON values."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}  # type: ignore[arg-type]
        return {"name": type(self).__name__, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a method from what `to_dict` returned.

        Raises:
            ValueError: if `values` names another method.
        """
        settings = dict(values)
        name = settings.pop("name", cls.__name__)
        if name != cls.__name__:
            raise ValueError(f"these are the settings of {name!r}, not of {cls.__name__!r}")
        return cls(**settings)


def check_call(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, text_lengths: Tensor | None
) -> None:
    """Raise ValueError unless the tensors are one self-attention call over `layout`."""
    if query.dim() != 4:
        raise ValueError(f"query must be [B, H, S, D], got {tuple(query.shape)}")
    batch, heads, tokens, _ = query.shape
    if key.dim() != 4 or key.shape[:3] != value.shape[:3] or key.shape[0] != batch:
        raise ValueError(
            "key and value must both be [B, H_kv, S, D] with the batch of query, "
            f"got {tuple(key.shape)} and {tuple(value.shape)} for query {tuple(query.shape)}"
        )
    if heads % key.shape[1]:
        raise ValueError(f"{heads} query heads are not a multiple of {key.shape[1]} key heads")
    if tokens != layout.tokens or key.shape[2] != layout.tokens:
        raise ValueError(
            f"the layout {layout.grid} with {layout.text_tokens} text tokens has {layout.tokens} "
            f"tokens, but query has {tokens} and key {key.shape[2]}"
        )
    if text_lengths is not None and tuple(text_lengths.shape) != (batch,):
        raise ValueError(
            f"text_lengths must be one number per batch item, [{batch}], "
            f"got {tuple(text_lengths.shape)}"
        )


def valid_text(
    layout: TokenLayout, text_lengths: Tensor | None, batch: int, like: Tensor
) -> Tensor:
    """Return the valid text tokens of each batch item, int32 `[B]` on the device of `like`."""
    if text_lengths is None:
        return torch.full((batch,), layout.text_tokens, dtype=torch.int32, device=like.device)
    return text_lengths.to(device=like.device, dtype=torch.int32).clamp(0, layout.text_tokens)


def text_rows(
    layout: TokenLayout, text_lengths: Tensor | None, batch: int, like: Tensor
) -> Tensor | int:
    """Return the valid text tokens, as a number where it is the same for every batch item."""
    if text_lengths is None:
        return layout.text_tokens
    return valid_text(layout, text_lengths, batch, like)


def valid_tokens(
    layout: TokenLayout, text_lengths: Tensor | None, batch: int, like: Tensor
) -> Tensor | None:
    """Return the valid tokens of each batch item, int32 `[B]`; None when there is no padding."""
    if text_lengths is None or not layout.text_tokens:
        return None
    return layout.video_tokens + valid_text(layout, text_lengths, batch, like)


def token_order(layout: TokenLayout, video_order: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the canonical plan order: video, as `video_order` permutes it, then text.

    Args:
        layout: where the tokens are.
        video_order: integers `[B, H, video_tokens]` counted from the first video token, or None.
        like: a tensor `[B, H, ...]` on the device.

    Returns:
        int32 `[B, H, tokens]`, or None where it would be the given order.
    """
    if video_order is None and layout.video_start == 0:
        return None
    if video_order is not None and layout.text_tokens == 0:
        return video_order.to(torch.int32)
    batch, heads = like.shape[:2]
    text = torch.arange(layout.text_tokens, dtype=torch.int32, device=like.device)
    text = (text + layout.text_start).expand(batch, heads, -1)
    if video_order is None:
        video = torch.arange(layout.video_tokens, dtype=torch.int32, device=like.device)
        video_order = video.expand(batch, heads, -1)
    if layout.video_start:
        video_order = video_order + layout.video_start
    return torch.cat([video_order.to(torch.int32), text], dim=-1)


def text_tiles(layout: TokenLayout, text: Tensor, tile_rows: int = TILE_ROWS) -> Tensor:
    """Return which tiles hold a valid text row: bool `[B, T]`, in canonical plan order.

    Args:
        layout: where the tokens are.
        text: integers `[B]`, valid text tokens.
        tile_rows: query rows of a tile.
    """
    first = torch.arange(count_tiles(layout.tokens, tile_rows), device=text.device) * tile_rows
    end = (layout.video_tokens + text)[:, None]
    return (first + tile_rows > layout.video_tokens) & (first < end) & (text[:, None] > 0)


def full_tiles(
    layout: TokenLayout, text_lengths: Tensor | None, batch: int, like: Tensor
) -> Tensor | None:
    """Return which tiles read everything: bool `[B or 1, 1, T]`, or None where none does.

    Args:
        layout: where the tokens are.
        text_lengths: integers `[B]`, valid text tokens; None for all.
        batch: batch items.
        like: a tensor on the device.
    """
    if layout.text_tokens == 0:
        return None
    if text_lengths is not None:
        return text_tiles(layout, valid_text(layout, text_lengths, batch, like))[:, None]
    tiles = count_tiles(layout.tokens)
    full = torch.zeros(1, 1, tiles, dtype=torch.bool, device=like.device)
    full[..., layout.video_tokens // TILE_ROWS :] = True
    return full


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a fraction above 0 and at most 1."""
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must lie in (0, 1], got {value}")
