"""Name attention methods on a command line: `auto`, `svg2`, `svg2-error@0.25`, `svg1`, `dense`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from svg_attention import SVG1, SVG2, Dense, RandomBlocks
from svg_models.errors import SettingError

METHODS: dict[str, str] = {
    "auto": "The model's recipe",
    "dense": "Dense attention",
    "svg1": "SVG1",
    "svg2": "SVG2",
    "svg2-comp": "SVG2 + compensation",
    "svg2-error": "SVG2 + compensation + error routing",
    "random": "Random blocks",
}


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """One attention method as a person names it.

    Args:
        name: a key of `METHODS`.
        density: share of query-key pairs to compute on sparse calls, in (0, 1]; `None` leaves
            it to the method (`top_p` for SVG2, its own default for the others).
        top_p: attention mass that SVG2 keeps per query tile, in (0, 1]; not with a density.

    Raises:
        SettingError: if the name is unknown, a number is out of range, or both are given.
    """

    name: str
    density: float | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise SettingError(
                f"method must be one of {', '.join(METHODS)} (with @DENSITY if you like, as in "
                f"svg2@0.25), got '{self.name}'"
            )
        for label, value in (("density", self.density), ("top-p", self.top_p)):
            if value is not None and not 0.0 < value <= 1.0:
                raise SettingError(f"{label} must be above 0 and at most 1, got {value:g}")
        if self.top_p is not None and not self.name.startswith(("svg2", "auto")):
            raise SettingError(f"top-p belongs to the svg2 methods, got method '{self.name}'")
        if self.top_p is not None and self.density is not None:
            raise SettingError("density and top-p both set how much is computed; give one of them")
        if self.name == "dense" and self.density not in (None, 1.0):
            raise SettingError(f"dense computes everything, its density cannot be {self.density:g}")

    @classmethod
    def parse(
        cls, text: str, *, density: float | None = None, top_p: float | None = None
    ) -> MethodSpec:
        """Read `name` or `name@density`.

        Args:
            text: what was typed.
            density: used when the text names none and the method takes one.
            top_p: passed on.

        Raises:
            SettingError: as the class, or if what follows `@` is no number.
        """
        name, at, number = text.strip().lower().partition("@")
        if at:
            try:
                density = float(number)
            except ValueError:
                raise SettingError(
                    f"expected a density after '@', as in svg2@0.25, got '{text}'"
                ) from None
        elif name == "dense":
            density = None
        return cls(name=name, density=density, top_p=top_p)

    def compensated(self) -> MethodSpec:
        """Return this method with compensation.

        Raises:
            SettingError: if it is not of the svg2 family.
        """
        if not self.name.startswith(("svg2", "auto")):
            raise SettingError(f"only the svg2 methods can compensate, got '{self.name}'")
        plain = self.name in ("svg2", "auto")
        return dataclasses.replace(self, name="svg2-comp" if plain else self.name)

    @classmethod
    def of(cls, method: Any) -> MethodSpec:
        """Return the name of a method of `svg_attention`."""
        if isinstance(method, SVG2):
            name = "svg2-error" if method.route == "error" else "svg2-comp"
            budget: dict[str, Any] = {"density": method.density}
            if method.density is None:
                budget = {"top_p": method.top_p}
            return cls(name=name if method.compensate else "svg2", **budget)
        names = {Dense: "dense", SVG1: "svg1", RandomBlocks: "random"}
        return cls(name=names[type(method)], density=getattr(method, "density", None))

    @property
    def label(self) -> str:
        """Name for people."""
        return METHODS[self.name]

    @property
    def slug(self) -> str:
        """Name for files: letters, digits and dashes."""
        extra = "" if self.density is None else f"-{round(self.density * 100):02d}"
        return self.name + (extra if self.name != "dense" else "")

    def build(self, base: SVG2 | Any) -> Any:
        """Return the `svg_attention` method.

        Args:
            base: the recipe's method; its settings are kept where it is of the same family, and
                this name then modifies them.
        """
        if self.name == "dense":
            return Dense()
        if self.name == "svg1":
            band = base if isinstance(base, SVG1) else SVG1()
            return band if self.density is None else SVG1(density=self.density)
        if self.name == "random":
            return RandomBlocks() if self.density is None else RandomBlocks(density=self.density)
        if self.name == "auto" and not isinstance(base, SVG2):
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
        return dataclasses.replace(method, **changes)
