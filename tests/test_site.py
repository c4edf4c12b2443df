"""What the documentation shows can be run, and the checks of the built site see what they must."""

from __future__ import annotations

import ast
import re
import shlex
import zlib

import check_site
import pytest
from distributions import ROOT, distributions

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "packages/*/README.md")
    for path in ROOT.glob(pattern)
)


def blocks(language: str) -> list[tuple[str, str]]:
    """Return the code blocks of a language on all pages, each with where it stands."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 1
            found.append((f"{page.relative_to(ROOT)}:{line}", match[1]))
    return found


def commands() -> list[tuple[str, list[str]]]:
    """Return every call of `svg` on all pages, as a shell would split it."""
    found = []
    for where, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removesuffix("&"), comments=True)
            if words[:1] == ["svg"]:
                found.append((where, words[1:]))
    return found


def test_pages_have_code_and_commands():
    assert len(blocks("python")) > 15
    assert len(commands()) > 20


@pytest.mark.parametrize(("where", "source"), blocks("python"), ids=lambda value: value[:60])
def test_code_on_a_page_is_python(where, source):
    if not source.startswith('--8<-- "'):
        ast.parse(source, where)


@pytest.mark.parametrize(("where", "words"), commands(), ids=str)
def test_a_command_on_a_page_is_understood(where, words, tmp_path, monkeypatch):
    typer = pytest.importorskip("typer")
    pytest.importorskip("svg_models")
    from svg_models.cli import app

    monkeypatch.chdir(tmp_path)
    for word in words:
        if re.fullmatch(r"[\w-]+\.(jpg|png|mp4)", word):
            (tmp_path / word).touch()
    group = typer.main.get_command(app)
    if words[0].startswith("-"):
        assert any(words[0] in option.opts for option in group.params), f"{where}: svg {words[0]}"
    else:
        command = group.commands[words[0]]
        assert not command.make_context(words[0], words[1:]).args


def test_every_api_page_is_of_a_package():
    folders = {path.parent.name for path in ROOT.glob("docs/api/*/*.md")}
    assert folders == {p.module for p in distributions().values() if p.layered}


def test_the_repair_of_the_k_means_files_is_the_one_that_the_error_gives():
    from svg_attention._kmeans_files import REPAIR

    page = (ROOT / "docs" / "guide" / "troubleshooting.md").read_text(encoding="utf-8")
    assert f"\n{REPAIR}\n" in page


def test_changelogs_are_on_the_site():
    for package in distributions().values():
        page = (ROOT / "docs" / "changelog" / f"{package.name}.md").read_text(encoding="utf-8")
        assert page == f'--8<-- "{package.folder.relative_to(ROOT).as_posix()}/CHANGELOG.md"\n'


def test_undocumented_is_what_no_function_or_class_stands_for():
    roles = {
        "toy.kmeans": "py:module",
        "toy.kmeans.assign": "py:function",
        "toy.result.Result": "py:class",
        "other.kmeans": "py:function",
    }
    names = {"kmeans", "assign", "Result"}
    assert check_site.undocumented("toy", names, roles) == {"kmeans"}


def test_inventory_reads_what_the_site_writes(tmp_path):
    head = b"# Sphinx inventory version 2\n# Project: x\n# Version: 1\n# zlib\n"
    body = zlib.compress(b"toy.f py:function 1 api/#$ -\ntoy py:module 1 api/#$ -\n")
    (tmp_path / "objects.inv").write_bytes(head + body)
    assert check_site.inventory(tmp_path) == {"toy.f": "py:function", "toy": "py:module"}


def test_listed_follows_the_lists_of_parts(tmp_path):
    (tmp_path / "norm").mkdir()
    (tmp_path / "norm" / "__init__.py").write_text('__all__ = ["layer_norm"]')
    init = tmp_path / "__init__.py"
    init.write_text('from . import norm\n__all__ = [*norm.__all__, "status"]')
    assert check_site.listed(init) == {"layer_norm", "status"}


def test_taken_over_sees_imports_and_lazy_homes(tmp_path):
    init = tmp_path / "__init__.py"
    init.write_text(
        "from svg_attention import SVG2\nfrom svg_models.recipes import recipe_for\n"
        '_HOMES = {"Dense": "svg_attention", "generate": "svg_models.generation"}'
    )
    assert check_site.taken_over(init, "svg_models") == {"SVG2", "Dense"}


@pytest.mark.parametrize(
    ("page", "count"),
    [
        ('<script src="https://cdn.example/x.js"></script>', 1),
        ('<link rel="stylesheet" href="https://fonts.example/a.css">', 1),
        ('<link rel="stylesheet" href="../assets/site.css">', 0),
        ('<img alt="a" src="http://example.org/a.png">', 1),
        ('<a href="https://example.org">a link is no request</a><script src="a.js"></script>', 0),
        ('<link rel="canonical" href="https://example.org/">', 0),
    ],
)
def test_requests_are_what_a_page_loads_by_itself(page, count):
    assert len(check_site.requests(page)) == count


def test_mathml_replaces_formulas_and_nothing_else():
    import mathml

    page = (
        '<p>a <span class="arithmatex">\\(q_i &lt; 1\\)</span> <span class="b">\\(x\\)</span></p>'
    )
    out = mathml.on_page_content(page)
    assert "<math" in out
    assert "&#x0003C;" in out
    assert "arithmatex" not in out
    assert '<span class="b">\\(x\\)</span>' in out
    shown = mathml.on_page_content('<div class="arithmatex">\\[\n\\sum_j w_j\n\\]</div>')
    assert shown.startswith('<div class="formula"><math')
    assert 'display="block"' in shown


def test_read_help_joins_literals_and_leaves_markup_out():
    pytest.importorskip("griffe")
    from described_fields import read_help

    assert read_help('"A hub id. [dim]Default: " + name + ".[/]"') == "A hub id. Default: …"


def test_a_field_made_by_option_is_documented_by_its_default_and_its_help(tmp_path):
    griffe = pytest.importorskip("griffe")
    from described_fields import DescribedFields

    (tmp_path / "toy.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Request:\n"
        '    """What to make."""\n'
        '    steps: int = option(50, "Denoising steps.", "--steps", kind=int)\n'
        "    seed: int = 0\n"
    )
    extensions = griffe.load_extensions(DescribedFields)
    request = griffe.load("toy", search_paths=[tmp_path], extensions=extensions)["Request"]
    assert str(request["steps"].value) == "50"
    assert [str(p.default) for p in request.parameters if p.name in ("steps", "seed")] == [
        "50",
        "0",
    ]
    (described,) = [s for s in request.docstring.parse("google") if s.kind.value == "attributes"]
    assert [(a.name, a.description) for a in described.value] == [("steps", "Denoising steps.")]


def test_look_sees_what_is_wrong_with_a_page_and_nothing_else(tmp_path):
    look_at_site = pytest.importorskip("look_at_site")
    if look_at_site.find_browser() is None:
        pytest.skip("no Chromium on this machine")
    page = (
        '<!doctype html><meta name="viewport" content="width=device-width">'
        "<link rel=icon href=data:,><body data-md-color-scheme={}><main>{}</main></body>"
    )
    scheme = "x><script>document.body.dataset.mdColorScheme = "
    scheme += "matchMedia('(prefers-color-scheme: dark)').matches ? 'slate' : 'default'</script"
    (tmp_path / "good.html").write_text(page.format(scheme, "<p>All is well.</p>"))
    bad = (
        '<p style="color:#999">Pale</p><p style="width:2000px">wide</p><p>$\\sum_j w$</p>'
        '<img src="missing.png"><script>throw new Error("broken")</script>'
    )
    (tmp_path / "bad.html").write_text(page.format("default", bad))
    assert look_at_site.addresses(tmp_path) == ["bad.html", "good.html"]
    assert look_at_site.look(tmp_path, ["good.html"]) == []
    found = look_at_site.look(tmp_path, ["bad.html"], tmp_path)
    for words in (
        "bad, 390 pixels, light: wider than the screen",
        "bad, 1280 pixels, light: contrast 2.8 of P: Pale",
        "bad, 390 pixels, dark: it is shown default",
        "a formula as it was typed",
        "a picture without a text",
        "a picture that does not load",
        "broken",
    ):
        assert any(words in line for line in found), words
    assert len(list(tmp_path.glob("bad.*.png"))) == 4
