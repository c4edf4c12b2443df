"""Every package carries what a release needs, and its changelog says the version it has."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from check_release import newest_entry, package_names, static_version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = package_names()


def project(package: str) -> dict:
    path = ROOT / "packages" / package / "pyproject.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))["project"]


def test_there_are_four_packages():
    assert PACKAGES == ["flash-kmeans", "svg-attention", "svg-kernels", "svg-models"]


@pytest.mark.parametrize("package", PACKAGES)
def test_files_that_every_package_has(package):
    folder = ROOT / "packages" / package
    source = folder / "src" / package.replace("-", "_")
    assert (source / "py.typed").is_file()
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert readme.startswith(f"# {project(package)['name']}\n")
    assert list((folder / "tests").glob("test_*.py")), f"{package} has no tests"


@pytest.mark.parametrize("package", PACKAGES)
def test_changelog_says_the_static_version(package):
    folder = ROOT / "packages" / package
    version = static_version(folder / "src" / package.replace("-", "_") / "__init__.py")
    assert re.fullmatch(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?", version)
    assert newest_entry(folder / "CHANGELOG.md")[0] == version


@pytest.mark.parametrize("package", PACKAGES)
def test_declared_pythons_and_licence(package):
    declared = project(package)
    assert declared["license"] == "Apache-2.0"
    assert declared["requires-python"] == ">=3.10,<3.14"
    minors = {c.rsplit(".", 1)[1] for c in declared["classifiers"] if "Python :: 3." in c}
    assert minors == {"10", "11", "12", "13"}


@pytest.mark.parametrize("package", PACKAGES)
def test_ranges_on_each_other_admit_the_versions_here(package):
    from packaging.requirements import Requirement

    declared = project(package)
    extras = declared.get("optional-dependencies", {}).values()
    for line in [*declared["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = Requirement(line)
        if requirement.name in PACKAGES and requirement.name != package:
            init = ROOT / "packages" / requirement.name / "src"
            version = static_version(init / requirement.name.replace("-", "_") / "__init__.py")
            assert requirement.specifier.contains(version), f"{line} excludes {version}"
