"""The site of all versions: which releases it has, and how they get there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import site_versions
import yaml
from distributions import ROOT


def test_releases_are_the_last_patches_of_svg_models_in_order():
    tags = [
        "svg-models-v0.2.0",
        "svg-models-v0.10.0",
        "svg-models-v0.2.11",
        "svg-models-v0.2.9",
        "svg-attention-v3.0.0",
        "svg-models-v0.3.0rc1",
        "v1.0.0",
    ]
    assert site_versions.releases(tags) == {
        "0.2": "svg-models-v0.2.11",
        "0.10": "svg-models-v0.10.0",
    }
    assert site_versions.releases([]) == {}


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@localhost", *words],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def test_build_makes_every_release_from_its_tag_and_leaves_nothing_behind(tmp_path, monkeypatch):
    """With a stand-in for mike, which commits the page of the folder that it is called in."""
    clone, target = tmp_path / "clone", tmp_path / "site"
    clone.mkdir()
    git(clone, "init", "-b", "main")
    for text in ("0.1.0", "0.2.0", "main"):
        (clone / "page.md").write_text(text)
        git(clone, "add", "page.md")
        git(clone, "commit", "-m", text)
        if text != "main":
            git(clone, "tag", f"svg-models-v{text}")
    calls = []

    def mike(folder, command, *words):
        page = (folder / "page.md").read_text()
        calls.append((page, command, words))
        if command == "deploy":
            version = words[-2] if words[-1] == "latest" else words[-1]
            blob = tmp_path / "blob"
            blob.write_text(page)
            known = git(clone, "branch", "--list", site_versions.BRANCH).strip()
            tree = tmp_path / f"tree-{version}"
            if known:
                git(clone, "worktree", "add", str(tree), site_versions.BRANCH)
            else:
                git(clone, "worktree", "add", "--detach", str(tree))
                git(tree, "checkout", "--orphan", site_versions.BRANCH)
                git(tree, "rm", "-rf", ".")
            (tree / version).mkdir()
            (tree / version / "index.html").write_text(page)
            git(tree, "add", ".")
            git(tree, "commit", "-m", version)
            git(clone, "worktree", "remove", "--force", str(tree))

    monkeypatch.setattr(site_versions, "_mike", mike)
    assert site_versions.build(target, clone) == ["0.1", "0.2", "dev"]
    found = {path.parent.name: path.read_text() for path in target.glob("*/index.html")}
    assert found == {"0.1": "0.1.0", "0.2": "0.2.0", "dev": "main"}
    assert [words[-1] for _, command, words in calls if command == "deploy"] == [
        "0.1",
        "latest",
        "dev",
    ]
    assert calls[-1][1:] == ("set-default", ("latest",))
    assert git(clone, "branch").split() == ["*", "main"]
    assert len(git(clone, "worktree", "list").splitlines()) == 1


def test_the_theme_offers_the_versions():
    class Loader(yaml.SafeLoader):
        """Reads what names a class as nothing."""

    Loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node))
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    assert config["extra"]["version"]["provider"] == ["VERSION_PROVIDER", "none"]
    source = (ROOT / "tools" / "site_versions.py").read_text(encoding="utf-8")
    assert '"VERSION_PROVIDER": "mike"' in source


@pytest.mark.parametrize("arguments", [[], ["a", "b"]])
def test_main_wants_one_folder(arguments, capsys):
    assert site_versions.main(arguments) == 2
    assert "usage" in capsys.readouterr().err
