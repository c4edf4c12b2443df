"""Refuse a release whose tag, version and changelog disagree.

python tools/check_release.py svg-attention-v0.2.0
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAG = re.compile(r"(?P<package>[a-z]+(?:-[a-z]+)*)-v(?P<version>\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?)")
HEADING = re.compile(r"## (?P<version>\S+) \((?P<date>[^)]+)\)")
DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


class ReleaseError(Exception):
    """A tag that must not be released, and why."""


def package_names(root: Path = ROOT) -> list[str]:
    """Return the names of the packages in the repository."""
    return sorted(path.parent.name for path in root.glob("packages/*/pyproject.toml"))


def static_version(init: Path) -> str:
    """Return the literal assigned to `__version__`, without importing the package."""
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            target = node.targets[0]
            if isinstance(target, ast.Name) and target.id == "__version__":
                return str(node.value.value)
    raise ReleaseError(f"{init} must assign a literal to __version__")


def newest_entry(changelog: Path) -> tuple[str, str]:
    """Return version and date of a changelog's first `## version (date)` heading."""
    for line in changelog.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            match = HEADING.fullmatch(line.strip())
            if not match:
                raise ReleaseError(f"{changelog}: expected '## version (date)', got {line!r}")
            return match["version"], match["date"]
    raise ReleaseError(f"{changelog} has no '## version (date)' heading")


def check(tag: str, root: Path = ROOT) -> str:
    """Return the package that a tag releases.

    Raises:
        ReleaseError: if the tag names no package, or version and changelog disagree with it, or
            the changelog has no date for it yet.
    """
    match = TAG.fullmatch(tag)
    if not match or match["package"] not in package_names(root):
        names = ", ".join(package_names(root))
        raise ReleaseError(f"expected a tag <package>-vX.Y.Z of one of {names}; got {tag!r}")
    name, version = match["package"], match["version"]
    folder = root / "packages" / name
    static = static_version(folder / "src" / name.replace("-", "_") / "__init__.py")
    if static != version:
        raise ReleaseError(f"tag {tag} but __version__ is {static}; change one of them")
    written, date = newest_entry(folder / "CHANGELOG.md")
    if written != version:
        raise ReleaseError(f"tag {tag} but the changelog's newest entry is {written}")
    if not DATE.fullmatch(date):
        raise ReleaseError(f"the changelog's entry {written} must carry a date, got ({date})")
    return name


def main(arguments: list[str]) -> int:
    """Print the package of the tag given, or why it must not be released."""
    if len(arguments) != 1:
        print("usage: check_release.py TAG", file=sys.stderr)
        return 2
    try:
        print(check(arguments[0]))
    except ReleaseError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
