"""What a model needs of a GPU's memory: what is measured is told, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from svg_models import doctor, needs
from svg_models.cli import app
from svg_models.errors import SettingError

GIB = 1024**3
WAY: dict[str, Any] = {"offload": "none", "weights": "bf16", "steps": "SVG2", "bytes": 45.5 * GIB}
DOCUMENT: dict[str, Any] = {
    "format": "svg-needs/1",
    "gpu": "a GPU",
    "models": [
        {
            "checkpoints": ["Some-One/Model-14B"],
            "clip": "1280x720, 81 frames",
            "ways": [
                WAY | {"steps": "diffusers", "card": 80},
                WAY | {"card": 80},
                WAY | {"offload": "group", "bytes": 15.0 * GIB, "card": 24},
                WAY | {"weights": "fp8", "bytes": 95.0 * GIB, "card": None},
                WAY | {"steps": "SVG2, fp8 products", "card": 80},
            ],
        }
    ],
}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "needs.json"
    monkeypatch.setattr(needs, "TABLE", path)
    needs._rows.cache_clear()
    yield path
    needs._rows.cache_clear()


@pytest.mark.parametrize("name", ["Some-One/Model-14B", "some-one/model-14b", "Model-14B"])
def test_needs_of_finds_a_model_by_its_name(table: Path, name: str) -> None:
    table.write_text(json.dumps(DOCUMENT))
    found = needs.needs_of(name)
    assert [need.card for need in found] == [80, 80, 24, None, 80]
    assert found[1].bytes == 45.5 * GIB
    assert found[1].clip == "1280x720, 81 frames"


def test_needs_of_says_nothing_of_what_was_not_measured(table: Path) -> None:
    assert needs.needs_of("Some-One/Model-14B") == ()
    table.write_text(json.dumps(DOCUMENT))
    needs._rows.cache_clear()
    assert needs.needs_of("Some-One/Model-1B") == ()
    assert needs.needs_of("") == ()


def test_read_table_refuses_another_format() -> None:
    with pytest.raises(SettingError, match="expected a table svg-needs/1, got 'svg-needs/9'"):
        needs.read_table(DOCUMENT | {"format": "svg-needs/9"})


def test_the_table_of_the_package_can_be_read() -> None:
    if not needs.TABLE.exists():
        pytest.skip("nothing is measured yet")
    rows = needs.read_table(json.loads(needs.TABLE.read_text(encoding="utf-8")))
    assert all(names and ways for names, ways in rows)
    assert all(way.card in (24, 40, 48, 80, None) for _, ways in rows for way in ways)


@pytest.mark.parametrize(
    ("size", "card", "memory", "fits"),
    [
        (45.5, 80, 79.1, True),
        (45.5, 80, 44.4, False),
        (34.9, 48, 39.4, False),  # by its bytes it would
        (34.9, 48, 44.4, True),
        (74.3, None, 79.1, False),
        (74.3, None, 139.8, True),
        (95.0, None, 79.1, False),
        (139.5, None, 139.8, False),
    ],
)
def test_need_fits_where_it_was_seen_to_run_and_on_larger_cards(
    size: float, card: int | None, memory: float, fits: bool
) -> None:
    need = needs.Need(
        clip="", offload="none", weights="bf16", steps="SVG2", bytes=size * GIB, card=card
    )
    assert need.fits(int(memory * GIB)) is fits


def test_doctor_says_how_a_model_fits(table: Path) -> None:
    table.write_text(json.dumps(DOCUMENT))
    told = [c for c in doctor.diagnose("cpu", "Model-14B") if c.part == "memory of Model-14B"]
    assert [check.name for check in told] == [
        "--offload none",
        "--offload group",
        "--offload none, weights stored in fp8",
        "--offload none --linears fp8",
    ]
    assert {check.works for check in told} == {None}
    assert told[0].detail == "1280x720, 81 frames: 45.5 GiB, cards from 80 GB on"
    assert told[2].detail.endswith("95.0 GiB, no card of 80 GB")
    done = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json", "-m", "Model-14B"])
    assert "memory of Model-14B" in done.output


def test_doctor_says_that_a_model_was_not_measured(table: Path) -> None:
    table.write_text(json.dumps(DOCUMENT))
    (told,) = [c for c in doctor.diagnose("cpu", "[red]") if c.part == "memory of [red]"]
    assert (told.name, told.works, told.matters) == ("not measured", None, False)
    names = [model["checkpoints"][0].rpartition("/")[2] for model in DOCUMENT["models"]]
    assert told.detail.endswith(f"; measured are {', '.join(names)}")
    done = CliRunner().invoke(app, ["doctor", "--device", "cpu", "-m", "[red]"])
    assert "memory of [red]" in " ".join(done.output.split())
    assert "nobody has measured" in done.output
