"""Refuse a built site that leaves out a public name, or asks anyone else for a file.

    python tools/check_site.py site

A name counts as documented where mkdocstrings lists it as a function or class, not as a module of
the same name. Names that a package takes over from another of ours are that one's to document.
"""

from __future__ import annotations

import ast
import re
import sys
import zlib
from pathlib import Path

from distributions import distributions

# What a page may load from elsewhere: nothing.
_LOADED = re.compile(r'<(?:script|img|iframe|source|video)\b[^>]*?\bsrc="(https?://[^"]+)"')
_STYLED = re.compile(r'<link\b[^>]*?\brel="(?:stylesheet|preconnect|preload)"[^>]*>')


def inventory(site: Path) -> dict[str, str]:
    """Return the role of every documented object by its full name, from the site's inventory."""
    data = (site / "objects.inv").read_bytes()
    text = zlib.decompress(data.split(b"\n", 4)[4]).decode()
    return {line.split()[0]: line.split()[1] for line in text.splitlines() if line}


def listed(init: Path) -> set[str]:
    """Return the names in a package's `__all__`, those of `*part.__all__` included."""
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: set[str] = set()
            for item in getattr(node.value, "elts", ()):
                if isinstance(item, ast.Starred):
                    part = ast.unparse(item.value).removesuffix(".__all__")
                    names |= listed(init.parent / part / "__init__.py")
                else:
                    names.add(ast.literal_eval(item))
            return names
    raise ValueError(f"{init} must assign a list to __all__")


def taken_over(init: Path, module: str) -> set[str]:
    """Return the names that a package takes from another of ours, lazily or not."""
    ours = {package.module for package in distributions().values()} - {module}
    names: set[str] = set()
    for node in ast.walk(ast.parse(init.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ours:
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Dict):
            names |= {
                str(key.value)
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
                and isinstance(value, ast.Constant)
                and str(value.value).split(".")[0] in ours
            }
    return names


def undocumented(module: str, names: set[str], roles: dict[str, str]) -> set[str]:
    """Return those of a package's public names that no page documents."""
    found = {
        name.rpartition(".")[2]
        for name, role in roles.items()
        if name.startswith(module + ".") and role in {"py:function", "py:class", "py:attribute"}
    }
    return names - found


def requests(page: str) -> list[str]:
    """Return the addresses of other hosts that a page loads when it is opened."""
    styles = [tag for tag in _STYLED.findall(page) if re.search(r'href="https?://', tag)]
    return [*_LOADED.findall(page), *styles]


def problems(site: Path) -> list[str]:
    """Return a sentence for each thing that is wrong with a built site."""
    roles = inventory(site)
    found = []
    for package in distributions().values():
        if not package.layered:
            continue  # what a plug-in offers is what its guide says
        init = package.source / "__init__.py"
        names = listed(init) - taken_over(init, package.module)
        missing = undocumented(package.module, names, roles)
        found += [f"{package.module}.{name} is on no API page" for name in sorted(missing)]
    for path in sorted(site.rglob("*.html")):
        found += [
            f"{path.relative_to(site)} loads {address}"
            for address in requests(path.read_text(encoding="utf-8"))
        ]
    return found


def main(arguments: list[str]) -> int:
    """Print what is wrong with the site given, and fail if anything is."""
    if len(arguments) != 1:
        print("usage: check_site.py SITE", file=sys.stderr)
        return 2
    found = problems(Path(arguments[0]))
    print("\n".join(found) or "every public name is on a page, and no page asks another host")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
