"""Whatever a stranger's file or text holds, it is read or refused in one sentence."""

from __future__ import annotations

import io
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from svg_models.cli.options import read_size
from svg_models.errors import SvgModelsError, printable
from svg_models.files import check_output, regular_file
from svg_models.generation.conditioning import read_image
from svg_models.generation.request import CompareRequest, GenerateRequest
from svg_models.loading.checkpoint import check_transformers, networks, sizes_of
from svg_models.loading.folder import (
    check_components,
    check_safetensors,
    check_weights,
    read_index,
    read_json,
)
from svg_models.loading.geometry import Geometry
from svg_models.loading.hub import local_folder
from svg_models.loading.inputs import choose_pipeline
from svg_models.loading.lora import Lora
from svg_models.loading.pipeline import _outline
from svg_models.method_names import read_method
from svg_models.video import VideoFile

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("one_thread")]

NUMBERS = (
    st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 10**30, 1e300, 2.5, True])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def refused(call: Any, *arguments: Any) -> Any:
    """Return what a call returns, or None if it refuses as it should."""
    try:
        return call(*arguments)
    except SvgModelsError as error:
        text = str(error)
        assert text
        assert text == printable(text)
        assert len(text) < 1000
        return None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def sound(place: Path) -> Path:
    tiny.pipeline().save_pretrained(place / "sound")
    return place / "sound"


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Change, cut, repeat or insert a few bytes."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat", "number"])):
            case "flip" if data:
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at : at + draw(st.integers(1, 64))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case _:
                data[at : at + 4] = struct.pack(">I", draw(st.integers(0, 2**32 - 1)))
    return bytes(data)


@given(content=st.binary(max_size=200))
def test_any_bytes_are_json_or_refused(content: bytes, place: Path) -> None:
    path = place / "any.json"
    path.write_bytes(content)
    found = refused(read_json, path)
    assert found is None or isinstance(found, dict)


@given(index=st.dictionaries(st.text(max_size=12), VALUES, max_size=6))
def test_any_index_is_read_or_refused(index: dict[str, Any], place: Path) -> None:
    (place / "model_index.json").write_text(json.dumps(index))
    found = refused(read_index, place)
    if found is not None:
        refused(check_components, place, found)


@settings(max_examples=30)
@given(data=st.data())
def test_any_configuration_makes_a_network_or_is_refused(data: st.DataObject, sound: Path) -> None:
    folder = sound.parent / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    part = data.draw(st.sampled_from(["transformer", "vae", "text_encoder"]))
    path = folder / part / "config.json"
    config = json.loads(path.read_text())
    key = data.draw(st.sampled_from(sorted(config)))
    config[key] = data.draw(VALUES)
    path.write_text(json.dumps(config))
    refused(outlined, folder)


def outlined(folder: Path) -> Geometry:
    index = read_index(folder)
    check_components(folder, index)
    pipeline = choose_pipeline("it", index, image=False, video=False)
    built = networks(folder, index)
    check_transformers("it", built)
    assert all(size >= 0 for size in sizes_of(built).values())
    check_weights(folder, index)
    return Geometry.of(_outline(pipeline, built))


@given(data=st.data())
def test_any_damage_to_weights_is_seen_in_the_header_or_harmless(
    data: st.DataObject, sound: Path, place: Path
) -> None:
    whole = (sound / "text_encoder" / "model.safetensors").read_bytes()[:6000]
    path = place / "damaged.safetensors"
    path.write_bytes(data.draw(damaged(whole)))
    refused(check_safetensors, path)


@given(header=VALUES | st.dictionaries(st.text(max_size=5), VALUES, max_size=4))
def test_any_header_of_weights_is_refused_unless_it_is_empty(header: Any, place: Path) -> None:
    written = json.dumps(header).encode()
    path = place / "header.safetensors"
    path.write_bytes(struct.pack("<Q", len(written)) + written)
    refused(check_safetensors, path)


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
@given(data=st.data())
def test_any_damage_to_a_picture_is_read_or_refused(
    kind: str, data: st.DataObject, place: Path
) -> None:
    path = place / f"picture.{kind}"
    path.write_bytes(data.draw(damaged(picture(kind))))
    image = refused(read_image, path)
    assert image is None or image.mode == "RGB"


def video(kind: str) -> bytes:
    file = io.BytesIO()
    codec = {"mp4": "libx264", "webm": "libvpx", "avi": "mpeg4", "gif": "gif"}[kind]
    with av.open(file, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=8)
        stream.width, stream.height = 32, 16
        stream.pix_fmt = "rgb8" if kind == "gif" else "yuv420p"
        for index in range(4):
            still = np.full((16, 32, 3), 60 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(still, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


VIDEOS = {kind: video(kind) for kind in ("mp4", "webm", "avi", "gif")}


@pytest.mark.parametrize("kind", VIDEOS)
@given(data=st.data())
def test_any_damage_to_a_video_is_read_or_refused(
    kind: str, data: st.DataObject, place: Path
) -> None:
    path = place / f"video.{kind}"
    path.write_bytes(data.draw(damaged(VIDEOS[kind])))
    found = refused(VideoFile.open, path)
    if found is not None:
        refused(found.pictures, range(min(found.frames, 8)), np.mean)


@pytest.mark.parametrize("kind", VIDEOS)
def test_what_is_damaged_was_sound(kind: str, place: Path) -> None:
    path = place / f"sound.{kind}"
    path.write_bytes(VIDEOS[kind])
    found = VideoFile.open(path)
    assert (found.frames, found.height, found.width) == (4, 16, 32)
    means = found.pictures(range(4), lambda frame: float(frame.mean()))
    assert np.abs(np.array(means) - [0, 60, 120, 180]).max() < 20


@given(text=st.text())
def test_printable_text_is_harmless_and_keeps_what_is(text: str) -> None:
    once = printable(text)
    assert printable(once) == once
    assert not any(character in once for character in "\x1b\x07\x08\r\n\x9b\u202e")
    assert once.encode().decode() == once


@given(text=st.text(), density=st.none() | NUMBERS, top_p=st.none() | NUMBERS)
def test_any_method_is_read_or_refused(text: str, density: Any, top_p: Any) -> None:
    names = [text, f"svg2@{text}", "svg2", "svg1"]
    for name in names:
        spec = refused(lambda name=name: read_method(name, density=density, top_p=top_p))
        assert spec is None or spec.density is None or 0 < spec.density <= 1


@given(text=st.text())
def test_any_text_of_a_line_is_read_or_refused(text: str) -> None:
    for call in (Lora.parse, read_size, local_folder):
        refused(call, text)
    refused(lambda: regular_file(text, "as a video"))
    refused(lambda: Lora(source=text, weight=float("nan")))


@given(text=st.text(max_size=300))
def test_any_name_can_be_written_to_or_is_refused(text: str, place: Path) -> None:
    before = sorted(place.iterdir())
    refused(lambda: check_output(f"{place}/{text}"))
    assert sorted(place.iterdir()) == before


FIELDS = ("steps", "guidance", "height", "width", "frames", "fps", "seed", "strength")


@given(values=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_any_settings_are_numbers_or_refused(values: dict[str, Any]) -> None:
    for kind in (GenerateRequest, CompareRequest):
        request = refused(lambda kind=kind: kind(**values))
        if request is not None:
            found = {name: getattr(request, name) for name in FIELDS}
            assert all(v is None or type(v) in (int, float) for v in found.values())
            json.dumps(found, allow_nan=False)
