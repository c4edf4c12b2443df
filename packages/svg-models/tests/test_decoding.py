"""Decoding that runs out of memory is done again in tiles, instead of losing the clip."""

from __future__ import annotations

from contextlib import nullcontext
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
    """Stands for a GPU on which only tiles can be decoded, and if `always`, not even these."""

    def __init__(self, vae: Any, monkeypatch: pytest.MonkeyPatch, *, always: bool = False) -> None:
        self.vae, self.always, self.calls = vae, always, []
        self._plain = type(vae).decode
        monkeypatch.setattr(type(vae), "decode", lambda vae, *args, **how: self(vae, *args, **how))

    def __call__(self, vae: Any, *args: Any, **how: Any) -> Any:
        self.calls.append("tiles" if vae.use_tiling else "whole")
        if self.always or not vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self._plain(vae, *args, **how)


def test_generate_decodes_in_tiles_what_does_not_fit_and_says_so(
    loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate("a red circle", model=loaded, **SMALL)
    full, said = Full(loaded.pipe.vae, monkeypatch), []
    with pytest.warns(UserWarning, match="decoded in tiles"):
        clip = generate(
            "a red circle", model=loaded, progress=lambda text, *_: said.append(text), **SMALL
        )
    assert full.calls == ["whole", "tiles"]
    assert "decoding in tiles" in said
    assert clip.decoded_in_tiles
    assert clip.to_dict()["decoded_in_tiles"]
    assert not whole.decoded_in_tiles
    # Smaller than a tile, so tiles change nothing here.
    assert np.array_equal(clip.frames, whole.frames)
    vae = loaded.pipe.vae
    assert not vae.use_tiling
    assert "decode" not in vars(vae), "as it was found"


@pytest.mark.parametrize("tiled", [False, True])
def test_generate_what_does_not_fit_in_tiles_fails_as_before(
    tiled: bool, loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = loaded.pipe.vae
    full = Full(vae, monkeypatch, always=True)
    if tiled:
        vae.enable_tiling()
    try:
        warns = pytest.warns(UserWarning, match="in tiles") if not tiled else nullcontext()
        with pytest.raises(torch.OutOfMemoryError), warns:
            generate("a red circle", model=loaded, **SMALL)
        assert full.calls == (["tiles"] if tiled else ["whole", "tiles"])
        assert vae.use_tiling is tiled
        assert "decode" not in vars(vae)
    finally:
        vae.disable_tiling()


def test_decoding_leaves_what_somebody_else_has_put_there(
    loaded: LoadedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = loaded.pipe.vae
    full, other = Full(vae, monkeypatch), []

    def decode(*args: Any, **how: Any) -> Any:
        other.append(1)
        return type(vae).decode(vae, *args, **how)

    monkeypatch.setattr(vae, "decode", decode, raising=False)
    with pytest.warns(UserWarning, match="in tiles"):
        generate("a red circle", model=loaded, **SMALL)
    assert vars(vae)["decode"] is decode
    assert (len(other), full.calls) == (2, ["whole", "tiles"])


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
