"""The install lines of pages, READMEs and messages are the ones that `nox -s build` runs."""

from __future__ import annotations

import re

import pytest
from check_wheels import named
from distributions import ROOT, distributions
from install_lines import CHECKOUT, HINTS, LINES, documents, printed

FIRST = 'pip install "svg-models[kernels]"'
# The pages that tell somebody how to install everything.
FRONT = ("README.md", "docs/installation.md", "packages/svg-models/README.md")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("```bash\npip install svg-models   # a comment\n```", ["pip install svg-models"]),
        ("Use `pip install svg-kernels`.", ["pip install svg-kernels"]),
        ("Use pip install svg-kernels.", ["pip install svg-kernels"]),
        ("\"try pip install 'svg-attention[kernels]'\"", ['pip install "svg-attention[kernels]"']),
        ("pip install ./packages/flash-kmeans", ["pip install ./packages/flash-kmeans"]),
        ("pip install flash-kmeans", ["pip install flash-kmeans"]),
        ("pip install torch --index-url https://download.pytorch.org/whl/cpu", []),
        ("pip install 'apache-tvm-ffi>=0.1,<0.2'", []),
        ("pip install flash-attn-4", []),
        (CHECKOUT, [CHECKOUT]),
        (f"{FIRST}\n{FIRST}", [FIRST, FIRST]),
    ],
)
def test_printed_finds_our_lines(text, lines):
    assert list(printed(text)) == lines


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_prints_only_lines_that_are_run(path):
    lines = {*printed(path.read_text(encoding="utf-8"))}
    assert lines <= {*LINES, *HINTS, CHECKOUT}


@pytest.mark.parametrize("page", FRONT)
def test_a_gpu_user_is_told_the_same_first_line_everywhere(page):
    lines = list(printed((ROOT / page).read_text(encoding="utf-8")))
    assert lines[0] == FIRST == next(iter(LINES))


@pytest.mark.parametrize("package", distributions().values(), ids=list(distributions()))
def test_a_readme_says_how_its_package_is_installed(package):
    lines = list(printed((package.folder / "README.md").read_text(encoding="utf-8")))
    assert package.name in {requirement.name for line in lines for requirement in named(line)}


@pytest.mark.parametrize("line", [*LINES, *HINTS])
def test_a_line_asks_for_extras_that_exist(line):
    for requirement in named(line):
        project = distributions()[requirement.name].project
        assert requirement.extras <= project["optional-dependencies"].keys()


def test_hints_are_still_given():
    given = {line for path in documents() for line in printed(path.read_text(encoding="utf-8"))}
    assert {*HINTS} <= given


def test_every_package_is_installed_by_some_line():
    layered = {name for name, package in distributions().items() if package.layered}
    for lines, expected in ((LINES, {*distributions()}), ([CHECKOUT], layered)):
        assert {requirement.name for line in lines for requirement in named(line)} == expected


def test_the_installation_page_has_the_table():
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| `(pip install [^`]+)` \|$", page, flags=re.MULTILINE)
    assert [(line, purpose) for purpose, line in rows] == list(LINES.items())
