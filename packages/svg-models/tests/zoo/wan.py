"""Wan pipelines."""

from __future__ import annotations

from typing import Any

import tiny

from zoo.case import Case

ARGUMENTS = dict(
    prompt="a red circle moving left",
    negative_prompt="bad quality",
    num_frames=9,
    height=32,
    width=32,
    guidance_scale=4.0,
    max_sequence_length=12,
)


def text_to_video() -> Any:
    return tiny.pipeline(tiny.transformer(num_layers=2))


CASES = (
    Case(
        name="wan t2v",
        family="wan",
        task="t2v",
        build=text_to_video,
        arguments=ARGUMENTS,
        grid=(3, 8, 8),
    ),
)
