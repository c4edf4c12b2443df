"""Read which module of a package imports which, without importing any.

Lazy imports (inside a function), imports for types alone, and module names in strings (the usual
form of a lazy public name) count as much as any other: a circle is a circle whenever it is walked.

    python tools/import_graph.py          # rooms, floors and circles of each package
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from distributions import ROOT

Graph = dict[str, set[str]]


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name, absolute, and where it stands."""

    name: str
    line: int
    lazy: bool


def imports(source: str, module: str, *, is_package: bool = False) -> list[Import]:
    """Return what a module imports, relative names resolved; `from a import b` counts as `a.b`."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, base]).rstrip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            names = []
        found.extend(Import(name=name, line=node.lineno, lazy=lazy) for name in names)  # type: ignore[attr-defined]
        deferred = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        lazy = lazy or isinstance(node, deferred) or is_type_checking(node)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), False)
    return found


def named_in_strings(source: str, modules: Iterable[str]) -> list[Import]:
    """Return the modules whose full name is a string in a source: they are imported by name.

    The name of the package itself is left out; it is also that of a logger or a library.
    """
    known = {name for name in modules if "." in name}
    return [
        Import(name=node.value, line=node.lineno, lazy=True)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in known
    ]


def is_type_checking(node: ast.AST) -> bool:
    """Return whether a node is an `if TYPE_CHECKING:` block."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return the file of every module of the packages below `root`, by dotted name."""
    found = {}
    for source in sorted(root.glob("packages/*/src")):
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def inside(name: str, package: str) -> bool:
    """Return whether a dotted name is a package or lies in it."""
    return name == package or name.startswith(package + ".")


def targets(name: str, module: str, known: Iterable[str]) -> set[str]:
    """Return the modules of a package that importing a name reads.

    `from a.b import c` reads `a.b.c` if that is a module, and `a.b` unless it holds the importing
    module: what lies in a package may import its neighbours, but not what the package gathers.
    """
    known = {*known}
    base = name.rpartition(".")[0]
    found = {name} & known
    if base in known and not (found and inside(module, base)):
        found.add(base)
    return found - {module}


def graph(package: str, files: Mapping[str, Path]) -> Graph:
    """Return which modules of a package each of its modules imports."""
    own = {name: path for name, path in files.items() if inside(name, package)}
    edges: Graph = {}
    for module, path in own.items():
        source = path.read_text(encoding="utf-8")
        items = imports(source, module, is_package=path.name == "__init__.py")
        items += named_in_strings(source, own)
        edges[module] = set().union(*(targets(item.name, module, own) for item in items))
    return edges


def reachable(edges: Graph, start: str) -> set[str]:
    """Return every module that a module imports, directly or through others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = edges[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def circles(edges: Graph) -> list[list[str]]:
    """Return the largest groups of modules that import each other, directly or through others."""
    reach = {module: reachable(edges, module) for module in edges}
    groups = {
        tuple(
            sorted(m for m in edges if m == module or (m in reach[module] and module in reach[m]))
        )
        for module in edges
    }
    return sorted([*group] for group in groups if len(group) > 1)


def room(module: str) -> str:
    """Return the part of a package that a module belongs to: a subpackage, or the file itself."""
    return [*module.split("."), "__init__"][1]


def rooms(edges: Graph) -> Graph:
    """Return which rooms each room of a package imports."""
    found: Graph = {room(module): set() for module in edges}
    for module, others in edges.items():
        found[room(module)] |= {room(other) for other in others} - {room(module)}
    return found


def floors(edges: Graph) -> list[list[str]]:
    """Return the rooms by floor: each stands one above the highest that it imports.

    Rooms that import each other stand on one floor.
    """
    between = rooms(edges)
    groups = {name: frozenset([name]) for name in between}
    groups |= {name: frozenset(group) for group in circles(between) for name in group}
    level: dict[frozenset[str], int] = {}

    def height(group: frozenset[str]) -> int:
        if group not in level:
            below = {groups[other] for name in group for other in between[name]} - {group}
            level[group] = 1 + max((height(other) for other in below), default=0)
        return level[group]

    for group in groups.values():
        height(group)
    top = max(level.values(), default=0)
    return [sorted(n for n in between if level[groups[n]] == at) for at in range(1, top + 1)]


def main() -> int:
    """Print a table, then every circle; fail if there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="another checkout")
    args = parser.parse_args()
    files = modules(args.root)
    packages = sorted({name.split(".")[0] for name in files})
    found = {package: graph(package, files) for package in packages}
    print("| package | files | rooms | floors | circles |\n| --- | --: | --: | --: | --: |")
    for package, edges in found.items():
        counts = (len(edges), len(rooms(edges)), len(floors(edges)), len(circles(edges)))
        print(f"| {package} | " + " | ".join(map(str, counts)) + " |")
    for edges in found.values():
        for group in circles(edges):
            print("circle: " + ", ".join(group))
    return int(any(circles(edges) for edges in found.values()))


if __name__ == "__main__":
    sys.exit(main())
