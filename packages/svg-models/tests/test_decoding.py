"""Decoding that runs out of memory is done again in tiles, instead of losing the clip."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import zoo
from torch import nn

from svg_attention import SVG2, Schedule
from svg_models import sparsify
from svg_models.comparison.run import compare
from svg_models.generation.decoding import Decoding
from svg_models.generation.generate import generate
from svg_models.loading import LoadedPipeline, load_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"height": 48, "width": 64, "frames": 5, "steps": 1, "method": "dense"}


@pytest.fixture
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedPipeline:
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.pipeline().save_pretrained(path)
    found = load_pipeline(path, device="cpu")
    shrink(found.pipe.vae)
    return found


@pytest.fixture
def kept() -> Iterator[list[str]]:
    """Collect the warnings of a test."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield told
        told.extend(str(one.message) for one in seen)


def shrink(vae: Any) -> None:
    """Make a VAE's own tiles smaller than a small clip."""
    for side in ("height", "width"):
        setattr(vae, f"tile_sample_min_{side}", 16)
        setattr(vae, f"tile_sample_stride_{side}", 8)


def inside(pipe: Any, release: Callable[[], None] = lambda: None, *, side: int = 64) -> Decoding:
    return Decoding(pipe, width=side, height=side, release=release, progress=lambda *_: None)


class Full:
    """Stands for a GPU on which tiles can be decoded that are at most so many pixels long."""

    def __init__(self, vae: Any, monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
        self.longest, self.calls = longest, []
        self._plain = type(vae).decode
        monkeypatch.setattr(type(vae), "decode", lambda vae, *args, **how: self(vae, *args, **how))

    def __call__(self, vae: Any, *args: Any, **how: Any) -> Any:
        overlap = vae.tile_sample_min_width - vae.tile_sample_stride_width
        assert overlap == vae.tile_sample_min_height - vae.tile_sample_stride_height == 8
        self.calls.append(vae.tile_sample_min_width if vae.use_tiling else 0)
        if not vae.use_tiling or vae.tile_sample_min_width > self.longest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self._plain(vae, *args, **how)


def as_found(vae: Any) -> bool:
    own = vae.tile_sample_min_width, vae.tile_sample_stride_height
    return not vae.use_tiling and own == (16, 8) and "decode" not in vars(vae)


def test_generate_decodes_in_the_longest_tiles_that_fit_and_says_so(
    loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate("a red circle", model=loaded, **SMALL)
    full, said = Full(loaded.pipe.vae, monkeypatch, 32), []
    with pytest.warns(UserWarning, match="decoded in tiles of 32 x 32 pixels"):
        clip = generate(
            "a red circle", model=loaded, progress=lambda text, *_: said.append(text), **SMALL
        )
    # Once more with less in memory; tiles of 64 would be the whole picture.
    assert full.calls == [0, 0, 32]
    assert "decoding in tiles" in said
    assert (whole.tiles, clip.tiles, clip.to_dict()["tiles"]) == ("", "32 x 32", "32 x 32")
    assert clip.frames.shape == whole.frames.shape
    assert not np.array_equal(clip.frames, whole.frames)
    assert as_found(loaded.pipe.vae)
    full.calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is known now
        second = generate("a red circle", model=loaded, **SMALL)
    assert (full.calls, second.tiles) == ([32], "32 x 32")
    assert np.array_equal(second.frames, clip.frames)
    full.longest = 16
    full.calls.clear()
    assert generate("a red circle", model=loaded, **SMALL).tiles == "16 x 16"
    assert full.calls == [32, 16]


@pytest.mark.parametrize("tiled", [False, True])
def test_generate_what_does_not_fit_in_tiles_fails_as_before(
    tiled: bool, loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = loaded.pipe.vae
    full = Full(vae, monkeypatch, 0)
    if tiled:
        vae.enable_tiling()
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\.$"):
        generate("a red circle", model=loaded, **SMALL)
    assert full.calls == ([16, 16] if tiled else [0, 0, 32, 16])
    assert vae.use_tiling is tiled
    vae.disable_tiling()
    assert as_found(vae)


def test_decoding_at_once_after_letting_go_of_the_run_changes_nothing(
    loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch, kept: list[str]
) -> None:
    settings = SMALL | {"steps": 3, "method": SVG2(q_clusters=2, k_clusters=4, density=0.5)}
    whole = generate("a red circle", model=loaded, **settings)
    vae, failed = loaded.pipe.vae, []
    plain = type(vae).decode

    def once(vae: Any, *args: Any, **how: Any) -> Any:
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(vae, *args, **how)

    monkeypatch.setattr(type(vae), "decode", once)
    clip = generate("a red circle", model=loaded, **settings)
    assert clip.tiles == ""
    assert np.array_equal(clip.frames, whole.frames)
    assert clip.stats.sparse_calls == whole.stats.sparse_calls > 0, "the log is kept"


def test_release_lets_go_of_what_was_remembered_and_a_further_step_begins_anew() -> None:
    case = zoo.case("wan t2v")
    pipe = case.build()
    with sparsify(
        pipe,
        SVG2(q_clusters=2, k_clusters=4, density=0.5),
        Schedule(dense_steps=0.0, dense_layers=0.0),
    ) as run:
        first = case.run(pipe, num_inference_steps=2)
        calls = run.stats().calls
        run.release()
        assert run.stats().calls == calls
        second = case.run(pipe, num_inference_steps=2)
        assert run.stats().calls == calls
    assert torch.equal(first, second)


def test_decoding_several_times_in_one_call_goes_on_to_smaller_tiles(
    loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch, kept: list[str]
) -> None:
    vae = loaded.pipe.vae
    full = Full(vae, monkeypatch, 32)
    latents = torch.randn(1, vae.config.z_dim, 2, 8, 8)
    with inside(loaded.pipe), torch.no_grad():
        vae.decode(latents)
        assert not vae.use_tiling, "an encoder in between is not to tile"
        full.longest = 16
        vae.decode(latents)
    assert full.calls == [0, 0, 32, 32, 16]
    assert as_found(vae)


def test_decoding_leaves_what_somebody_else_has_put_there(
    loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch, kept: list[str]
) -> None:
    vae = loaded.pipe.vae
    full, other = Full(vae, monkeypatch, 32), []

    def decode(*args: Any, **how: Any) -> Any:
        other.append(1)
        return type(vae).decode(vae, *args, **how)

    monkeypatch.setattr(vae, "decode", decode, raising=False)
    generate("a red circle", model=loaded, **SMALL)
    assert vars(vae)["decode"] is decode
    assert (len(other), full.calls) == (3, [0, 0, 32])


def test_decoding_by_a_compiled_vae_leaves_nothing(
    loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch, kept: list[str]
) -> None:
    vae = loaded.pipe.vae
    full = Full(vae, monkeypatch, 32)

    class Pipe:
        pass

    pipe: Any = Pipe()
    pipe.vae = torch.compile(vae, backend="eager")
    latents = torch.randn(1, vae.config.z_dim, 2, 8, 8)
    for _ in range(2):
        with inside(pipe) as found, torch.no_grad():
            pipe.vae.decode(latents)
        assert found.tiles == "32 x 32"
        assert as_found(vae)
    assert full.calls == [0, 0, 32, 32]


@pytest.mark.parametrize("name", ["none", "without tiles", "with tiles of no known length"])
def test_decoding_other_vaes(name: str, kept: list[str]) -> None:
    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.use_tiling, self.calls = False, 0

        def decode(self, x: int) -> int:
            self.calls += 1
            if not self.use_tiling:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return x + 1

        def enable_tiling(self) -> None:
            self.use_tiling = True

    class Tiled(Vae):
        tiled_decode = None

    class Pipe:
        vae: Any = None

    pipe = Pipe()
    with inside(pipe) as found:
        assert found.tiles == ""
    if name == "without tiles":  # it says that it has some, and never looks
        pipe.vae = Vae()
        with pytest.raises(torch.OutOfMemoryError), inside(pipe):
            pipe.vae.decode(1)
        assert pipe.vae.calls == 2
    elif name != "none":
        pipe.vae = Tiled()
        with inside(pipe) as found:
            assert pipe.vae.decode(1) == 2
        assert found.tiles == "some"
        assert not pipe.vae.use_tiling


@pytest.mark.parametrize(
    "name",
    [
        "wan t2v",
        "hunyuan_video t2v",
        "cogvideox 1.5 t2v",
        "ltx t2v",
        "easyanimate t2v",
        "mochi t2v",
    ],
)
def test_what_a_call_that_fails_late_leaves_in_a_vae_is_cleared(name: str, kept: list[str]) -> None:
    case = zoo.case(name)
    pipe = case.build()
    whole = case.run(pipe, output_type="np")
    leaves = [m for m in pipe.vae.decoder.modules() if "Conv3d" in type(m).__name__]
    failed: list[int] = []

    def fails(*_: Any) -> None:
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = leaves[-2].register_forward_pre_hook(fails)
    with inside(pipe):
        again = case.run(pipe, output_type="np")
    hook.remove()
    assert failed
    assert np.array_equal(whole, again)


def test_compare_says_so_where_clips_were_decoded_in_other_ways(
    loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, count = loaded.pipe.vae, []
    plain = type(vae).decode

    def decode(vae: Any, *args: Any, **how: Any) -> Any:
        count.append(1)
        if len(count) > 2 and not vae.use_tiling:  # after the one that warms up, and the dense one
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(vae, *args, **how)

    monkeypatch.setattr(type(vae), "decode", decode)
    settings = {name: value for name, value in SMALL.items() if name != "method"}
    with pytest.warns(UserWarning, match=r"decoded in tiles \(32 x 32 pixels\), the dense one at"):
        found = compare("a red circle", model=loaded, methods=("random",), **settings)
    tiles = [clip.tiles for clip in (found.dense, found.candidates[0].clip)]
    assert tiles == ["", "32 x 32"]
    assert '"tiles": "32 x 32"' in json.dumps(found.to_dict())
