from __future__ import annotations

import json

import pytest

from svg_attention import TokenLayout


def test_token_layout_places_the_video_before_or_after_text() -> None:
    last = TokenLayout(grid=(3, 4, 5), text_tokens=7)
    first = TokenLayout(grid=(3, 4, 5), text_tokens=7, text_position="first")
    assert (last.video_start, last.text_start, last.tokens) == (0, 60, 67)
    assert (first.video_start, first.text_start, first.tokens) == (7, 0, 67)
    assert (last.num_frames, last.frame_tokens, last.video_tokens) == (3, 20, 60)


def test_to_dict_and_back_is_the_same_layout() -> None:
    layout = TokenLayout(grid=(3, 4, 5), text_tokens=7, text_position="first")
    assert TokenLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": (0, 4, 4)}, "a size of grid must be at least 1, got 0"),
        ({"grid": (4, 4)}, "three positive sizes"),
        ({"grid": (1, 4, 4), "text_tokens": -1}, "text_tokens must be at least 0, got -1"),
        ({"grid": (1, 4, 4), "text_position": "middle"}, "'first' or 'last'"),
    ],
)
def test_token_layout_refuses_bad_fields(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLayout(**fields)
