"""Compile `csrc/` into one shared library with nvcc; used by the wheel build and at first use.

Standard library only: `hatch_build.py` loads this file by its path, before the package exists, and
a build runs it as a program of its own, which ends with whoever asked for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBRARY = "libsvg_kernels.so"
REPORT = "ptxas.txt"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
COMMANDS = "commands.json"  # what a build runs, in its scratch folder
_stopping = threading.Event()
_SUFFIX = re.compile(r"_sm(\d+[af]?)$")


def sources(package: Path) -> Path:
    """Return the folder of the sources: inside the wheel, else beside `src/` in a checkout."""
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parents[1] / "csrc"


def find_nvcc() -> Path | None:
    """Return nvcc from `CUDA_HOME`, `PATH`, NVIDIA's PyPI wheels or `/usr/local/cuda`."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    if on_path and os.path.isabs(on_path):  # nothing that the current folder offers
        candidates.append(Path(on_path))
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        candidates += sorted(Path(folder).glob("cu[0-9]*/bin/nvcc"), reverse=True)
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def find_headers() -> Path | None:
    """Return the include folder of apache-tvm-ffi, without importing it."""
    spec = importlib.util.find_spec("tvm_ffi")
    folders = (spec.submodule_search_locations or []) if spec else []
    found = (Path(folder) / "include" for folder in folders)
    return next((path for path in found if (path / "tvm" / "ffi").is_dir()), None)


def missing() -> str:
    """Return what keeps this machine from building, empty if nothing does."""
    if not sys.platform.startswith("linux"):
        return f"the compiled kernels are built on Linux only, this is {sys.platform}"
    if find_nvcc() is None:
        return "nvcc was not found (looked at CUDA_HOME, PATH, NVIDIA's wheels, /usr/local/cuda)"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler was found; install one or set CXX"
    if find_headers() is None:
        return "apache-tvm-ffi is not installed; pip install apache-tvm-ffi"
    return ""


def architectures_of(source: Path, wanted: Iterable[str]) -> tuple[str, ...]:
    """Return what to compile `source` for: `x_sm90a.cu` is built for that architecture alone."""
    suffix = _SUFFIX.search(source.stem)
    if suffix is None:
        return tuple(wanted)
    base = suffix[1].rstrip("af")
    return (suffix[1],) if base in {arch.rstrip("af") for arch in wanted} else ()


def compile_command(
    nvcc: Path, source: Path, target: Path, architectures: Sequence[str], ptx: bool
) -> list[str]:
    """Return the nvcc command that compiles one file for `architectures`."""
    command = [str(nvcc), "-c", str(source), "-o", str(target), "-std=c++17", "-O3"]
    command += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"]
    for arch in architectures:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    if ptx and architectures[0].isdigit():
        # For GPUs newer than the list; the driver compiles it at load.
        command += ["-gencode", f"arch=compute_{architectures[0]},code=compute_{architectures[0]}"]
    return [*command, "-Xptxas", "-v", "-Wno-deprecated-gpu-targets"]


def build(
    source_dir: Path, target_dir: Path, architectures: Sequence[str] = ARCHITECTURES, jobs: int = 2
) -> Path:
    """Build the library and its register report as a new folder; return the library.

    Compilers run below a process that watches this one: if this one dies, even killed, they end
    and nothing is left.

    Args:
        source_dir: folder of the sources, whose `.cu` files lie in folders of their own.
        target_dir: folder to make; it appears with all its files, or not at all.
        architectures: compute capabilities without the dot, oldest first.
        jobs: how many files to compile at once.

    Raises:
        RuntimeError: if something the build needs is missing, or a compiler fails; its output is
            in the message.
    """
    reason = missing()
    nvcc, headers = find_nvcc(), find_headers()
    if reason or nvcc is None or headers is None:
        raise RuntimeError(f"cannot build the kernels: {reason}")
    scratch = Path(tempfile.mkdtemp(prefix=f"{target_dir.name}.", dir=target_dir.parent))
    worker: subprocess.Popen[str] | None = None
    try:
        commands = build_commands(nvcc, headers, source_dir, scratch, architectures)
        (scratch / COMMANDS).write_text(json.dumps({"jobs": jobs, "commands": commands}))
        worker = subprocess.Popen(
            [sys.executable, "-I", __file__, str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a group of its own, which one signal ends
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        output = worker.stdout.read() if worker.stdout else ""
        if worker.wait():
            raise RuntimeError(f"compiling the kernels failed:\n{output}")
        for path in scratch.iterdir():
            if path.name not in (LIBRARY, REPORT):
                path.unlink() if path.is_file() else shutil.rmtree(path)
        (scratch / LIBRARY).chmod(0o755)
        scratch.rename(target_dir)
    finally:
        if worker is not None:
            if worker.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return target_dir / LIBRARY


def build_commands(
    nvcc: Path, headers: Path, source_dir: Path, scratch: Path, architectures: Sequence[str]
) -> list[list[str]]:
    """Return the commands of a build: one for each file, and the one that links them."""
    files = [(path, architectures_of(path, architectures)) for path in source_dir.rglob("*.cu")]
    files = sorted((path, archs) for path, archs in files if archs)
    objects = [scratch / f"{path.stem}.o" for path, _ in files]
    commands = [
        [
            *compile_command(nvcc, path, out, archs, len(architectures) > 1),
            *(f"-I{source_dir}", f"-I{headers}"),
        ]
        for (path, archs), out in zip(files, objects, strict=True)
    ]
    script = scratch / "exports.map"
    script.write_text("{ global: __tvm_ffi_*; local: *; };\n")
    link = [str(nvcc), "-shared", "-cudart", "static", "-o", str(scratch / LIBRARY)]
    link += [f"-L{nvcc.parents[1] / 'lib'}", *map(str, objects)]
    link += ["-Xlinker", f"--version-script={script}", "-Xlinker", "-s"]
    return [*commands, [*link, "-Wno-deprecated-gpu-targets"]]


def run_commands(scratch: Path) -> str:
    """Run the commands of a build, the last one after all others; return what they printed."""
    plan = json.loads((scratch / COMMANDS).read_text())
    *commands, link = plan["commands"]
    with ThreadPoolExecutor(plan["jobs"]) as pool:
        report = "".join(pool.map(_run, commands))
    _run(link)
    return report


def _run(command: Sequence[str]) -> str:
    if _stopping.is_set():
        raise RuntimeError("the build was stopped")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _end_with_parent(scratch: Path) -> None:
    """Wait until the parent no longer holds our input; then end this build and remove its files."""
    while os.read(0, 1024):
        pass
    _stopping.set()
    for _ in range(100):
        os.killpg(0, signal.SIGTERM)  # the compilers; this process handles it
        shutil.rmtree(scratch, ignore_errors=True)
        if not scratch.exists():
            break
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


def main(scratch: Path) -> int:
    """Run a build as the program that `build` starts."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # a handler, so that compilers do not inherit it
    watcher = threading.Thread(target=_end_with_parent, args=(scratch,), daemon=True)
    watcher.start()
    try:
        (scratch / REPORT).write_text(run_commands(scratch))
    except (RuntimeError, OSError) as error:
        if _stopping.is_set():
            watcher.join()  # it removes the files, then ends this process
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
