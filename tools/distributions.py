"""The distributions of this repository, read from their pyproject files without importing them."""

from __future__ import annotations

import ast
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """One package of the repository: what pip calls it, where it is, what Python imports."""

    name: str
    folder: Path
    module: str

    @property
    def source(self) -> Path:
        """Return the folder of the import package."""
        return self.folder / "src" / self.module

    @property
    def layered(self) -> bool:
        """Return whether this is one of the layered packages, not what plugs them into engines."""
        return self.folder.parent.name == "packages"

    @property
    def version(self) -> str:
        """Return the literal that the package assigns to `__version__`."""
        return static_version(self.source / "__init__.py")

    @property
    def project(self) -> dict[str, Any]:
        """Return the `[project]` table of the package's pyproject.toml."""
        return read_toml(self.folder / "pyproject.toml")["project"]


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def distributions(root: Path = ROOT) -> dict[str, Distribution]:
    """Return the distributions below `packages/` and `integrations/`, by name.

    A folder may be named otherwise than its distribution: `packages/flash-kmeans` is installed as
    `svg-flash-kmeans`. The import package is the one that the wheel is told to hold; a folder whose
    pyproject.toml builds no wheel is no distribution.
    """
    found = {}
    paths = (sorted(root.glob(f"{kind}/*/pyproject.toml")) for kind in ("packages", "integrations"))
    for path in itertools.chain(*paths):
        tables = read_toml(path)
        if "hatch" not in tables["tool"]:
            continue
        (source,) = tables["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
        name = tables["project"]["name"]
        found[name] = Distribution(name=name, folder=path.parent, module=Path(source).name)
    return found


def static_version(init: Path) -> str:
    """Return the literal assigned to `__version__`, without importing the package.

    Raises:
        ValueError: if the file assigns no literal to it.
    """
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            target = node.targets[0]
            if isinstance(target, ast.Name) and target.id == "__version__":
                return str(node.value.value)
    raise ValueError(f"{init} must assign a literal to __version__")
