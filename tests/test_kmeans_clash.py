"""Two distributions install files named `flash_kmeans`; svg_attention notices, and says what helps.

Real wheels in fresh environments: ours, built here, and `flash-kmeans` 0.3.1 from the index.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OTHER = "flash-kmeans==0.3.1"
LOOK = "import svg_attention, flash_kmeans; print(flash_kmeans.__distribution__)"


def pip(*arguments: str, python: Path | None = None) -> subprocess.CompletedProcess[str]:
    place = ["--python", str(python)] if python else []
    command = [sys.executable, "-m", "pip", *place, "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds both wheels."""
    folder = tmp_path_factory.mktemp("wheels")
    fetched = pip("download", "--no-deps", "--dest", str(folder), OTHER)
    if fetched.returncode:
        pytest.skip(f"pip cannot fetch {OTHER}: {fetched.stderr.strip()[-200:]}")
    source = str(ROOT / "packages" / "flash-kmeans")
    build = ("wheel", "--no-deps", "--wheel-dir", str(folder), source)
    built = pip(*build, "--no-build-isolation")
    built = pip(*build) if built.returncode else built
    assert built.returncode == 0, built.stderr
    return folder


def environment(folder: Path, wheels: Path, *names: str) -> Path:
    """Install wheels one after the other, and return the Python that sees them and torch."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    for name in names:
        install = ("install", "--no-index", "--no-deps", "--find-links", str(wheels), name)
        done = pip(*install, python=python)
        assert done.returncode == 0, done.stderr
    purelib = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    # Dependencies come from this environment, after what was installed; svg_attention from here.
    ours = [str(ROOT / f"packages/{name}/src") for name in ("svg-attention", "svg-models")]
    around = [*ours, *(p for p in sys.path if "-packages" in p)]
    (Path(purelib.stdout.strip()) / "around.pth").write_text("\n".join(around))
    return python


def look(python: Path) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-I", "-c", LOOK]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.parametrize(
    "names", [("svg-flash-kmeans", OTHER), (OTHER,)], ids=["ours first", "theirs alone"]
)
def test_import_refuses_the_files_of_the_other(
    names: tuple[str, ...], wheels: Path, tmp_path: Path
) -> None:
    python = environment(tmp_path / "env", wheels, *names)
    done = look(python)
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: the files of flash_kmeans")
    assert " and flash-kmeans 0.3.1; both install this import name" in message
    repair = re.search(r"repair with: pip (.+) && pip (.+)$", message)
    assert repair, message
    for command in repair.groups():
        local = ("--no-index", "--find-links", str(wheels)) if "install " in command[:8] else ()
        assert pip(*command.split(), *local, python=python).returncode == 0
    assert look(python).stdout == "svg-flash-kmeans\n"


def test_import_accepts_our_files_over_the_other_and_refuses_half_of_them(
    wheels: Path, tmp_path: Path
) -> None:
    python = environment(tmp_path / "env", wheels, OTHER, "svg-flash-kmeans")
    assert look(python).stdout == "svg-flash-kmeans\n"
    # What the other left beside our files is not found.
    code = (
        "import flash_kmeans.compat as ours, flash_kmeans.interface as path\n"
        "print(path.FlashKMeans is ours.FlashKMeans)"
    )
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    # Uninstalling the other takes the files that both wrote, ours by now, along.
    assert pip("uninstall", "-y", "flash-kmeans", python=python).returncode == 0
    done = look(python)
    assert done.returncode == 1
    assert "with no __init__.py" in done.stderr
    assert "svg-flash-kmeans 0.1.0 and flash-kmeans not installed" in done.stderr
    assert "pip install --force-reinstall --no-deps svg-flash-kmeans" in done.stderr


def test_doctor_says_one_sentence(wheels: Path, tmp_path: Path) -> None:
    pytest.importorskip("typer", reason="the command line needs it")
    python = environment(tmp_path / "env", wheels, "svg-flash-kmeans", OTHER)
    code = "from svg_models.cli import app; app(['doctor'])"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in said
    assert "pip install --force-reinstall --no-deps svg-flash-kmeans" in said
