"""Build sdist and wheel of each package, and install them as the documentation says.

The wheels go into a local index (PEP 503). Each line of `install_lines.py` runs in a fresh
environment against it; then what the line names is imported there, and nothing else of this
repository may be importable. The environment that runs this script needs `build`, `packaging` and
pip, and sees torch; the fresh ones look for torch in the same place, where nothing else may be but
what torch itself needs.

    python tools/check_wheels.py svg-kernels --dist dist   # build all, check one, keep all in dist/
    python tools/check_wheels.py --built dist              # check those, on another Python
    python tools/check_wheels.py --compiled                # refuse svg-kernels without its library
"""

from __future__ import annotations

import argparse
import email
import email.message
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

from distributions import ROOT, Distribution, distributions
from install_lines import CHECKOUT, HINTS, LINES
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

# Which file a distribution is released with, besides Python.
LIBRARIES = {"svg-kernels": "svg_kernels/lib/libsvg_kernels.so"}

IMPORT = """
import importlib, importlib.metadata, importlib.util, sys
expected = dict(argument.split("=") for argument in sys.argv[1].split(","))
for module, distribution in expected.items():
    package = importlib.import_module(module)
    version = importlib.metadata.version(distribution)
    if package.__version__ != version:
        sys.exit(f"{module}.__version__ is {package.__version__}, its metadata say {version}")
    missing = [name for name in package.__all__ if not hasattr(package, name)]
    if missing:
        sys.exit(f"{module}.__all__ names what is not there: {missing}")
present = [name for name in sys.argv[2:] if importlib.util.find_spec(name)]
if present:
    sys.exit(f"{list(expected)} were to be alone, but {present} can be imported")
"""


class WheelError(Exception):
    """What is wrong with a wheel, or with a line that installs it."""


def build(package: Distribution, target: Path) -> Path:
    """Build a package's sdist, and its wheel from that sdist; return the wheel."""
    command = [sys.executable, "-m", "build", "--outdir", str(target), str(package.folder)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        raise WheelError(f"building {package.name} failed:\n{done.stdout}{done.stderr}")
    return next(target.glob("*.whl"))


def metadata(wheel: Path) -> email.message.Message:
    """Return a wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        file = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(file).decode())


def inspect(package: Distribution, wheel: Path, *, compiled: bool = False) -> None:
    """Raise WheelError unless a wheel holds the files and metadata that every package has.

    Args:
        package: what the wheel was built from.
        wheel: the file.
        compiled: refuse a wheel that lacks the library in `LIBRARIES`, or is tagged as if it did.
    """
    module = package.module
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for needed in (f"{module}/__init__.py", f"{module}/py.typed"):
        if needed not in names:
            raise WheelError(f"{wheel.name} lacks {needed}")
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        raise WheelError(f"{wheel.name} lacks its LICENSE")
    strangers = [n for n in names if n.split("/")[0] != module and ".dist-info/" not in n]
    if strangers:
        raise WheelError(f"{wheel.name} must hold {module} alone, has also {strangers[:5]}")
    check_library(package.name, wheel, names, compiled=compiled)
    found = metadata(wheel)
    for key, expected in {
        "Name": package.name,
        "Version": package.version,
        "License-Expression": "Apache-2.0",
        "Requires-Python": "<3.14,>=3.10",
    }.items():
        if found[key] != expected:
            raise WheelError(f"{wheel.name}: {key} must be {expected!r}, is {found[key]!r}")
    if not str(found.get_payload()).strip():
        raise WheelError(f"{wheel.name} has no description; is README.md declared?")


def check_library(name: str, wheel: Path, files: Iterable[str], *, compiled: bool) -> None:
    """Raise WheelError where a wheel's tag and its library disagree, or the library is missing."""
    library = LIBRARIES.get(name)
    platforms = {tag.platform for tag in parse_wheel_filename(wheel.name)[3]}
    portable = platforms == {"any"}
    present = library is not None and library in files
    if present and portable:
        raise WheelError(f"{wheel.name} holds {library} and is tagged for any platform")
    if not present and not portable:
        raise WheelError(f"{wheel.name} is tagged for {sorted(platforms)} and holds no library")
    if compiled and library and not present:
        raise WheelError(
            f"{wheel.name} lacks {library}; build it where nvcc is found, or with "
            "SVG_KERNELS_NVCC=wheels"
        )


def write_index(wheels: Iterable[Path], folder: Path) -> str:
    """Lay wheels out as a simple index (PEP 503); return its address."""
    links: dict[str, list[str]] = {}
    for wheel in wheels:
        project = canonicalize_name(parse_wheel_filename(wheel.name)[0])
        (folder / project).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wheel, folder / project / wheel.name)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        link = f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a><br>'
        links.setdefault(project, []).append(link)
    for name, lines in links.items():
        (folder / name / "index.html").write_text(page(lines), encoding="utf-8")
    projects = [f'<a href="{name}/">{name}</a><br>' for name in links]
    (folder / "index.html").write_text(page(projects), encoding="utf-8")
    return folder.resolve().as_uri()


def page(lines: Iterable[str]) -> str:
    """Return a page of links."""
    return "<!DOCTYPE html>\n<html><body>\n" + "\n".join(lines) + "\n</body></html>\n"


def required(requirement: Requirement, wheels: dict[str, Path]) -> set[str]:
    """Return the distributions of the repository that a requirement brings, itself included."""
    name = canonicalize_name(requirement.name)
    if name not in wheels:
        return set()
    found = {str(name)}
    for line in metadata(wheels[name]).get_all("Requires-Dist", []):
        needed = Requirement(line)
        extras = requirement.extras or {""}
        if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in extras):
            found |= required(needed, wheels)
    return found


def named(line: str) -> list[Requirement]:
    """Return what an install line asks for, folders of the checkout by their distribution."""
    folders = {f"./packages/{p.folder.name}": p.name for p in distributions().values()}
    return [Requirement(folders.get(word, word)) for word in shlex.split(line)[2:]]


def home_of(module: str) -> Path:
    """Return the site-packages folder that a module is imported from."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise WheelError(f"{module} must be installed to check wheels beside it")
    return Path(spec.origin).parent.parent


def make_environment(folder: Path, options: Iterable[str]) -> Path:
    """Make an environment that sees torch and has a `pip` with options of ours; return its `bin`.

    Options given to pip on its command line add to those of the machine's configuration, which the
    same options as environment variables would replace.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    (site / "torch.pth").write_text(str(home_of("torch")), encoding="utf-8")
    command = folder / "bin" / "pip"
    words = (sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"))
    command.write_text(
        f'#!/bin/sh\nexec {shlex.join(words)} "$@" {shlex.join(options)}\n', encoding="utf-8"
    )
    command.chmod(0o755)
    return folder / "bin"


def pip_options(wheels: dict[str, Path], folder: Path) -> list[str]:
    """Return what makes pip take the wheels built here, and the versions tested of the others."""
    pins = folder / "pins.txt"
    versions = (parse_wheel_filename(wheel.name)[:2] for wheel in wheels.values())
    pins.write_text("".join(f"{name}=={version}\n" for name, version in versions), "utf-8")
    tested = ROOT / os.environ.get("CONSTRAINTS", "tools/constraints.txt")
    options = ["--quiet", "--no-compile", "--constraint", str(pins), "--constraint", str(tested)]
    return [*options, "--extra-index-url", write_index(wheels.values(), folder / "index")]


def run_line(line: str, wheels: dict[str, Path], folder: Path, options: Iterable[str]) -> None:
    """Run an install line in a fresh environment and import there what it names, and only that.

    Raises:
        WheelError: if pip fails, a module does not import, or one is there that nobody asked for.
    """
    commands = make_environment(folder, options)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PATH": f"{commands}:{os.environ['PATH']}",
        # From the checkout pip builds again what was built here; a pure wheel takes no minutes.
        "SVG_KERNELS_PURE": "1",
    }
    done = subprocess.run(
        line, shell=True, cwd=ROOT, env=environment, text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise WheelError(f"{line} failed:\n{done.stdout}{done.stderr}")
    brought: set[str] = set().union(*(required(r, wheels) for r in named(line)))
    modules = {p.module: p.name for p in distributions().values()}
    pairs = ",".join(f"{module}={name}" for module, name in modules.items() if name in brought)
    strangers = [module for module, name in modules.items() if name not in brought]
    command = [str(commands / "python"), "-I", "-c", IMPORT, pairs, *strangers]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)
    if done.returncode:
        raise WheelError(f"after {line}:\n{done.stdout}{done.stderr}")


def built(folder: Path) -> dict[str, Path]:
    """Return the wheels that an earlier run kept in a folder."""
    wheels = {name: next((folder / name).glob("*.whl"), None) for name in distributions()}
    missing = [name for name, wheel in wheels.items() if wheel is None]
    if missing:
        raise WheelError(f"{folder} has no wheel of {missing}; build them with --dist {folder}")
    return {name: wheel.resolve() for name, wheel in wheels.items() if wheel}


def check(args: argparse.Namespace, folder: Path) -> None:
    """Build all packages, or take them from an earlier run, then check those named, or all."""
    start = time.monotonic()
    known = distributions()
    if args.built is None:
        kept = (args.dist or folder / "dist").resolve()
        wheels = {name: build(package, kept / name) for name, package in known.items()}
        print(f"built {len(wheels)} packages in {time.monotonic() - start:.0f} s", flush=True)
    else:
        wheels = built(args.built)
    for name in args.packages or known:
        inspect(known[name], wheels[name], compiled=args.compiled)
        print(f"{wheels[name].name}: {wheels[name].stat().st_size / 1e6:.2f} MB")
    options = pip_options(wheels, folder)
    python = ".".join(map(str, sys.version_info[:2]))
    lines = [*LINES, *HINTS]
    if args.packages:
        lines = [line for line in lines if {*args.packages} & names_of(line)]
    elif not args.built:
        lines.append(CHECKOUT)
    for number, line in enumerate(lines):
        start = time.monotonic()
        run_line(line, wheels, folder / f"environment-{number}", options)
        print(f"{line}: works on {python}, {time.monotonic() - start:.0f} s", flush=True)


def names_of(line: str) -> set[str]:
    """Return the names of what an install line asks for."""
    return {canonicalize_name(requirement.name) for requirement in named(line)}


def main() -> int:
    """Read the command line, check, and say what is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packages", nargs="*", help="those to check; all by default")
    parser.add_argument("--dist", type=Path, help="folder to keep what is built")
    parser.add_argument("--built", type=Path, help="folder of an earlier --dist: build nothing")
    parser.add_argument(
        "--compiled", action="store_true", help="refuse svg-kernels without its library"
    )
    args = parser.parse_args()
    unknown = [name for name in args.packages if name not in distributions()]
    if unknown:
        parser.error(f"unknown {unknown}; the packages are {', '.join(distributions())}")
    with tempfile.TemporaryDirectory() as name:
        try:
            check(args, Path(name))
        except WheelError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
