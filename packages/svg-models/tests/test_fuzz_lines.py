"""Any command line with something wrong in it is refused in one sentence."""

from __future__ import annotations

import pytest
from hostile import HOSTILE
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from svg_models.cli import app
from svg_models.errors import printable

pytestmark = pytest.mark.fuzz

OPTIONS = (
    *("--seed", "--steps", "--guidance", "--size", "--frames", "--fps", "--strength", "--model"),
    *("--method", "--density", "--top-p", "--dtype", "--offload", "--lora", "--image", "--video"),
    *("--backend", "--negative-prompt", "--output", "--num-frames", "-m", "-o"),
)
HARSH = sorted({word for words, _ in HOSTILE.values() for word in words if len(word) < 500})
WORDS = (
    st.text(max_size=30).filter(lambda word: "\0" not in word)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(HARSH)
).filter(lambda word: word not in ("-h", "--help", "--version"))
PAIRS = st.tuples(st.sampled_from(OPTIONS), WORDS)


@given(
    command=st.sampled_from(["generate", "compare"]),
    pairs=st.lists(PAIRS, max_size=6),
    extra=st.lists(WORDS, max_size=1),
)
def test_any_line_with_a_wrong_device_is_one_sentence(
    command: str, pairs: list[tuple[str, str]], extra: list[str]
) -> None:
    words = [command, *extra, *(word for pair in pairs for word in pair), "--device", "mps"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, (words, result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert printable(lines[0]) == lines[0]
    assert len(lines[0]) < 1000
