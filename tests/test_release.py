"""A release is refused unless tag, version and changelog agree."""

from __future__ import annotations

import pytest
from check_release import ReleaseError, check, main, newest_entry, static_version


@pytest.fixture
def repository(tmp_path):
    """Return a repository of one package, svg-toy 1.2.0, ready to be released."""
    folder = tmp_path / "packages" / "svg-toy"
    source = folder / "src" / "svg_toy"
    source.mkdir(parents=True)
    (folder / "pyproject.toml").write_text("")
    (source / "__init__.py").write_text('"""Toy."""\n\n__version__ = "1.2.0"\n')
    (folder / "CHANGELOG.md").write_text(
        "# Changelog\n\n## 1.2.0 (2026-01-31)\n\n- New.\n\n## 1.1.0 (2025-12-01)\n"
    )
    return tmp_path


def test_agreement_names_the_package(repository):
    assert check("svg-toy-v1.2.0", repository) == "svg-toy"


@pytest.mark.parametrize("tag", ["v1.2.0", "svg-toy-1.2.0", "svg-toy-v1.2", "other-v1.2.0", ""])
def test_a_tag_that_names_no_package_is_refused(repository, tag):
    with pytest.raises(ReleaseError, match="expected a tag"):
        check(tag, repository)


def test_a_version_that_differs_is_refused(repository):
    with pytest.raises(ReleaseError, match=r"__version__ is 1\.2\.0"):
        check("svg-toy-v1.3.0", repository)


@pytest.mark.parametrize(
    ("heading", "reason"),
    [
        ("## 1.1.0 (2025-12-01)", "newest entry is 1.1.0"),
        ("## 1.2.0 (unreleased)", "must carry a date"),
        ("## 1.2.0", "expected '## version"),
        ("", "has no"),
    ],
)
def test_a_changelog_that_disagrees_is_refused(repository, heading, reason):
    (repository / "packages/svg-toy/CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n")
    with pytest.raises(ReleaseError, match=reason):
        check("svg-toy-v1.2.0", repository)


def test_a_computed_version_is_refused(tmp_path):
    init = tmp_path / "__init__.py"
    init.write_text("__version__ = open('VERSION').read()\n")
    with pytest.raises(ReleaseError, match="literal"):
        static_version(init)


def test_newest_entry_is_the_first(repository):
    assert newest_entry(repository / "packages/svg-toy/CHANGELOG.md") == ("1.2.0", "2026-01-31")


def test_the_command_says_why_and_fails(capsys):
    assert main(["no-such-package-v1.0.0"]) == 1
    assert "expected a tag" in capsys.readouterr().err
    assert main([]) == 2
