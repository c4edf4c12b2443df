"""Every package carries what a release needs, and its changelog says the version it has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from check_release import newest_entry
from distributions import ROOT, distributions, read_toml
from packaging.requirements import Requirement

REPOSITORY = "https://github.com/sparse-videogen/sparse-videogen"
PACKAGES = distributions()
each_package = pytest.mark.parametrize("package", PACKAGES.values(), ids=list(PACKAGES))


def test_distributions_are_layered_packages_and_plug_ins_named_for_the_index():
    modules = {name: package.module for name, package in PACKAGES.items()}
    assert modules == {
        "svg-flash-kmeans": "flash_kmeans",
        "svg-attention": "svg_attention",
        "svg-kernels": "svg_kernels",
        "svg-models": "svg_models",
        "svg-compat": "svg",
        "svg-engines": "svg_engines",
    }


def requirements(package) -> list[Requirement]:
    extras = package.project.get("optional-dependencies", {}).values()
    lines = [*package.project["dependencies"], *(line for extra in extras for line in extra)]
    return [Requirement(line) for line in lines]


@each_package
def test_a_package_has_the_files_of_a_package(package):
    assert (package.source / "py.typed").is_file()
    assert (package.folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    readme = (package.folder / "README.md").read_text(encoding="utf-8")
    assert readme.startswith(f"# {package.name}\n")
    tests = (package.folder if package.layered else package.folder.parent) / "tests"
    assert list(tests.glob("test_*.py")), f"{package.name} has no tests"


@each_package
def test_a_changelog_says_the_static_version(package):
    assert re.fullmatch(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?", package.version)
    changelog = package.folder / "CHANGELOG.md"
    assert changelog.read_text(encoding="utf-8").startswith(f"# Changelog of {package.name}\n")
    version, _, text = newest_entry(changelog)
    assert version == package.version
    assert text


@each_package
def test_a_package_declares_its_pythons_and_licence(package):
    declared = package.project
    assert declared["license"] == "Apache-2.0"
    assert declared["requires-python"] == ">=3.10,<3.14"
    minors = {c.rsplit(".", 1)[1] for c in declared["classifiers"] if "Python :: 3." in c}
    assert minors == {"10", "11", "12", "13"}


@each_package
def test_the_urls_of_a_package_lead_into_this_repository(package):
    urls = package.project["urls"]
    folder = package.folder.relative_to(ROOT).as_posix()
    assert urls["Source"] == f"{REPOSITORY}/tree/main/{folder}"
    assert urls["Issues"] == f"{REPOSITORY}/issues"
    assert urls["Changelog"] == f"{REPOSITORY}/blob/main/{folder}/CHANGELOG.md"
    site = re.search(r"^site_url: (\S+)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)[1]
    page = urls["Documentation"].removeprefix(site).strip("/")
    assert (ROOT / "docs" / f"{page}.md").is_file(), urls["Documentation"]


@each_package
def test_ranges_on_each_other_admit_the_versions_here(package):
    for requirement in requirements(package):
        if requirement.name in PACKAGES and requirement.name != package.name:
            version = PACKAGES[requirement.name].version
            assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


@each_package
def test_nobody_requires_the_k_means_of_another_project(package):
    assert "flash-kmeans" not in {requirement.name for requirement in requirements(package)}


def test_pre_commit_runs_the_ruff_of_ci():
    lint = [Requirement(r) for r in read_toml(ROOT / "pyproject.toml")["dependency-groups"]["lint"]]
    (ruff,) = (requirement for requirement in lint if requirement.name == "ruff")
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repository,) = config["repos"]
    assert repository["repo"] == "https://github.com/astral-sh/ruff-pre-commit"
    assert ruff.specifier.contains(repository["rev"].removeprefix("v"))
    assert {hook["id"] for hook in repository["hooks"]} == {"ruff-check", "ruff-format"}


def test_the_citation_names_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["repository-code"] == REPOSITORY
    papers = [paper["identifiers"][0]["value"] for paper in citation["references"]]
    assert papers == ["arXiv:2502.01776", "arXiv:2505.18875"]
    for paper in citation["references"]:
        assert len(paper["authors"]) == 14


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")) if p.stem != "config"],
    ids=lambda path: path.stem,
)
def test_an_issue_form_asks_what_it_needs(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "labels", "body"} <= form.keys()
    for field in form["body"]:
        assert field["type"] in {"textarea", "input", "checkboxes"}
        assert field["attributes"]["label"]
    assert any(field.get("validations", {}).get("required") for field in form["body"])
    identifiers = [field["id"] for field in form["body"]]
    assert len({*identifiers}) == len(identifiers)


def test_code_owners_names_folders_that_exist():
    for line in (ROOT / ".github" / "CODEOWNERS").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern, *owners = line.split()
            assert owners
            assert pattern == "*" or Path(ROOT / pattern.strip("/")).exists(), pattern


def test_constraints_leave_triton_to_a_torch_that_brings_it():
    """A CUDA build of torch pins one Triton; a second pin beside it cannot be resolved."""
    pins = {
        name: [
            Requirement(line).name
            for line in (ROOT / "tools" / name).read_text(encoding="utf-8").splitlines()
            if not line.startswith("#")
        ]
        for name in ("constraints.txt", "constraints-triton.txt")
    }
    assert "torch" in pins["constraints.txt"]
    assert "triton" not in pins["constraints.txt"]
    assert pins["constraints-triton.txt"] == ["triton"]
