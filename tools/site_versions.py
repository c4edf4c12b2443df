"""Build the documentation of every release and of the main branch, with a choice between them.

    python tools/site_versions.py site

The version of the site is that of svg-models. Each is built from its own tag by `mike`, into a
branch of this clone that is thrown away: the tags hold everything, so nothing is kept from one site
to the next, and nobody needs to be allowed to push.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from distributions import ROOT

_TAG = re.compile(r"svg-models-v(\d+)\.(\d+)\.(\d+)")
BRANCH = "site-versions"
MAIN, LATEST = "dev", "latest"


def releases(tags: Iterable[str]) -> dict[str, str]:
    """Return version -> tag, oldest first: of each minor version, its last patch."""
    found: dict[tuple[int, int], tuple[int, str]] = {}
    for tag in tags:
        match = _TAG.fullmatch(tag)
        if match:
            major, minor, patch = map(int, match.groups())
            found[major, minor] = max(found.get((major, minor), (-1, "")), (patch, tag))
    return {f"{major}.{minor}": found[major, minor][1] for major, minor in sorted(found)}


def build(target: Path, repository: Path = ROOT) -> list[str]:
    """Build all versions into a folder; return them, as the site lists them.

    Args:
        target: made if it is missing; what is in it under the same name is replaced.
        repository: a clone with its tags.
    """
    known = releases(_git(repository, "tag", "--list").split())
    _git(repository, "branch", "--force", "--delete", BRANCH, check=False)
    built = []
    try:
        for version, tag in known.items():
            with tempfile.TemporaryDirectory() as folder:
                _git(repository, "worktree", "add", "--detach", folder, tag)
                try:
                    _deploy(Path(folder), version, latest=version == list(known)[-1])
                finally:
                    _git(repository, "worktree", "remove", "--force", folder)
            built.append(version)
        _deploy(repository, MAIN, latest=False)
        default = LATEST if built else MAIN
        _mike(repository, "set-default", default)
        archive = subprocess.run(
            ["git", "archive", BRANCH], cwd=repository, check=True, capture_output=True
        ).stdout
    finally:
        _git(repository, "branch", "--force", "--delete", BRANCH, check=False)
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        # Python 3.11.4 brought filters; what git itself packed needs none.
        files.extraction_filter = getattr(tarfile, "data_filter", None)
        files.extractall(target)
    return [*built, MAIN]


def _deploy(folder: Path, version: str, *, latest: bool) -> None:
    alias = ["--update-aliases", version, LATEST] if latest else [version]
    _mike(folder, "deploy", "--alias-type", "copy", *alias)


def _mike(folder: Path, command: str, *words: str) -> None:
    program = [sys.executable, "-c", "from mike.driver import main; main()", command]
    environment = os.environ | {"VERSION_PROVIDER": "mike"}  # the theme offers the others
    line = [*program, "--branch", BRANCH, *words]
    subprocess.run(line, cwd=folder, env=environment, check=True)


def _git(repository: Path, *words: str, check: bool = True) -> str:
    done = subprocess.run(
        ["git", *words], cwd=repository, check=check, capture_output=True, text=True
    )
    return done.stdout


def main(arguments: list[str]) -> int:
    """Build into the folder given and print which versions there are."""
    if len(arguments) != 1:
        print("usage: site_versions.py SITE", file=sys.stderr)
        return 2
    print("versions:", ", ".join(build(Path(arguments[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
