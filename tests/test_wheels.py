"""Wheels that must not be released are refused, and the local index is one that pip reads."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from check_wheels import (
    LIBRARIES,
    WheelError,
    check_library,
    inspect,
    make_environment,
    named,
    required,
    write_index,
)
from distributions import ROOT, distributions
from install_lines import CHECKOUT

KERNELS = distributions()["svg-kernels"]
LINUX = "manylinux_2_17_x86_64"


def write_wheel(
    folder: Path, name: str, *, platform: str = "any", files: tuple[str, ...] = (), **fields: str
) -> Path:
    """Write a wheel of svg-kernels' shape that holds empty files."""
    stem = f"{name.replace('-', '_')}-{fields.get('Version', '1.0')}"
    wheel = folder / f"{stem}-py3-none-{platform}.whl"
    lines = [f"{key}: {value}" for key, value in {"Name": name, **fields}.items()]
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in files:
            archive.writestr(file, "")
        archive.writestr(f"{stem}.dist-info/licenses/LICENSE", "")
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(
            f"{stem}.dist-info/METADATA",
            "\n".join(["Metadata-Version: 2.4", *lines, "", "What it is."]),
        )
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return wheel


def kernels_wheel(folder: Path, *, library: bool, platform: str, **changed: str) -> Path:
    fields = {
        "Version": KERNELS.version,
        "License-Expression": "Apache-2.0",
        "Requires-Python": "<3.14,>=3.10",
    }
    files = ("svg_kernels/__init__.py", "svg_kernels/py.typed")
    files += (LIBRARIES["svg-kernels"],) if library else ()
    return write_wheel(
        folder, "svg-kernels", platform=platform, files=files, **{**fields, **changed}
    )


def test_inspect_accepts_a_wheel_with_its_library(tmp_path):
    inspect(KERNELS, kernels_wheel(tmp_path, library=True, platform=LINUX), compiled=True)


def test_inspect_accepts_a_pure_wheel_unless_it_is_to_be_released(tmp_path):
    wheel = kernels_wheel(tmp_path, library=False, platform="any")
    inspect(KERNELS, wheel)
    with pytest.raises(WheelError, match=r"lacks .*libsvg_kernels\.so.*SVG_KERNELS_NVCC=wheels"):
        inspect(KERNELS, wheel, compiled=True)


def test_inspect_refuses_a_tag_that_the_library_denies(tmp_path):
    with pytest.raises(WheelError, match="tagged for any platform"):
        inspect(KERNELS, kernels_wheel(tmp_path, library=True, platform="any"))
    with pytest.raises(WheelError, match="holds no library"):
        inspect(KERNELS, kernels_wheel(tmp_path, library=False, platform=LINUX))


@pytest.mark.parametrize(
    ("field", "value"),
    [("Requires-Python", ">=3.8"), ("License-Expression", "MIT"), ("Version", "9.9.9")],
)
def test_inspect_refuses_metadata_that_differ(tmp_path, field, value):
    wheel = kernels_wheel(tmp_path, library=True, platform=LINUX, **{field: value})
    with pytest.raises(WheelError, match=f"{field} must be"):
        inspect(KERNELS, wheel)


def test_inspect_refuses_strangers_and_missing_files(tmp_path):
    with pytest.raises(WheelError, match=r"lacks svg_kernels/py\.typed"):
        inspect(KERNELS, write_wheel(tmp_path, "svg-kernels", files=("svg_kernels/__init__.py",)))
    files = ("svg_kernels/__init__.py", "svg_kernels/py.typed", "tests/test_norm.py")
    with pytest.raises(WheelError, match="must hold svg_kernels alone"):
        inspect(KERNELS, write_wheel(tmp_path, "svg-kernels", files=files))


def test_check_library_asks_for_none_where_there_is_none(tmp_path):
    wheel = Path("svg_models-1.0-py3-none-any.whl")
    check_library("svg-models", wheel, ["svg_models/__init__.py"], compiled=True)


def test_named_reads_folders_by_their_distribution():
    layered = {name for name, package in distributions().items() if package.layered}
    assert {requirement.name for requirement in named(CHECKOUT)} == layered
    (requirement,) = named('pip install "svg-models[kernels]"')
    assert (requirement.name, requirement.extras) == ("svg-models", {"kernels"})


def test_required_follows_extras_and_nothing_else(tmp_path):
    wheels = {"a": tmp_path / "a-1.0.whl", "b": tmp_path / "b-1.0.whl", "c": tmp_path / "c-1.0.whl"}
    needs = {"a": ["b>=1", "c; extra == 'more'", "torch"], "b": [], "c": ["b; extra == 'other'"]}
    for name, wheel in wheels.items():
        lines = "".join(f"Requires-Dist: {line}\n" for line in needs[name])
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\n{lines}\n")
    found = {
        line: required(named(f'pip install "{line}"')[0], wheels)
        for line in ("a", "a[more]", "c", "torch")
    }
    assert found == {"a": {"a", "b"}, "a[more]": {"a", "b", "c"}, "c": {"c"}, "torch": set()}


def test_write_index_is_read_by_pip(tmp_path):
    """One wheel of two names is asked for; what pip puts down is the file that was laid out."""
    one = write_wheel(tmp_path, "svg-flash-kmeans", Version="1.0")
    two = write_wheel(tmp_path, "svg-kernels", Version="1.0")
    address = write_index([one, two], tmp_path / "index")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--isolated"]
    command += ["--index-url", address, "--dest", str(tmp_path / "got"), "svg_flash.kmeans"]
    subprocess.run(command, check=True, timeout=60)
    assert [path.name for path in (tmp_path / "got").iterdir()] == [one.name]
    assert (tmp_path / "got" / one.name).read_bytes() == one.read_bytes()


def test_make_environment_has_a_pip_that_installs_there(tmp_path):
    wheel = write_wheel(tmp_path, "toy", files=("toy/__init__.py",), Version="1.0")
    address = write_index([wheel], tmp_path / "index")
    commands = make_environment(tmp_path / "env", ["--no-index", "--find-links", address + "/toy/"])
    subprocess.run([commands / "pip", "install", "--quiet", "toy"], check=True, timeout=60)
    code = "import toy, importlib.util as u; assert u.find_spec('torch'); print(toy.__file__)"
    done = subprocess.run(
        [commands / "python", "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert str(tmp_path / "env") in done.stdout
    assert not list((ROOT / "packages").glob("toy*"))
