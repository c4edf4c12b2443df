"""The install lines that READMEs, pages and error messages may print, and where they are printed.

`tests/test_install_lines.py` holds the pages to this list; `nox -s build` runs each line in a fresh
environment against an index of the wheels built here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from distributions import ROOT, distributions

# What each line is for, in the order in which it is offered. The first is what a GPU user is told.
LINES = {
    'pip install "svg-models[kernels]"': "a diffusers pipeline on an NVIDIA GPU, and `svg`",
    "pip install svg-models": "the same on a CPU, or on a GPU without the compiled kernels",
    'pip install "svg-attention[kernels]"': "sparse attention in your own model, on an NVIDIA GPU",
    "pip install svg-attention": "the same without the compiled kernels",
    "pip install svg-kernels": "the fused kernels alone",
    "pip install svg-flash-kmeans": "k-means alone",
    'pip install "svg-engines[kernels]"': "the plug-ins for ComfyUI and other engines",
    "pip install svg-compat": "the names that SGLang imports from the published package `svg`",
}
# What error messages advise besides.
HINTS = ('pip install "svg-attention[triton]"', 'pip install "svg-models[ray]"')
# What is on the main branch, from a checkout of it.
CHECKOUT = (
    "pip install ./packages/flash-kmeans ./packages/svg-kernels "
    "./packages/svg-attention ./packages/svg-models"
)

_QUOTED = r"\"[^\"\n]+\"|'[^'\n]+'"
_NAME = r"[\w./\[\]-]*"
_LINE = re.compile(rf"pip install ((?:{_QUOTED}|[./\w]{_NAME})(?: (?:{_QUOTED}|[./]{_NAME}))*)")


def printed(text: str) -> Iterator[str]:
    """Yield the lines in a text that install a distribution of this repository.

    Quotes are returned as a page writes them: an error message in Python prefers the other kind.
    Lines that install only what others publish are left out.
    """
    folders = [path.folder.name for path in distributions().values()]
    ours = re.compile(rf"(?:^|[\"' /])(?:{'|'.join([*distributions(), *folders])})\b")
    for match in _LINE.finditer(text):
        if ours.search(match[1]):
            yield match[0].replace("'", '"').rstrip(".")


def documents(root: Path = ROOT) -> list[Path]:
    """Return every page that a reader sees, and every module that may print a line."""
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("packages/*/README.md")]
    return sorted(
        [*pages, *root.glob("packages/*/src/**/*.py"), *root.glob("integrations/**/*.md")]
    )
