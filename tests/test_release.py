"""A release is refused unless tag, version and changelog agree."""

from __future__ import annotations

import check_release
import pytest
from check_release import ReleaseError, check, main, newest_entry
from distributions import distributions, static_version

PYPROJECT = """
[project]
name = "svg-toy"

[tool.hatch.build.targets.wheel]
packages = ["src/toy"]
"""


@pytest.fixture
def repository(tmp_path):
    """Return a repository of one package, svg-toy 1.2.0 in a folder `toy`, ready to be released."""
    folder = tmp_path / "packages" / "toy"
    source = folder / "src" / "toy"
    source.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (source / "__init__.py").write_text('"""Toy."""\n\n__version__ = "1.2.0"\n')
    (folder / "CHANGELOG.md").write_text(
        "# Changelog\n\n## 1.2.0 (2026-01-31)\n\n- New.\n\n## 1.1.0 (2025-12-01)\n\n- Old.\n"
    )
    return tmp_path


def test_distributions_are_named_by_pyproject_and_not_by_folder(repository):
    (package,) = distributions(repository).values()
    assert (package.name, package.folder.name, package.module) == ("svg-toy", "toy", "toy")
    assert package.version == "1.2.0"


def test_check_names_the_distribution(repository):
    assert check("svg-toy-v1.2.0", repository).name == "svg-toy"


@pytest.mark.parametrize(
    "tag", ["v1.2.0", "svg-toy-1.2.0", "svg-toy-v1.2", "toy-v1.2.0", "other-v1.2.0", ""]
)
def test_check_refuses_a_tag_that_names_no_distribution(repository, tag):
    with pytest.raises(ReleaseError, match="expected a tag"):
        check(tag, repository)


def test_check_refuses_a_version_that_differs(repository):
    with pytest.raises(ReleaseError, match=r"__version__ is 1\.2\.0"):
        check("svg-toy-v1.3.0", repository)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("## 1.1.0 (2025-12-01)\n\n- Old.", "newest entry is 1.1.0"),
        ("## 1.2.0 (unreleased)\n\n- New.", "must carry a date"),
        ("## 1.2.0 (2026-01-31)", "is empty"),
        ("## 1.2.0 (2026-01-31)\n\n## 1.1.0 (2025-12-01)\n\n- Old.", "is empty"),
        ("## 1.2.0", "expected '## version"),
        ("", "has no"),
    ],
)
def test_check_refuses_a_changelog_that_disagrees(repository, entry, reason):
    (repository / "packages/toy/CHANGELOG.md").write_text(f"# Changelog\n\n{entry}\n")
    with pytest.raises(ReleaseError, match=reason):
        check("svg-toy-v1.2.0", repository)


def test_static_version_refuses_a_computed_one(tmp_path):
    init = tmp_path / "__init__.py"
    init.write_text("__version__ = open('VERSION').read()\n")
    with pytest.raises(ValueError, match="literal"):
        static_version(init)


def test_newest_entry_is_the_first_and_ends_at_the_next(repository):
    changelog = repository / "packages/toy/CHANGELOG.md"
    assert newest_entry(changelog) == ("1.2.0", "2026-01-31", "- New.")


def test_main_prints_the_name_and_writes_the_notes(repository, monkeypatch, capsys, tmp_path):
    package = distributions(repository)["svg-toy"]
    monkeypatch.setattr(check_release, "check", lambda tag: package)
    assert main(["svg-toy-v1.2.0", "--notes", str(tmp_path / "notes.md")]) == 0
    assert capsys.readouterr().out == "svg-toy\n"
    assert (tmp_path / "notes.md").read_text() == "- New.\n"


def test_main_says_why_and_fails(capsys):
    assert main(["no-such-package-v1.0.0"]) == 1
    assert "expected a tag" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([])
