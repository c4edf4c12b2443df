"""One self-attention call, checked, and where its tokens stand in a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from svg_attention import config
from svg_attention.layout import TokenLayout
from svg_attention.memory import LayerMemory
from svg_attention.plan import SparsePlan
from svg_attention.tiles import TILE_ROWS, count_tiles


class Arrivals:
    """Tensors of a call that are still on their way to this device.

    Their shapes and types may be read at any time, their numbers after `wait` alone.

    Args:
        give: takes the output, `[B, H, S, D]`, on its way to other devices; None if nobody does.
        pending: what waits for each of them, by the name that the call has for it; on a GPU the
            host goes on, and what it launches from then on waits.
    """

    def __init__(
        self, give: Callable[[Tensor], None] | None = None, /, **pending: Callable[[], None]
    ) -> None:
        self._give, self._pending = give, pending

    def give(self, out: Tensor) -> None:
        """Let other devices have the output, before anything is launched that they need not."""
        if self._give is not None:
            self._give(out)

    def wait(self, *names: str) -> None:
        """Wait for tensors by their names, or for all if none is named; again does no harm."""
        for name in names or tuple(self._pending):
            finish = self._pending.pop(name, None)
            if finish is not None:
                finish()


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadShare:
    """Tell a call that it is made for some heads of a layer, whose others are on other devices.

    Heads are planned one by one, but where they share keys or random draws, a plan must be the same
    however many devices there are.

    Attributes:
        first: number of the call's first head in the layer.
        heads: how many the layer has.
        gather: returns `[B, H, ...]` of all heads of the layer, given it of the call's heads; all
            devices call it alike.
        count: the call's heads.
        devices: how many there are.
        order: int64 `[H]`, the heads of the first device, then those of the second, and so on;
            `first` is then a place in it. None for the order of their numbers.
        deals: whether a layer may be dealt out anew once it is known what its heads cost.
        arrivals: keys and values that other devices are still sending, while the call begins with
            what is here.
    """

    first: int
    heads: int
    gather: Callable[[Tensor], Tensor]
    count: int = 0
    devices: int = 1
    order: Tensor | None = None
    deals: bool = False
    arrivals: Arrivals = field(default_factory=Arrivals)

    def here(self, order: Tensor) -> Tensor:
        """Return the entries of an order of all heads that are of this device."""
        return order[self.first : self.first + self.count]


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """Hold what a method plans from; raises unless it is one self-attention call over the layout.

    In canonical plan order the video stands first, permuted as a method likes, then the text, of
    which the valid tokens come first.

    Attributes:
        query: `[B, H, S, D]`.
        key: `[B, H_kv, S, D]`, `H` a multiple of `H_kv`.
        value: `[B, H_kv, S, D_v]`.
        layout: where the video and text tokens are.
        memory: what the method left at the previous step of this layer; a plan updates it.
        leader: the memory of another guidance branch that planned this step before; None if there
            is none, or if this call chooses for itself.
        text_lengths: integers `[B]` on the device, valid text tokens; None for all.
        generator: source of all random draws.
        scale: factor of the logits; `D ** -0.5` if it was not given.
        head_share: which of the layer's heads these are; None for all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    layout: TokenLayout
    memory: LayerMemory = field(default_factory=LayerMemory)
    leader: LayerMemory | None = None
    text_lengths: Tensor | None = None
    generator: torch.Generator | None = None
    scale: float = 0.0
    head_share: HeadShare | None = None

    def __post_init__(self) -> None:
        query, key, value = (
            config.tensor(name, getattr(self, name)) for name in ("query", "key", "value")
        )
        layout = self.layout
        if not isinstance(layout, TokenLayout):
            raise TypeError(f"layout must be a TokenLayout, got {layout!r}")
        if query.dim() != 4:
            raise ValueError(f"query must be [B, H, S, D], got {tuple(query.shape)}")
        batch, heads, tokens, width = query.shape
        if key.dim() != 4 or key.shape[:3] != value.shape[:3] or key.shape[0] != batch:
            raise ValueError(
                "key and value must both be [B, H_kv, S, D] with the batch of query, "
                f"got {tuple(key.shape)} and {tuple(value.shape)} for query {tuple(query.shape)}"
            )
        if not query.is_floating_point():
            raise TypeError(f"query must be of a floating dtype, got {query.dtype}")
        if 0 in (*query.shape, *key.shape, *value.shape):
            raise ValueError(
                "a call must have batch items, heads, tokens and channels, got "
                f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
            )
        if heads % key.shape[1]:
            raise ValueError(f"{heads} query heads are not a multiple of {key.shape[1]} key heads")
        if tokens != layout.tokens or key.shape[2] != layout.tokens:
            raise ValueError(
                f"the layout {layout.grid} with {layout.text_tokens} text tokens has "
                f"{layout.tokens} tokens, but query has {tokens} and key {key.shape[2]}"
            )
        if self.text_lengths is not None and tuple(self.text_lengths.shape) != (batch,):
            raise ValueError(
                f"text_lengths must be one number per batch item, [{batch}], "
                f"got {tuple(self.text_lengths.shape)}"
            )
        if not self.scale:
            object.__setattr__(self, "scale", width**-0.5)

    @property
    def batch(self) -> int:
        """Batch size."""
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.query.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.query.device

    def wait(self, *names: str) -> None:
        """Have what follows wait for "key" or "value", or for both; see `Arrivals`."""
        if self.head_share is not None:
            self.head_share.arrivals.wait(*names)

    def video(self, x: Tensor) -> Tensor:
        """Return the video rows of `query`, `key` or `value`, a view."""
        start = self.layout.video_start
        return x[:, :, start : start + self.layout.video_tokens]

    def valid_text(self) -> Tensor:
        """Return the valid text tokens of each batch item, int32 `[B]`."""
        most = self.layout.text_tokens
        if self.text_lengths is None:
            return torch.full((self.batch,), most, dtype=torch.int32, device=self.device)
        return self.text_lengths.to(device=self.device, dtype=torch.int32).clamp(0, most)

    def text_rows(self) -> Tensor | int:
        """Return the valid text tokens, as a number where all batch items have the same."""
        return self.layout.text_tokens if self.text_lengths is None else self.valid_text()

    def valid_tokens(self, rows: int | None = None) -> Tensor | None:
        """Return the valid tokens of each batch item, int32 `[B]`, or None for all.

        Args:
            rows: video rows, if probes are counted among them; the video tokens when None.
        """
        if self.text_lengths is None or self.layout.text_tokens == 0:
            return None
        return self.valid_text() + (self.layout.video_tokens if rows is None else rows)

    def token_order(self, video_order: Tensor | None, heads: int) -> Tensor | None:
        """Return the canonical plan order: video, as `video_order` permutes it, then text.

        Args:
            video_order: integers `[B, heads, video_tokens]` counted from the first video token;
                None for the given order.
            heads: query heads or key heads.

        Returns:
            int32 `[B, heads, tokens]`, or None where it would be the given order.
        """
        layout = self.layout
        if video_order is None and layout.video_start == 0:
            return None
        if video_order is not None and layout.text_tokens == 0:
            return video_order.to(torch.int32)
        text = torch.arange(layout.text_tokens, dtype=torch.int32, device=self.device)
        text = (text + layout.text_start).expand(self.batch, heads, -1)
        if video_order is None:
            video = torch.arange(layout.video_tokens, dtype=torch.int32, device=self.device)
            video_order = video.expand(self.batch, heads, -1)
        if layout.video_start:
            video_order = video_order + layout.video_start
        return torch.cat([video_order.to(torch.int32), text], dim=-1)

    def full_tiles(self, rows: int | None = None) -> Tensor | None:
        """Return which tiles read everything: bool `[B or 1, 1, T]`, or None where none does.

        Args:
            rows: video rows, if probes are counted among them; the video tokens when None.
        """
        text = self.layout.text_tokens
        if text == 0:
            return None
        rows = self.layout.video_tokens if rows is None else rows
        if self.text_lengths is not None:
            return text_tiles(self.layout, self.valid_text(), rows)[:, None]
        full = torch.zeros(1, 1, count_tiles(rows + text), dtype=torch.bool, device=self.device)
        full[..., rows // TILE_ROWS :] = True
        return full

    def full_plan(self) -> SparsePlan:
        """Return the plan in which every query reads every valid key."""
        lengths = self.valid_tokens()
        padded = lengths is not None
        return SparsePlan.full(
            self.batch,
            self.heads,
            self.layout.tokens,
            self.layout.tokens,
            query_order=self.token_order(None, self.heads) if padded else None,
            key_order=self.token_order(None, self.key.shape[1]) if padded else None,
            query_lengths=lengths,
            key_lengths=lengths,
            device=self.device,
        )


def text_tiles(layout: TokenLayout, text: Tensor, rows: int | None = None) -> Tensor:
    """Return which tiles hold a valid text row: bool `[B, T]`, in canonical plan order.

    Args:
        layout: where the tokens are.
        text: integers `[B]`, valid text tokens.
        rows: video rows, if probes are counted among them; the video tokens when None.
    """
    rows = layout.video_tokens if rows is None else rows
    first = torch.arange(count_tiles(rows + layout.text_tokens), device=text.device) * TILE_ROWS
    end = (rows + text)[:, None]
    return (first + TILE_ROWS > rows) & (first < end) & (text[:, None] > 0)
