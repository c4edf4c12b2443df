"""Refuse a release whose tag, version and changelog disagree.

python tools/check_release.py svg-attention-v0.2.0
python tools/check_release.py svg-attention-v0.2.0 --notes notes.md   # the changelog's entry
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from distributions import ROOT, Distribution, distributions

TAG = re.compile(r"(?P<name>[a-z]+(?:-[a-z]+)*)-v(?P<version>\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?)")
HEADING = re.compile(r"## (?P<version>\S+) \((?P<date>[^)]+)\)")
DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


class ReleaseError(Exception):
    """A tag that must not be released, and why."""


def newest_entry(changelog: Path) -> tuple[str, str, str]:
    """Return version, date and text of a changelog's first `## version (date)` entry.

    Raises:
        ReleaseError: if the first heading of that level reads otherwise, or there is none.
    """
    entry: re.Match[str] | None = None
    text: list[str] = []
    for line in changelog.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            if entry:
                break
            entry = HEADING.fullmatch(line.strip())
            if not entry:
                raise ReleaseError(f"{changelog}: expected '## version (date)', got {line!r}")
        elif entry:
            text.append(line)
    if not entry:
        raise ReleaseError(f"{changelog} has no '## version (date)' heading")
    return entry["version"], entry["date"], "\n".join(text).strip()


def check(tag: str, root: Path = ROOT) -> Distribution:
    """Return the distribution that a tag releases.

    Raises:
        ReleaseError: if the tag names no distribution, or version and changelog disagree with it,
            or the changelog has no date or no text for it yet.
    """
    known = distributions(root)
    match = TAG.fullmatch(tag)
    if not match or match["name"] not in known:
        names = ", ".join(known)
        raise ReleaseError(f"expected a tag <distribution>-vX.Y.Z of one of {names}; got {tag!r}")
    found, version = known[match["name"]], match["version"]
    if found.version != version:
        raise ReleaseError(f"tag {tag} but __version__ is {found.version}; change one of them")
    written, date, text = newest_entry(found.folder / "CHANGELOG.md")
    if written != version:
        raise ReleaseError(f"tag {tag} but the changelog's newest entry is {written}")
    if not DATE.fullmatch(date):
        raise ReleaseError(f"the changelog's entry {written} must carry a date, got ({date})")
    if not text:
        raise ReleaseError(f"the changelog's entry {written} is empty; say what a user notices")
    return found


def main(arguments: list[str]) -> int:
    """Print the distribution of the tag given, or why it must not be released."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tag", help="<distribution>-vX.Y.Z")
    parser.add_argument("--notes", type=Path, help="write the changelog's entry to this file")
    args = parser.parse_args(arguments)
    try:
        found = check(args.tag)
    except ReleaseError as error:
        print(error, file=sys.stderr)
        return 1
    if args.notes:
        _, _, text = newest_entry(found.folder / "CHANGELOG.md")
        args.notes.write_text(text + "\n", encoding="utf-8")
    print(found.name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
