from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svg_kernels import _build, _library

PACKAGE = Path(__file__).parents[1]
SOURCES = PACKAGE / "csrc"
FAKE_NVCC = """#!/bin/sh
echo "$@" >> "$FAKE_LOG"
while [ "$1" != "-o" ]; do shift; done
sleep 0.05
[ -z "$FAKE_FAILS" ] || { echo "error: no such register" >&2; exit 1; }
echo built > "$2"
"""


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """Put a compiler first that only writes its output file, and an empty cache behind it."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    compiler = home / "bin" / "nvcc"
    compiler.write_text(FAKE_NVCC)
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("CXX", "sh")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return compiler


def test_find_nvcc_takes_that_of_cuda_home_first(fake_nvcc):
    assert _build.find_nvcc() == fake_nvcc


def test_missing_names_what_build_needs(monkeypatch):
    monkeypatch.setattr(_build, "find_nvcc", lambda: None)
    assert "nvcc was not found" in _build.missing()
    with pytest.raises(RuntimeError, match="nvcc was not found"):
        _build.build(SOURCES, Path("nowhere"))


def test_architectures_of_reads_the_file_name():
    everything = _build.architectures_of(Path("norm.cu"), ("80", "90"))
    assert everything == ("80", "90")
    hopper = Path("block_sparse_attention_sm90a.cu")
    assert _build.architectures_of(hopper, ("80", "90")) == ("90a",)
    assert _build.architectures_of(hopper, ("80", "86")) == ()


def test_build_once_serves_processes_that_ask_at_once(fake_nvcc, tmp_path):
    code = (
        "import sys; from pathlib import Path; from svg_kernels import _build;"
        "print(_build.build_once(Path(sys.argv[1]), ('90',)))"
    )
    command = [sys.executable, "-c", code, str(SOURCES)]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    answers = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert Path(answers[0][0].strip()).read_text() == "built\n"
    calls = (tmp_path / "log").read_text().splitlines()
    assert len(calls) == len(list(SOURCES.rglob("*.cu"))) + 1  # and the link
    assert sum("compiling for sm_90" in err for _, err in answers) == 1


def test_build_once_says_why_it_failed_and_leaves_nothing(fake_nvcc, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAILS", "1")
    with pytest.raises(RuntimeError, match="no such register"):
        _build.build_once(SOURCES, ("90",))
    assert not list((tmp_path / "cache").rglob(_build.LIBRARY))


def test_cache_dir_follows_the_sources(tmp_path):
    copy = tmp_path / "csrc"
    shutil.copytree(SOURCES, copy)
    assert _build.cache_dir(copy, ("90",)) == _build.cache_dir(SOURCES, ("90",))
    assert _build.cache_dir(copy, ("80",)) != _build.cache_dir(SOURCES, ("90",))
    (copy / "hopper" / "tma.cuh").write_text("// changed")
    assert _build.cache_dir(copy, ("90",)) != _build.cache_dir(SOURCES, ("90",))


@pytest.fixture(scope="module")
def library():
    reason = _build.missing()
    if reason:
        pytest.skip(reason)
    return _build.build_once(SOURCES, _build.ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_build_spills_no_registers_on_any_architecture(library):
    report = library.with_name(_build.REPORT).read_text()
    kernel = re.compile(
        r"Compiling entry function '(\S+)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        re.DOTALL,
    )
    built: dict[str, set[str]] = {}
    for name, arch, *memory in kernel.findall(report):
        built.setdefault(arch, set()).add(re.sub(r"_GLOBAL__N__\w+?_cu_\w{8}_?\d*", "", name))
        assert memory == ["0", "0", "0"], f"{name} for sm_{arch} spills: {memory}"
    assert set(_build.ARCHITECTURES) <= set(built)
    assert all(len(built[arch]) >= 13 for arch in _build.ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_build_exports_our_symbols_alone(library):
    table = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    exported = {line.split()[-1] for line in table.stdout.splitlines()}
    sources = "".join(path.read_text() for path in SOURCES.rglob("*.cu"))
    expected = set(re.findall(r"EXPORT_TYPED_FUNC\((\w+),", sources))
    assert expected >= {
        "norm",
        "rope",
        "permute_rows",
        "block_sparse_attention",
        "probe_sums",
        "check_device",
    }
    assert exported == {f"__tvm_ffi_{name}" for name in expected}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_build_is_small_and_loads_without_a_gpu(library):
    assert library.stat().st_size < 20e6
    tvm_ffi = pytest.importorskip("tvm_ffi")
    module = tvm_ffi.load_module(str(library))
    if os.path.exists("/dev/nvidia0"):
        assert module.check_device(0) is None
    else:
        with pytest.raises(RuntimeError, match=r"CUDA driver|no CUDA-capable device"):
            module.check_device(0)


def test_a_library_that_does_not_load_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    pytest.importorskip("tvm_ffi")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / _build.LIBRARY).write_bytes(b"not a library")
    monkeypatch.setattr(_library, "_PACKAGE", tmp_path)
    assert "cannot be loaded" in _library._find(torch.device("cuda", 0)).reason


def load_hook():
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", PACKAGE / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_platform_tag_names_the_glibc_a_library_needs(tmp_path):
    hook = load_hook()
    file = tmp_path / "x.so"
    file.write_bytes(b"..GLIBC_2.14\0GLIBC_2.34\0GLIBC_2.2.5..")
    assert hook.platform_tag(file).startswith("manylinux_2_34_")


@pytest.mark.parametrize("nvcc", [True, False])
def test_build_hook_packs_the_library_or_a_pure_wheel(nvcc, fake_nvcc, monkeypatch):
    hook_module = load_hook()
    if not nvcc:
        monkeypatch.setenv("SVG_KERNELS_PURE", "1")
    hook = hook_module.KernelsBuildHook(str(PACKAGE), {}, None, None, "", "wheel", App())
    data = {"force_include": {}, "pure_python": True, "tag": None}
    hook.initialize("standard", data)
    packed = set(data["force_include"].values())
    assert "svg_kernels/csrc" in packed
    assert (f"svg_kernels/lib/{_build.LIBRARY}" in packed) == nvcc
    assert data["pure_python"] != nvcc
    assert str(data["tag"]).startswith("py3-none-manylinux_2_17_") == nvcc
    editable = {"force_include": {}, "pure_python": True, "tag": None}
    hook.initialize("editable", editable)
    assert editable == {"force_include": {}, "pure_python": True, "tag": None}


class App:
    """What the hook uses of hatchling's application."""

    def display_info(self, message): ...

    def display_warning(self, message): ...
