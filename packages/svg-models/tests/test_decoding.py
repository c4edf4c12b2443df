"""Decoding that runs out of memory is done again in tiles, instead of losing the clip."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from svg_models.generation.decoding import Decoding
from svg_models.generation.generate import generate
from svg_models.loading import LoadedPipeline, load_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"height": 48, "width": 48, "frames": 5, "steps": 1, "method": "dense"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedPipeline:
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.pipeline().save_pretrained(path)
    return load_pipeline(path, device="cpu")


class Full:
    """Stands for a GPU on which tiles can be decoded that are at most so many pixels long."""

    def __init__(self, vae: Any, monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
        self.longest, self.calls = longest, []
        self._plain = type(vae).decode
        monkeypatch.setattr(type(vae), "decode", lambda vae, *args, **how: self(vae, *args, **how))

    def __call__(self, vae: Any, *args: Any, **how: Any) -> Any:
        overlap = vae.tile_sample_min_width - vae.tile_sample_stride_width
        assert overlap == vae.tile_sample_min_height - vae.tile_sample_stride_height == 64
        self.calls.append(vae.tile_sample_min_width if vae.use_tiling else 0)
        if not vae.use_tiling or vae.tile_sample_min_width > self.longest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self._plain(vae, *args, **how)


def as_found(vae: Any) -> bool:
    """Return whether the VAE of the fixture is as it was loaded."""
    own = vae.tile_sample_min_width, vae.tile_sample_stride_height
    return not vae.use_tiling and own == (256, 192) and "decode" not in vars(vae)


@pytest.mark.parametrize("longest", [256, 512, 2000])
def test_generate_decodes_in_the_longest_tiles_that_fit_and_says_so(
    longest: int, loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate("a red circle", model=loaded, **SMALL)
    full, said = Full(loaded.pipe.vae, monkeypatch, longest), []
    fits = min(longest, 1024)
    with pytest.warns(UserWarning, match=f"decoded in tiles of {fits} x {fits} pixels"):
        clip = generate(
            "a red circle", model=loaded, progress=lambda text, *_: said.append(text), **SMALL
        )
    assert full.calls == [0, *(n for n in (1024, 512, 256) if n >= fits)]
    assert "decoding in tiles" in said
    assert clip.decoded_in_tiles
    assert clip.to_dict()["decoded_in_tiles"]
    assert not whole.decoded_in_tiles
    # Smaller than a tile, so tiles change nothing here.
    assert np.array_equal(clip.frames, whole.frames)
    assert as_found(loaded.pipe.vae)


@pytest.mark.parametrize("tiled", [False, True])
def test_generate_what_does_not_fit_in_tiles_fails_as_before(
    tiled: bool, loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = loaded.pipe.vae
    full = Full(vae, monkeypatch, 0)
    if tiled:
        vae.enable_tiling()
    try:
        with pytest.raises(torch.OutOfMemoryError):
            generate("a red circle", model=loaded, **SMALL)
        assert full.calls == ([256] if tiled else [0, 1024, 512, 256])
        assert vae.use_tiling is tiled
    finally:
        vae.disable_tiling()
    assert as_found(vae)


def test_decoding_a_vae_whose_tiles_have_no_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    class Vae:
        use_tiling, tile_overlap_factor = False, 0.25

        def decode(self, x: int) -> int:
            if not self.use_tiling:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return x + 1

        def enable_tiling(self) -> None:
            self.use_tiling = True

        def disable_tiling(self) -> None:
            self.use_tiling = False

    class Pipe:
        vae = Vae()

    with (
        pytest.warns(UserWarning, match="decoded in tiles, which"),
        Decoding(Pipe, lambda *_: None) as decoding,
    ):
        assert Pipe.vae.decode(1) == 2
    assert decoding.in_tiles
    assert vars(Pipe.vae) == {"use_tiling": False}


def test_decoding_leaves_what_somebody_else_has_put_there(
    loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = loaded.pipe.vae
    full, other = Full(vae, monkeypatch, 1024), []

    def decode(*args: Any, **how: Any) -> Any:
        other.append(1)
        return type(vae).decode(vae, *args, **how)

    monkeypatch.setattr(vae, "decode", decode, raising=False)
    with pytest.warns(UserWarning, match="in tiles"):
        generate("a red circle", model=loaded, **SMALL)
    assert vars(vae)["decode"] is decode
    assert (len(other), full.calls) == (2, [0, 1024])


def test_decoding_a_pipeline_without_vae_or_tiles() -> None:
    class Plain:
        def decode(self, x: int) -> int:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    class Pipe:
        vae = Plain()

    with Decoding(object(), lambda *_: None) as decoding:
        pass
    assert not decoding.in_tiles
    with pytest.raises(torch.OutOfMemoryError), Decoding(Pipe, lambda *_: None):
        Pipe.vae.decode(1)
