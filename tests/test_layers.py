"""Imports run one way between the packages, and inside svg_attention."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"flash_kmeans", "svg_attention", "svg_kernels", "svg_models"}
MODEL_LIBRARIES = {"diffusers", "transformers", "accelerate", "peft"}

# What a package must not import anywhere; a package never names one that builds on it.
FORBIDDEN = {
    "flash_kmeans": PACKAGES - {"flash_kmeans"} | MODEL_LIBRARIES,
    "svg_kernels": PACKAGES - {"svg_kernels"} | MODEL_LIBRARIES,
    "svg_attention": {"svg_models"} | MODEL_LIBRARIES,
    "svg_models": set(),
}


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, and where it stands."""

    name: str
    line: int
    lazy: bool


def imports(source: str, module: str, *, is_package: bool = False) -> list[Import]:
    """Return what a module imports, relative names resolved; `from a import b` counts as `a.b`."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, base]).rstrip(".")
            found.extend(Import(f"{base}.{alias.name}", node.lineno, lazy) for alias in node.names)
        deferred = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        lazy = lazy or isinstance(node, deferred) or is_type_checking(node)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), False)
    return found


def is_type_checking(node: ast.AST) -> bool:
    """Say whether a node is an `if TYPE_CHECKING:` block."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def inside(name: str, package: str) -> bool:
    """Say whether a dotted name is a package or lies in it."""
    return name == package or name.startswith(package + ".")


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return a sentence for each import of a module that breaks the layering."""
    top = module.split(".")[0]
    methods, backends = "svg_attention.methods", "svg_attention.backends"
    apart = {methods: backends, backends: methods}
    broken = []
    for item in imports(source, module, is_package=is_package):
        where = f"{module}:{item.line} imports {item.name}"
        if item.name.split(".")[0] in FORBIDDEN[top]:
            broken.append(f"{where}, which builds on {top} or is none of its business")
        if inside(item.name, "svg_kernels") and top == "svg_attention":
            if not inside(module, backends):
                broken.append(f"{where}; only backends/ may")
            elif not item.lazy:
                broken.append(f"{where} when it is imported; svg_kernels is optional")
        for one, other in apart.items():
            if inside(module, one) and inside(item.name, other):
                broken.append(f"{where}; methods and backends meet only in the plan")
        if module == "svg_attention.plan" and any(inside(item.name, part) for part in apart):
            broken.append(f"{where}; the plan knows neither side")
    return broken


def modules() -> list[tuple[str, Path]]:
    found = []
    for source in sorted(ROOT.glob("packages/*/src")):
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            found.append((".".join(parts).removesuffix(".__init__"), path))
    return found


def test_every_package_is_looked_at():
    assert {name.split(".")[0] for name, _ in modules()} == PACKAGES


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value).split("/")[-1])
def test_imports_point_down(module, path):
    is_package = path.name == "__init__.py"
    assert violations(path.read_text(encoding="utf-8"), module, is_package=is_package) == []


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("flash_kmeans.update", "import svg_attention.plan", "builds on"),
        ("flash_kmeans.update", "def f():\n    from svg_kernels import permute_rows", "builds on"),
        ("svg_attention.session", "from svg_models.recipes import Recipe", "builds on"),
        ("svg_attention.session", "import diffusers", "none of its business"),
        ("svg_attention.plan", "from svg_attention.methods.svg2 import SVG2", "neither side"),
        ("svg_attention.plan", "from . import backends", "neither side"),
        ("svg_attention.methods.svg2", "from ..backends import reference", "meet only"),
        ("svg_attention.methods.svg2", "from svg_attention import backends", "meet only"),
        ("svg_attention.backends.triton", "from ..methods.base import tiles", "meet only"),
        ("svg_attention.backends.cuda", "import svg_kernels", "optional"),
        ("svg_attention.session", "def f():\n    import svg_kernels", "only backends"),
    ],
)
def test_the_rules_catch_an_offender(module, source, reason):
    (sentence,) = violations(source, module)
    assert reason in sentence


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("svg_models.sparse.run", "from svg_attention import Session\nimport diffusers"),
        ("svg_attention.methods.svg2", "from ..plan import SparsePlan\nimport flash_kmeans"),
        ("svg_attention.backends.cuda", "def f():\n    import svg_kernels"),
        (
            "svg_attention.backends.cuda",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import svg_kernels",
        ),
    ],
)
def test_the_rules_let_the_right_ones_pass(module, source):
    assert violations(source, module) == []


def test_relative_imports_are_resolved_from_a_package_too():
    (item,) = imports("from .svg2 import SVG2", "svg_attention.methods", is_package=True)
    assert item.name == "svg_attention.methods.svg2.SVG2"
    (item,) = imports("from .base import tiles", "svg_attention.methods.svg2")
    assert item.name == "svg_attention.methods.base.tiles"
    (item,) = imports("from ... import plan", "svg_attention.methods.deep.er")
    assert item.name == "svg_attention.plan"
