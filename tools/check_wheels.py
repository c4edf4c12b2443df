"""Build sdist and wheel of each package; install and import each wheel alone.

Alone means: in a fresh environment that sees torch, what the wheel declares, and nothing else.
The environment that runs this script needs `build` and sees torch; the fresh ones look for torch
in the same place, where nothing else may be but what torch itself needs.

    python tools/check_wheels.py svg-kernels --dist dist   # build all, check one, keep all in dist/
    python tools/check_wheels.py --built dist              # check those, on another Python
"""

from __future__ import annotations

import argparse
import email
import email.message
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path

from check_release import ROOT, package_names, static_version
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

IMPORT = """
import importlib, importlib.metadata, importlib.util, sys
module, others = sys.argv[1], sys.argv[2:]
package = importlib.import_module(module)
version = importlib.metadata.version(module.replace("_", "-"))
if package.__version__ != version:
    sys.exit(f"{module}.__version__ is {package.__version__}, its metadata say {version}")
missing = [name for name in package.__all__ if not hasattr(package, name)]
if missing:
    sys.exit(f"{module}.__all__ names what is not there: {missing}")
present = [name for name in others if importlib.util.find_spec(name)]
if present:
    sys.exit(f"{module} was to be alone, but {present} can be imported")
"""


class WheelError(Exception):
    """What is wrong with a wheel."""


def build(package: str, target: Path) -> Path:
    """Build a package's sdist, and its wheel from that sdist; return the wheel."""
    command = [sys.executable, "-m", "build", "--outdir", str(target), f"packages/{package}"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        raise WheelError(f"building {package} failed:\n{done.stdout}{done.stderr}")
    return next(target.glob("*.whl"))


def metadata(wheel: Path) -> email.message.Message:
    """Return a wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode())


def inspect(package: str, wheel: Path) -> None:
    """Raise WheelError unless a wheel holds the files and metadata that every package has."""
    module = package.replace("-", "_")
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
    found = metadata(wheel)
    version = static_version(ROOT / "packages" / package / "src" / module / "__init__.py")
    for key, expected in {
        "Name": package,
        "Version": version,
        "License-Expression": "Apache-2.0",
        "Requires-Python": "<3.14,>=3.10",
    }.items():
        if found[key] != expected:
            raise WheelError(f"{wheel.name}: {key} must be {expected!r}, is {found[key]!r}")
    if not str(found.get_payload()).strip():
        raise WheelError(f"{wheel.name} has no description; is README.md declared?")


def needed_wheels(package: str, wheels: dict[str, Path]) -> list[Path]:
    """Return a package's wheel and those of the repository that it requires."""
    needed = [wheels[package]]
    for line in metadata(wheels[package]).get_all("Requires-Dist", []):
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name in wheels and (
            not requirement.marker or requirement.marker.evaluate({"extra": ""})
        ):
            needed += [w for w in needed_wheels(name, wheels) if w not in needed]
    return needed


def home_of(module: str) -> Path:
    """Return the site-packages folder that a module is imported from."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise WheelError(f"{module} must be installed to check wheels beside it")
    return Path(spec.origin).parent.parent


def import_alone(package: str, wheels: dict[str, Path], folder: Path) -> None:
    """Install a wheel in a fresh environment beside torch, and import it there."""
    environment = folder / package
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    paths = {"base": str(environment), "platbase": str(environment)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    (site / "torch.pth").write_text(str(home_of("torch")), encoding="utf-8")
    python = environment / "bin" / "python"
    needed = needed_wheels(package, wheels)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    pip += ["--no-compile", "--constraint", os.environ.get("CONSTRAINTS", "tools/constraints.txt")]
    subprocess.run([*pip, *map(str, needed)], cwd=ROOT, check=True)
    others = [n.replace("-", "_") for n, wheel in wheels.items() if wheel not in needed]
    command = [str(python), "-I", "-c", IMPORT, package.replace("-", "_"), *others]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)
    if done.returncode:
        raise WheelError(f"{package} does not import alone:\n{done.stdout}{done.stderr}")


def built(folder: Path) -> dict[str, Path]:
    """Return the wheels that an earlier run kept in a folder."""
    wheels = {p: next((folder / p).glob("*.whl"), None) for p in package_names()}
    missing = [package for package, wheel in wheels.items() if wheel is None]
    if missing:
        raise WheelError(f"{folder} has no wheel of {missing}; build them with --dist {folder}")
    return {package: wheel.resolve() for package, wheel in wheels.items() if wheel}


def check(packages: list[str], dist: Path | None, kept: Path | None, folder: Path) -> None:
    """Build all packages, or take them from `kept`, then check those named, or all."""
    start = time.monotonic()
    if kept is None:
        wheels = {p: build(p, (dist or folder / "dist").resolve() / p) for p in package_names()}
        print(f"built {len(wheels)} packages in {time.monotonic() - start:.0f} s")
    else:
        wheels = built(kept)
    for package in packages or wheels:
        start = time.monotonic()
        inspect(package, wheels[package])
        import_alone(package, wheels, folder)
        size = wheels[package].stat().st_size / 1e6
        passed = time.monotonic() - start
        python = ".".join(map(str, sys.version_info[:2]))
        print(f"{wheels[package].name}: {size:.2f} MB, alone on {python} in {passed:.0f} s")


def main() -> int:
    """Read the command line, check, and say what is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packages", nargs="*", help="those to check; all by default")
    parser.add_argument("--dist", type=Path, help="folder to keep what is built")
    parser.add_argument("--built", type=Path, help="folder of an earlier --dist: build nothing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        try:
            check(args.packages, args.dist, args.built, Path(name))
        except WheelError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
