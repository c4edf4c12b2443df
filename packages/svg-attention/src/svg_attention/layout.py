"""Where the video and the text tokens of one attention call are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from svg_attention import config


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """Describe the token sequence of one self-attention call.

    Video tokens are contiguous and frame-major: token `frame * frame_tokens + patch`. Text tokens
    stand before or after them; when some are padding, the valid ones come first.

    Args:
        grid: latent frames, rows and columns after patching.
        text_tokens: text tokens in the sequence, padding included.
        text_position: whether the text stands before or after the video.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if a size is not positive or `text_position` is unknown.
    """

    grid: tuple[int, int, int]
    text_tokens: int = 0
    text_position: Literal["first", "last"] = "last"

    def __post_init__(self) -> None:
        try:
            frames, rows, columns = self.grid
        except (TypeError, ValueError):
            raise ValueError(
                f"grid must be three positive sizes (frames, rows, columns), got {self.grid!r}"
            ) from None
        grid = tuple(config.integer("a size of grid", n, least=1) for n in (frames, rows, columns))
        config.assign(
            self,
            grid=grid,
            text_tokens=config.integer("text_tokens", self.text_tokens, least=0),
            text_position=config.choice("text_position", self.text_position, ("first", "last")),
        )

    @property
    def num_frames(self) -> int:
        """Latent frames after patching."""
        return self.grid[0]

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.grid[1] * self.grid[2]

    @property
    def video_tokens(self) -> int:
        """Tokens of the whole clip, text excluded."""
        return self.num_frames * self.frame_tokens

    @property
    def tokens(self) -> int:
        """Tokens of the sequence, text and its padding included."""
        return self.video_tokens + self.text_tokens

    @property
    def video_start(self) -> int:
        """Index of the first video token."""
        return self.text_tokens if self.text_position == "first" else 0

    @property
    def text_start(self) -> int:
        """Index of the first text token."""
        return 0 if self.text_position == "first" else self.video_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self) | {"grid": list(self.grid)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TokenLayout:
        """Build a layout from what `to_dict` returned.

        Raises:
            TypeError: if a value is of the wrong type.
            ValueError: if it is out of range, or a key names no field.
        """
        return cls(**config.settings(cls, fields))
