from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from svg_kernels import _build, _cache

PACKAGE = Path(__file__).parents[1]
SOURCES = PACKAGE / "csrc"
MODULES = PACKAGE / "src" / "svg_kernels"
STUCK_NVCC = """#!/bin/sh
[ "$1" = --version ] && exit
sleep 300 &
echo $$ $! >> "$FAKE_LOG.pids"
wait
"""


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


def test_build_makes_the_whole_folder_or_none(fake_nvcc, tmp_path, monkeypatch):
    library = _build.build(SOURCES, tmp_path / "lib", ("90",))
    assert library.read_text() == "built\n"
    assert sorted(path.name for path in library.parent.iterdir()) == [
        _build.LIBRARY,
        _build.REPORT,
    ]
    calls = (tmp_path / "log").read_text().splitlines()
    assert len(calls) == len(list(SOURCES.rglob("*.cu"))) + 1  # and the link
    monkeypatch.setenv("FAKE_FAILS", "1")
    with pytest.raises(RuntimeError, match="no such register"):
        _build.build(SOURCES, tmp_path / "other", ("90",))
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_build_that_is_killed_leaves_no_folder_and_no_compiler(end, fake_nvcc, tmp_path):
    fake_nvcc.write_text(STUCK_NVCC)
    code = (
        "import sys; from pathlib import Path; sys.path.append(sys.argv[3]); import _build;"
        "_build.build(Path(sys.argv[1]), Path(sys.argv[2]), ('90',))"
    )
    folder = tmp_path / "builds"
    folder.mkdir()
    command = [sys.executable, "-c", code, str(SOURCES), str(folder / "lib"), str(MODULES)]
    # Not ignored, as it would be in the background of a shell.
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    build = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=restore)
    pids = tmp_path / "log.pids"
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 4)  # two compilers
    running = [int(pid) for pid in pids.read_text().split()]
    assert all(alive(pid) for pid in running)
    assert list(folder.iterdir())
    build.send_signal(end)
    build.wait(timeout=30)
    wait_until(lambda: not any(alive(pid) for pid in running))
    wait_until(lambda: not list(folder.iterdir()))


def wait_until(holds):
    """Wait up to 30 s for a condition."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in 30 s"
        time.sleep(0.05)


def alive(pid):
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def library():
    reason = _build.missing()
    if reason:
        pytest.skip(reason)
    return _cache.build_once(SOURCES, _build.ARCHITECTURES)


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
def test_build_finds_every_header_self_contained(tmp_path):
    if reason := _build.missing():
        pytest.skip(reason)
    headers = [path for path in SOURCES.rglob("*") if path.suffix in (".cuh", ".h")]
    assert len(headers) > 10
    for header in headers:
        source = tmp_path / "alone_sm90a.cu"
        source.write_text(f'#include "{header.relative_to(SOURCES)}"\n')
        command = _build.compile_command(
            _build.find_nvcc(), source, tmp_path / "alone.o", ("90a",), False
        )
        command += [f"-I{SOURCES}", f"-I{_build.find_headers()}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{header}:\n{done.stderr}"


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
    files = [path for path in data["force_include"] if path.endswith(_build.LIBRARY)]
    assert all(Path(path).exists() for path in files)
    hook.finalize("standard", data, "x.whl")
    assert not any(Path(path).parents[1].exists() for path in files)
    assert not _cache.cache_root().exists(), "a wheel takes nothing from a cache"
    editable = {"force_include": {}, "pure_python": True, "tag": None}
    hook.initialize("editable", editable)
    assert editable == {"force_include": {}, "pure_python": True, "tag": None}


class App:
    """What the hook uses of hatchling's application."""

    def display_info(self, message): ...

    def display_warning(self, message): ...
