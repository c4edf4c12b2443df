"""Which library a device gets, and what is said where it gets none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from svg_kernels import _build, _cache, _dispatch, _library

pytest.importorskip("tvm_ffi")
GPUS = [torch.device("cuda", index) for index in range(3)]
CAPABILITIES = {GPUS[0]: (8, 0), GPUS[1]: (9, 0), GPUS[2]: (9, 0)}


@pytest.fixture
def loads(fake_nvcc, monkeypatch):
    """Pretend there are three GPUs and that files which say "built" are libraries."""
    loaded = []

    def load_module(path):
        loaded.append(Path(path))
        if Path(path).read_text() != "built\n":
            raise RuntimeError("file too short")
        return SimpleNamespace(check_device=lambda index: None, path=path)

    monkeypatch.setattr("tvm_ffi.load_module", load_module)
    monkeypatch.setattr(_library, "_libraries", {})
    monkeypatch.setattr(_library, "_loaded", {})
    monkeypatch.setattr(_dispatch, "_no_cuda_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITIES[device])
    return loaded


def test_functions_of_each_device_are_its_own(loads):
    paths = [_library.path(device) for device in GPUS]
    assert paths[0] != paths[1] == paths[2]
    assert [_library.functions(device).path for device in GPUS] == [str(path) for path in paths]
    assert loads == paths[:2], "a library is loaded once"
    assert [_dispatch.unsupported("cuda", device) for device in GPUS] == [None] * 3


def test_unsupported_of_one_device_leaves_the_others(loads, monkeypatch):
    def check_device(index):
        if index == 1:
            raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(
        "tvm_ffi.load_module", lambda path: SimpleNamespace(check_device=check_device)
    )
    reasons = [_library.unsupported(device) for device in GPUS]
    assert reasons[0] is None
    assert reasons[2] is None
    assert "does not run on this GPU and driver: no kernel image" in reasons[1]


def test_find_builds_a_broken_library_anew_once_and_names_it(loads, capsys):
    library = _library.path(GPUS[0])
    library.write_text("broken")
    _library._libraries.clear()
    _library._loaded.clear()
    capsys.readouterr()
    assert _library.unsupported(GPUS[0]) is None
    assert library.read_text() == "built\n"
    said = capsys.readouterr().err
    assert f"{library} cannot be loaded (file too short); building it anew" in said
    assert loads == [library] * 3


def test_find_gives_up_on_a_library_that_stays_broken(loads, monkeypatch):
    def load_module(path):
        loads.append(Path(path))
        raise OSError("invalid ELF header")

    monkeypatch.setattr("tvm_ffi.load_module", load_module)
    assert "invalid ELF header" in _library.unsupported(GPUS[0])
    assert len(loads) == 2
    assert "invalid ELF header" in _library.unsupported(GPUS[0])
    assert len(loads) == 2, "what failed is not tried at every call"


def test_find_refuses_a_library_that_is_not_ours(loads, monkeypatch):
    monkeypatch.setattr("tvm_ffi.load_module", lambda path: SimpleNamespace())
    assert "does not export check_device" in _library.unsupported(GPUS[0])


def test_find_does_not_load_what_others_can_write(loads):
    library = _library.path(GPUS[0])
    _library._libraries.clear()
    _library._loaded.clear()
    loads.clear()
    library.parent.chmod(0o777)
    assert f"others may write {library.parent}" in _library.unsupported(GPUS[0])
    assert loads == []
    auto = _dispatch.auto_backend(GPUS[0])
    assert auto == ("triton" if _dispatch.unsupported("triton", GPUS[0]) is None else "reference")


def test_find_without_a_home_leaves_the_other_backends(loads, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "")
    assert "there is no home folder" in _library.unsupported(GPUS[0])
    assert _dispatch.auto_backend(GPUS[0]) != "cuda"


def test_find_without_a_compiler_says_what_is_missing(loads, monkeypatch):
    monkeypatch.setattr(_build, "find_nvcc", lambda: None)
    reason = _library.unsupported(GPUS[0])
    assert "this wheel has no compiled library, and it cannot be built: nvcc" in reason


def test_find_takes_the_library_of_the_wheel_first(loads, tmp_path, monkeypatch):
    packed = tmp_path / "lib" / _build.LIBRARY
    packed.parent.mkdir()
    packed.write_text("built\n")
    monkeypatch.setattr(_library, "_PACKAGE", tmp_path)
    assert _library.path(GPUS[0]) == packed
    assert not _cache.cache_root().exists()


def test_find_says_that_the_library_of_the_wheel_cannot_be_loaded(loads, tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / _build.LIBRARY).write_bytes(b"not a library")
    monkeypatch.setattr(_library, "_PACKAGE", tmp_path)
    assert "cannot be loaded: file too short" in _library.unsupported(GPUS[0])
