"""Imports run one way: between the packages, and from floor to floor inside each."""

from __future__ import annotations

from pathlib import Path

import import_graph
import pytest
from import_graph import imports, inside

FILES = import_graph.modules()
PACKAGES = {"flash_kmeans", "svg_attention", "svg_kernels", "svg_models"}
MODEL_LIBRARIES = {"diffusers", "transformers", "accelerate", "peft"}

# What a package must not import anywhere; a package never names one that builds on it.
FORBIDDEN = {
    "flash_kmeans": PACKAGES - {"flash_kmeans"} | MODEL_LIBRARIES,
    "svg_kernels": PACKAGES - {"svg_kernels"} | MODEL_LIBRARIES,
    "svg_attention": {"svg_models"} | MODEL_LIBRARIES,
    "svg_models": set(),
}


# The rooms of each package (a subpackage, or a file beside its `__init__`), lowest floor first. A
# room imports only from floors below its own; rooms of one floor do not know each other. Whoever
# adds a room places it here.
FLOORS = {
    "flash_kmeans": (
        ("errors", "checks", "result"),
        ("backend", "common", "_validation"),
        ("reference", "seeding", "triton"),
        ("ops",),
        ("partials", "balance"),
        ("kmeans",),
        ("estimator", "streaming", "distributed"),
        ("__init__", "compat"),
    ),
    "svg_kernels": (
        ("errors", "_build", "_checks", "_debug", "_arithmetic", "_rows", "_triton_rows"),
        ("_cache",),
        ("_library",),
        ("_dispatch",),
        ("norm", "rope", "permute", "gelu", "attention", "probe_sums", "key_value_fp8", "status"),
        ("modulation", "qk_norm_rope", "quantize", "conv_input", "attention_fp8"),
        ("residual_norm",),
        ("norm_fp8",),
        ("__init__",),
    ),
    "svg_attention": (
        ("errors", "config", "tiles", "rows", "memory", "log", "_ops", "_kmeans_files"),
        ("layout", "schedule", "planning"),
        ("plan",),
        ("methods", "backends", "metrics", "corrections"),
        ("attention", "status"),
        ("ring", "heads"),
        ("session",),
        ("__init__",),
    ),
    "svg_models": (
        ("errors", "attention_op", "embedded", "interrupts", "summary", "copies", "stand_in"),
        ("spelling", "numeric", "plain_json", "files", "stats", "families", "launch", "needs"),
        ("caching",),
        ("recipe", "video", "loading", "model_names", "parallel"),
        ("presets",),
        ("method_names",),
        ("recipes", "report", "catalog"),
        ("sparse",),
        ("generation", "doctor"),
        ("comparison",),
        ("tuning",),
        ("cli", "__init__"),
        ("__main__",),
    ),
}


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
            if not (inside(module, backends) or module == "svg_attention.planning.cuda"):
                broken.append(f"{where}; only backends/ and planning/cuda.py may")
            elif not item.lazy:
                broken.append(f"{where} when it is imported; svg_kernels is optional")
        for one, other in apart.items():
            if inside(module, one) and inside(item.name, other):
                broken.append(f"{where}; methods and backends meet only in the plan")
        if module == "svg_attention.plan" and any(inside(item.name, part) for part in apart):
            broken.append(f"{where}; the plan knows neither side")
    return broken


def test_every_package_is_looked_at():
    assert {name.split(".")[0] for name in FILES} == PACKAGES == {*FLOORS}


@pytest.mark.parametrize("module", FILES)
def test_imports_between_packages_point_down(module):
    path = FILES[module]
    is_package = path.name == "__init__.py"
    assert violations(path.read_text(encoding="utf-8"), module, is_package=is_package) == []


@pytest.mark.parametrize("package", FLOORS)
def test_no_circles_inside_a_package(package):
    assert import_graph.circles(import_graph.graph(package, FILES)) == []


def upward(package: str, edges: import_graph.Graph) -> list[str]:
    """Return a sentence for each import that does not lead to a lower floor."""
    floor = {name: number for number, names in enumerate(FLOORS[package]) for name in names}
    found = []
    for module, others in edges.items():
        for other in sorted(others):
            here, there = import_graph.room(module), import_graph.room(other)
            if here != there and floor.get(there, 99) >= floor.get(here, -1):
                found.append(f"{module} imports {other}")
    return found


@pytest.mark.parametrize("package", FLOORS)
def test_imports_inside_a_package_point_to_a_lower_floor(package):
    edges = import_graph.graph(package, FILES)
    rooms, placed = {*import_graph.rooms(edges)}, [n for names in FLOORS[package] for n in names]
    assert rooms - {*placed} == set(), "place these rooms in FLOORS"
    assert {*placed} - rooms == set(), "these rooms are gone from the package"
    assert len(placed) == len({*placed})
    assert upward(package, edges) == []


def test_upward_sees_imports_up_and_sideways():
    edges = {
        "svg_models.video.mp4": {"svg_models.errors", "svg_models.cli.options"},
        "svg_models.loading": {"svg_models.video.mp4"},
        "svg_models.loading.hub": {"svg_models.loading"},
    }
    assert upward("svg_models", edges) == [
        "svg_models.video.mp4 imports svg_models.cli.options",
        "svg_models.loading imports svg_models.video.mp4",
    ]


def written(folder: Path, sources: dict[str, str]) -> import_graph.Graph:
    """Return the graph of a package `toy` made of these files."""
    for name, source in sources.items():
        path = folder / "packages" / "toy" / "src" / "toy" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return import_graph.graph("toy", import_graph.modules(folder))


@pytest.mark.parametrize(
    "back",
    [
        "from toy import one",
        "from toy.one import name",
        "import toy.one",
        "from .one import name",
        "def later():\n    from toy.one import name",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy.one import name",
        "HOMES = {'name': 'toy.one'}",
        "from toy.three import name",
    ],
)
def test_circles_are_seen_however_they_are_closed(tmp_path, back):
    files = {"one": "import toy.two", "two": back, "three": "from toy import one"}
    (circle,) = import_graph.circles(written(tmp_path, files))
    assert {"toy.one", "toy.two"} <= {*circle}


def test_circles_are_seen_through_what_a_package_gathers(tmp_path):
    files = {"part/one": "a = 1", "part/two": "from toy.part import a", "part/__init__": ""}
    assert import_graph.circles(written(tmp_path, files)) == []
    files["part/__init__"] = "from .one import a\nfrom .two import b"
    assert import_graph.circles(written(tmp_path, files)) == [["toy.part", "toy.part.two"]]


def test_circles_are_none_among_neighbours(tmp_path):
    files = {
        "part/__init__": "from .two import b",
        "part/one": "a = 1",
        "part/two": "from toy.part import one\nfrom .one import a",
        "top": "from toy.part import b\nname = 'toy'",
    }
    edges = written(tmp_path, files)
    assert import_graph.circles(edges) == []
    assert import_graph.floors(edges) == [["part"], ["top"]]


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
