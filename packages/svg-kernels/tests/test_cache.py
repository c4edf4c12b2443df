"""Where libraries built here are kept: who may write there, under which key, and who waits."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from svg_kernels import _build, _cache

SOURCES = Path(__file__).parents[1] / "csrc"
BUILD = (
    "import sys; from pathlib import Path; from svg_kernels import _cache;"
    "print(_cache.build_once(Path(sys.argv[1]), ('90',)))"
)


def test_build_once_serves_processes_that_ask_at_once(fake_nvcc, tmp_path):
    command = [sys.executable, "-c", BUILD, str(SOURCES)]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    answers = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    library = Path(answers[0][0].strip())
    assert library.read_text() == "built\n"
    assert library.stat().st_mode & 0o022 == 0
    assert library.parent.stat().st_mode & 0o077 == 0
    assert sorted(path.suffix for path in library.parents[1].iterdir()) == ["", ".lock"]
    calls = (tmp_path / "log").read_text().splitlines()
    assert len(calls) == len(list(SOURCES.rglob("*.cu"))) + 1  # and the link
    assert sum("compiling for sm_90" in err for _, err in answers) == 1


def test_build_once_says_why_it_failed_and_leaves_no_folder(fake_nvcc, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAILS", "1")
    with pytest.raises(RuntimeError, match="no such register"):
        _cache.build_once(SOURCES, ("90",))
    assert not [path for path in _cache.cache_root().iterdir() if path.is_dir()]


def test_build_once_sweeps_what_a_lost_machine_left(fake_nvcc):
    library = _cache.build_once(SOURCES, ("90",))
    stale = library.parents[1] / f"{library.parent.name}.left"
    stale.mkdir()
    shutil.rmtree(library.parent)
    assert _cache.build_once(SOURCES, ("90",)) == library
    assert not stale.exists()


def test_build_once_replaces_what_is_broken(fake_nvcc):
    library = _cache.build_once(SOURCES, ("90",))
    library.write_text("broken")
    assert _cache.build_once(SOURCES, ("90",)).read_text() == "broken"
    assert _cache.build_once(SOURCES, ("90",), replace=True).read_text() == "built\n"


@pytest.mark.parametrize("change", ["source", "header", "compiler", "flags", "architecture"])
def test_find_cached_knows_what_a_library_was_made_of(change, fake_nvcc, tmp_path, monkeypatch):
    copy = tmp_path / "csrc"
    shutil.copytree(SOURCES, copy)
    headers = tmp_path / "include"
    (headers / "tvm").mkdir(parents=True)
    (headers / "tvm" / "ffi.h").write_text("// 1")
    monkeypatch.setattr(_build, "find_headers", lambda: headers)
    library = _cache.build_once(copy, ("90",))
    assert _cache.find_cached(copy, ("90",)) == library
    assert _cache.find_cached(SOURCES, ("90",)) == library, "the folder's place does not matter"
    architectures = ("90",)
    if change == "source":
        (copy / "hopper" / "tma.cuh").write_text("// changed")
    elif change == "header":
        (headers / "tvm" / "ffi.h").write_text("// 2")
    elif change == "compiler":
        monkeypatch.setenv("FAKE_VERSION", "13.1")
    elif change == "flags":
        flags = _build.compile_command
        monkeypatch.setattr(_build, "compile_command", lambda *args: [*flags(*args), "-G"])
    else:
        architectures = ("80",)
    assert _cache.find_cached(copy, architectures) is None


def test_find_cached_needs_no_compiler(fake_nvcc, monkeypatch):
    library = _cache.build_once(SOURCES, ("90",))
    monkeypatch.setattr(_build, "find_nvcc", lambda: None)
    assert _cache.find_cached(SOURCES, ("90",)) == library
    assert _cache.find_cached(SOURCES, ("80",)) is None


@pytest.mark.parametrize("place", ["root", "folder", "file"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_find_cached_refuses_what_others_can_write(place, mode, fake_nvcc):
    library = _cache.build_once(SOURCES, ("90",))
    path = {"root": library.parents[1], "folder": library.parent, "file": library}[place]
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(PermissionError, match=f"others may write {path};.*chmod go-w"):
        _cache.find_cached(SOURCES, ("90",))
    path.chmod(path.stat().st_mode & ~mode)
    assert _cache.find_cached(SOURCES, ("90",)) == library


@pytest.mark.parametrize("place", ["root", "folder", "file"])
def test_find_cached_refuses_what_another_user_owns(place, fake_nvcc, monkeypatch):
    library = _cache.build_once(SOURCES, ("90",))
    monkeypatch.setattr(os, "geteuid", lambda: library.stat().st_uid + 1)
    with pytest.raises(PermissionError, match=r"belongs to user .* set XDG_CACHE_HOME"):
        _cache.find_cached(SOURCES, ("90",))


@pytest.mark.parametrize("place", ["folder", "file"])
def test_find_cached_refuses_links(place, fake_nvcc, tmp_path):
    library = _cache.build_once(SOURCES, ("90",))
    path = library.parent if place == "folder" else library
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="is a link"):
        _cache.find_cached(SOURCES, ("90",))


def test_build_once_refuses_a_root_that_others_can_write(fake_nvcc):
    root = _cache.cache_root()
    root.mkdir(parents=True)
    root.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write"):
        _cache.build_once(SOURCES, ("90",))


@pytest.mark.parametrize("home", ["", "relative"])
def test_cache_root_is_never_below_the_current_folder(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/somewhere")
    assert _cache.cache_root() == Path("/somewhere/.cache/svg-kernels")
    monkeypatch.setenv("HOME", home)
    with pytest.raises(OSError, match=r"no home folder .* set XDG_CACHE_HOME"):
        _cache.cache_root()
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without an entry
    with pytest.raises(OSError, match="no home folder"):
        _cache.cache_root()


def test_locked_says_whom_it_waits_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_cache, "PATIENCE", 0.2)
    file = tmp_path / "lock"
    with _cache.locked(file):
        pass
    assert capsys.readouterr().err == ""
    with file.open("r+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)

        def release():
            time.sleep(0.6)
            fcntl.flock(holder, fcntl.LOCK_UN)

        thread = threading.Thread(target=release)
        thread.start()
        with _cache.locked(file):
            thread.join()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"waiting for process {os.getpid()} to compile the kernels" in line
