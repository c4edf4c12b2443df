from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from svg_attention import SVG1, SVG2, RandomBlocks, Schedule, TokenLayout, method_from_dict


@pytest.mark.parametrize(
    ("config", "fields", "error", "message"),
    [
        (SVG2, {"k_clusters": 2.5}, TypeError, "k_clusters must be an integer, got 2.5"),
        (SVG2, {"q_clusters": True}, TypeError, "q_clusters must be an integer, got True"),
        (SVG2, {"first_iterations": "9"}, TypeError, "first_iterations must be an integer"),
        (SVG2, {"compensate": "no"}, TypeError, "compensate must be True or False, got 'no'"),
        (SVG2, {"compensate": 0}, TypeError, "compensate must be True or False, got 0"),
        (SVG2, {"top_p": "0.9"}, TypeError, "top_p must be a number, got '0.9'"),
        (SVG2, {"density": float("nan")}, ValueError, r"density must lie in \(0, 1\], got nan"),
        (SVG2, {"route": None}, ValueError, "route must be 'mass' or .* or 'scores', got None"),
        (SVG1, {"sampled_rows": 0}, ValueError, "sampled_rows must be at least 1, got 0"),
        (SVG1, {"density": True}, TypeError, "density must be a number, got True"),
        (RandomBlocks, {"density": 0}, ValueError, r"density must lie in \(0, 1\]"),
        (Schedule, {"dense_steps": "0.2"}, TypeError, "dense_steps must be a number"),
        (Schedule, {"density": 0.3}, TypeError, "a setting of the method"),
        (Schedule, {"density": ((0.1,),)}, ValueError, "a density breakpoint is"),
        (TokenLayout, {"grid": (1, 2.0, 3)}, TypeError, "a size of grid must be an integer"),
        (TokenLayout, {"grid": 5}, ValueError, "three positive sizes"),
    ],
)
def test_configurations_refuse_the_wrong_type_in_a_sentence(
    config: Any, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        config(**fields)


def test_configurations_turn_numbers_of_numpy_into_plain_ones() -> None:
    method = SVG2(
        q_clusters=np.int64(20),
        k_clusters=np.int32(40),
        density=np.float32(0.25),
        compensate=np.bool_(True),
        probe_rows=np.uint8(32),
    )
    assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method
    schedule = Schedule(dense_steps=np.float64(0.5), density=((np.float32(0), np.float32(1)),))
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    layout = TokenLayout(grid=tuple(np.array([2, 3, 4])), text_tokens=np.int64(7))
    assert TokenLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (SVG2, {"top_q": 0.5}, "SVG2 has no setting 'top_q'; did you mean 'top_p'"),
        (Schedule, {"dense_step": 0.5}, "did you mean 'dense_steps'"),
        (TokenLayout, {"grid": [1, 2, 3], "colour": 1}, "it has grid, text_tokens, text_position"),
    ],
)
def test_from_dict_names_a_setting_that_does_not_exist_and_the_nearest(
    config: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config.from_dict(fields)
