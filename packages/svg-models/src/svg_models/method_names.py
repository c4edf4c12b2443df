"""What attention computes, by name: a method, a preset or a recipe file."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svg_models.errors import SettingError
from svg_models.numeric import as_number, written
from svg_models.presets import PRESETS, check_preset
from svg_models.recipe import Layers, Recipe
from svg_models.spelling import did_you_mean

if TYPE_CHECKING:
    from svg_attention import Method, Schedule

__all__ = ["METHODS", "SCHEDULE_SETTINGS", "WITHOUT_BUDGET", "MethodSpec", "read_method"]

METHODS: dict[str, str] = {
    "auto": "The model's recipe",
    "dense": "Dense attention",
    "svg1": "SVG1",
    "svg2": "SVG2",
    "svg2-comp": "SVG2 + compensation",
    "svg2-error": "SVG2 + compensation + error routing",
    "svg2-published": "SVG2 as published",
    "random": "Random blocks",
}
SCHEDULE_SETTINGS = ("dense_steps", "dense_layers")
WITHOUT_BUDGET = {
    "dense": "dense computes everything and has no density",
    "svg2-published": "svg2-published has the density that its published settings give",
}


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """One attention method as a person names it.

    Args:
        name: a key of `METHODS`, a preset, or with `method` or `recipe` any name.
        density: share of query-key pairs to compute on sparse calls, in (0, 1]; `None` leaves
            it to the method (`top_p` for SVG2, its own default for the others).
        top_p: attention mass that SVG2 keeps per query tile, in (0, 1]; not with a density.
        method: a ready method of `svg_attention`, which then runs as it is; the other fields
            describe it.
        recipe: a ready recipe, which likewise runs as it is.
        path: the file that the recipe was read from.
        number: tells apart methods that have the same name and budget.
        q_clusters: query clusters of an svg2 method, in place of the recipe's.
        k_clusters: key clusters of an svg2 method, in place of the recipe's.
        dense_steps: share of the steps that stay dense, in place of the recipe's.
        dense_layers: share of the layers that stay dense, in place of the recipe's.

    Raises:
        SettingError: if the name is unknown, a number is out of range, or both are given.
    """

    name: str
    density: float | None = None
    top_p: float | None = None
    method: Method | None = None
    recipe: Recipe | None = None
    path: str = ""
    number: int = 1
    q_clusters: int | None = None
    k_clusters: int | None = None
    dense_steps: float | None = None
    dense_layers: float | None = None

    def __post_init__(self) -> None:
        if self.ready:
            return
        if self.name not in METHODS and not self.is_preset:
            raise SettingError(
                f"method must be one of {', '.join(METHODS)} (with @DENSITY if you like, as in "
                f"svg2@0.25), got '{self.name}'{did_you_mean(self.name, METHODS)}"
            )
        for label, value in (("density", self.density), ("top-p", self.top_p)):
            if value is None:
                continue
            number = as_number(label, value)
            if not 0.0 < number <= 1.0:
                raise SettingError(f"{label} must be above 0 and at most 1, got {number:g}")
            object.__setattr__(self, label.replace("-", "_"), number)
        if self.density is not None or self.top_p is not None:
            self._check_budget()

    def _check_budget(self) -> None:
        if self.name in WITHOUT_BUDGET:
            budget = self.top_p if self.density is None else self.density
            raise SettingError(
                f"{WITHOUT_BUDGET[self.name]}, got {budget:g}; leave it out, or choose another "
                "method"
            )
        if self.top_p is not None and not self.name.startswith(("svg2", "auto")):
            raise SettingError(f"top-p belongs to the svg2 methods, got method '{self.name}'")
        if self.top_p is not None and self.density is not None:
            raise SettingError("density and top-p both set how much is computed; give one of them")

    @classmethod
    def parse(
        cls, text: str, *, density: float | None = None, top_p: float | None = None
    ) -> MethodSpec:
        """Read `name` or `name@density`.

        Args:
            text: what was typed.
            density: of a text that names none.
            top_p: passed on.

        Raises:
            SettingError: as the class, if what follows `@` is no number, or if a density is given
                in both ways.
        """
        name, at, number = text.strip().lower().partition("@")
        if name in PRESETS:
            raise SettingError(f"'{name}' is a preset, no method; give it as the preset")
        if at:
            if density is not None:
                raise SettingError(
                    f"'{text}' names its density, and density {density:g} was given, too; "
                    "give one of them"
                )
            try:
                density = float(number)
            except ValueError:
                raise SettingError(
                    f"expected a density after '@', as in svg2@0.25, got '{text}'"
                ) from None
        return cls(name=name, density=density, top_p=top_p)

    @classmethod
    def of(cls, method: Method) -> MethodSpec:
        """Return the name and budget of a method of `svg_attention`, which will run as it is."""
        from svg_attention import SVG1, SVG2, Dense, RandomBlocks

        if isinstance(method, SVG2):
            name = "svg2"
            if method.compensate:
                name = "svg2-error" if method.route == "error" else "svg2-comp"
            top_p = method.top_p if method.density is None else None
            return cls(name=name, density=method.density, top_p=top_p, method=method)
        names: dict[type, str] = {Dense: "dense", SVG1: "svg1", RandomBlocks: "random"}
        name = names.get(type(method), type(method).__name__.lower())
        density = None if isinstance(method, Dense) else getattr(method, "density", None)
        return cls(name=name, density=density, method=method)

    @classmethod
    def of_recipe(cls, recipe: Recipe | str | os.PathLike[str]) -> MethodSpec:
        """Return the name of a recipe, or of the file that holds one, which will run as it is.

        Raises:
            SettingError: if it is no recipe.
        """
        if isinstance(recipe, Recipe):
            return cls(name="recipe", recipe=recipe)
        stem = re.sub(r"[^a-z0-9]+", "-", Path(recipe).stem.lower()).strip("-")[:40].strip("-")
        name = "recipe" if stem in ("", "recipe") else f"recipe-{stem}"
        return cls(name=name, recipe=Recipe.read(recipe), path=os.fspath(recipe))

    @property
    def is_preset(self) -> bool:
        """Return whether this is a preset."""
        return not self.ready and self.name in PRESETS

    @property
    def ready(self) -> bool:
        """Return whether this runs as it is, whatever the model."""
        return self.method is not None or self.recipe is not None

    @property
    def layers(self) -> Layers:
        """Return what a ready recipe does beside attention; else what is done by default."""
        return Layers() if self.recipe is None else self.recipe.layers

    @property
    def words(self) -> list[str]:
        """Return the options of a command that name this."""
        if self.path:
            return ["--recipe", self.path]
        return ["--preset", self.name] if self.is_preset else ["--method", str(self)]

    @property
    def has_clusters(self) -> bool:
        """Return whether this is an svg2 method whose clusters are not settled yet."""
        fixed = self.ready or self.is_preset or self.name in WITHOUT_BUDGET
        return not fixed and self.name.startswith(("svg2", "auto"))

    @property
    def changes_clusters(self) -> bool:
        """Return whether clusters were given."""
        return self.q_clusters is not None or self.k_clusters is not None

    def adjusted(self, **given: Any) -> MethodSpec:
        """Return this with other clusters, dense steps or dense layers.

        Raises:
            SettingError: if it has no clusters, or holds its own settings.
        """
        for name, value in given.items():
            if self.recipe is not None:
                raise SettingError(f"a recipe holds its settings; leave {name} out")
            if name in SCHEDULE_SETTINGS and self.name == "dense":
                raise SettingError(f"dense attention is dense throughout; leave {name} out")
            if name not in SCHEDULE_SETTINGS and not self.has_clusters:
                raise SettingError(
                    f"{name} is for the svg2 methods, got {written(value)} beside '{self.name}'"
                )
        return dataclasses.replace(self, **given)

    def schedule(self, base: Schedule) -> Schedule:
        """Return a recipe's schedule with what was given for it."""
        given = {name: getattr(self, name) for name in SCHEDULE_SETTINGS}
        changes = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(base, **changes)

    def compensated(self) -> MethodSpec:
        """Return this method with compensation.

        Raises:
            SettingError: if it is not of the svg2 family, or is a ready method.
        """
        fixed = self.ready or self.name in WITHOUT_BUDGET
        if fixed or not self.name.startswith(("svg2", "auto")):
            raise SettingError(f"only the svg2 methods can compensate, got '{self.name}'")
        plain = self.name in ("svg2", "auto")
        return dataclasses.replace(self, name="svg2-comp" if plain else self.name)

    @property
    def label(self) -> str:
        """Return the name for people."""
        if self.recipe is not None:
            return f"Recipe {Path(self.path).stem[:40]}" if self.path else "Recipe"
        if self.is_preset:
            return f"Preset {self.name}"
        return METHODS.get(self.name, type(self.method).__name__)

    @property
    def title(self) -> str:
        """Return the name for people with the budget, which tells two of one method apart."""
        budget = ""
        if self.density is not None:
            budget = f" @ {100 * self.density:.3g}%"
        elif self.top_p is not None:
            budget = f" @ top-p {self.top_p:g}"
        return self.label + budget + (f" ({self.number})" if self.number > 1 else "")

    @property
    def slug(self) -> str:
        """Return the name for files: letters, digits and dashes."""
        parts = [self.name]
        if self.density is not None:
            parts.append(f"{round(self.density * 100):02d}")
        elif self.top_p is not None:
            parts.append(f"p{round(self.top_p * 100):02d}")
        if self.number > 1:
            parts.append(f"n{self.number}")
        return "-".join(parts)

    def __str__(self) -> str:
        """Return the name as `parse` reads it."""
        return self.name if self.density is None else f"{self.name}@{self.density:g}"

    def build(self, base: Method) -> Method:
        """Return the `svg_attention` method.

        Args:
            base: the recipe's method; its settings are kept where it is of the same family, and
                this name then modifies them.
        """
        from svg_attention import SVG1, SVG2, Dense, RandomBlocks

        if self.method is not None:
            return self.method
        if self.recipe is not None:
            return self.recipe.method
        if self.name == "dense":
            return Dense()
        if self.name == "svg1":
            band = base if isinstance(base, SVG1) else SVG1()
            return band if self.density is None else SVG1(density=self.density)
        if self.name == "random":
            return RandomBlocks() if self.density is None else RandomBlocks(density=self.density)
        if self.name == "svg2-published" or (self.name == "auto" and not isinstance(base, SVG2)):
            return base
        method = base if isinstance(base, SVG2) else SVG2()
        changes: dict[str, Any] = {}
        if self.name != "auto":
            changes = {
                "compensate": self.name != "svg2",
                "route": "error" if self.name == "svg2-error" else "mass",
            }
        if self.density is not None:
            changes["density"] = self.density
        if self.top_p is not None:
            changes |= {"top_p": self.top_p, "density": None}
        for name in ("q_clusters", "k_clusters"):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name)
        return dataclasses.replace(method, **changes)


def read_method(
    method: Method | MethodSpec | str | None,
    *,
    density: float | None = None,
    top_p: float | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    preset: str | None = None,
) -> MethodSpec:
    """Read a method however a person gives it.

    Args:
        method: a name such as `"svg2"` or `"svg2-error@0.25"`, a method such as `SVG2(...)`, or
            None for the model's recipe.
        density: for a name that says none.
        top_p: for a name of an svg2 method.
        recipe: a recipe or its file, in place of all of these.
        preset: name of a preset, likewise.

    Raises:
        SettingError: if the name is unknown or a budget is out of range, given twice, or given
            beside a method that has its own.
        TypeError: if it is neither; a class is told from its instance.
    """
    if recipe is not None or preset is not None:
        what = "recipe" if preset is None else "preset"
        given: dict[str, Any] = {"method": method, "density": density, "top_p": top_p}
        if preset is not None:
            given["recipe"] = recipe
        for label, value in given.items():
            if value is not None:
                raise SettingError(
                    f"a {what} holds its method and how much it computes; leave {label} out"
                )
        if recipe is None:
            return MethodSpec(name=check_preset(str(preset)))
        return MethodSpec.of_recipe(recipe)
    if method is None or isinstance(method, str):
        return MethodSpec.parse("auto" if method is None else method, density=density, top_p=top_p)
    if isinstance(method, type):
        raise TypeError(f"method is the class {method.__name__}; give one: {method.__name__}()")
    if not isinstance(method, MethodSpec):
        if not (hasattr(method, "plan") and hasattr(method, "to_dict")):
            raise TypeError(
                "method must be a name such as 'svg2' or a method such as SVG2(), got "
                f"{type(method).__name__} {method!r}"
            )
        method = MethodSpec.of(method)
    for label, value in (("density", density), ("top_p", top_p)):
        if value is not None:
            raise SettingError(
                f"{label} {value:g} was given beside a method that has its own settings; "
                f"set it in the method, or give a name such as 'svg2'"
            )
    return method
