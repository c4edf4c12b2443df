"""One value for everything that a person can ask of `generate` or `compare`.

A field says about itself what people, the command line and the check need to know, so that a new
option is a field here and the place that reads it.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_args

from svg_models.errors import SettingError
from svg_models.generation.settings import HOW, WHERE, Settings, option
from svg_models.loading.device import DTYPES, check_gpus
from svg_models.loading.hub import no_model
from svg_models.loading.placement import OFFLOAD
from svg_models.method_names import (
    METHODS,
    SCHEDULE_SETTINGS,
    WITHOUT_BUDGET,
    MethodSpec,
    read_method,
)
from svg_models.presets import PRESETS
from svg_models.recipe import From, Layers, Precision, Recipe, read_document
from svg_models.spelling import DIFFUSERS_NAMES, check_names, respell

if TYPE_CHECKING:
    from typing_extensions import Self

    from svg_attention import Method
    from svg_models.loading import LoadedPipeline, Progress

__all__ = ["DEFAULT_DENSITY", "DEFAULT_METHODS", "CompareRequest", "GenerateRequest", "Request"]

DEFAULT_METHODS = ("svg2", "svg2-comp", "svg2-error", "svg1")
DEFAULT_DENSITY = 0.25
FOR_LOADING = ("loras", "compiled", "device", "dtype", "offload")
"""Fields that say how a model is loaded, beside its name."""
# Named here so that a misspelt one is refused before torch is imported; a test compares.
BACKEND_NAMES = (
    *("auto", "cuda", "triton", "reference"),
    *("cuda_fp8", "reference_fp8", "flashinfer", "flash_attn"),
)


@dataclass(frozen=True, kw_only=True)
class Request(Settings):
    """What to generate, with which model, where.

    Raises:
        SettingError: if a number is out of its range, or one option makes another void.
    """

    model: str | os.PathLike[str] | LoadedPipeline | None = option(
        None,
        "Folder in diffusers' format or hub id, such as Wan-AI/Wan2.1-T2V-14B-Diffusers. "
        "[dim]Default: the embedded model.[/]",
        "--model",
        "-m",
    )
    loras: Sequence[str] = option(
        (),
        "LoRA, as path or hub id; can be repeated.",
        "--lora",
        metavar="PATH[:WEIGHT]",
        repeats=True,
    )
    backend: str = option(
        "auto",
        "Backend of sparse attention; see svg doctor.",
        "--backend",
        panel=HOW,
        choices=BACKEND_NAMES,
    )
    linears: str | None = option(
        None,
        "Precision of the matrix products in sparse steps except the last two. fp8 is faster and "
        "changes the clip a little. [dim]Default: bf16, or as in the recipe.[/]",
        "--linears",
        panel=HOW,
        suggestions=get_args(Precision),
    )
    attention: str | None = option(
        None,
        "Precision of attention in sparse steps. fp8 (compute capability 9.0) is faster and "
        "changes the clip more. [dim]Default: bf16, or as in the recipe.[/]",
        "--attention",
        panel=HOW,
        suggestions=get_args(Precision),
    )
    fp8_from: str | None = option(
        None,
        "Where --linears and --attention use fp8: sparse (sparse steps except the last two) or "
        "start (every step). [dim]Default: sparse, or as in the recipe.[/]",
        "--fp8-from",
        panel=HOW,
        suggestions=get_args(From),
    )
    q_clusters: int | None = option(
        None,
        "Number of query clusters of an SVG2 method. [dim]Default: the recipe's.[/]",
        "--q-clusters",
        kind=int,
        least=1,
        most=1 << 16,
        panel=HOW,
    )
    k_clusters: int | None = option(
        None,
        "Number of key clusters of an SVG2 method. [dim]Default: the recipe's.[/]",
        "--k-clusters",
        kind=int,
        least=1,
        most=1 << 16,
        panel=HOW,
    )
    dense_steps: float | None = option(
        None,
        "Share of the steps, from the first, that stay dense. [dim]Default: the recipe's.[/]",
        "--dense-steps",
        kind=float,
        least=0,
        most=1,
        panel=HOW,
    )
    dense_layers: float | None = option(
        None,
        "Share of the layers, from the first, that stay dense. [dim]Default: the recipe's.[/]",
        "--dense-layers",
        kind=float,
        least=0,
        most=1,
        panel=HOW,
    )
    compiled: bool = option(
        False,
        "Compile the transformer: a slower first step, faster later ones.",
        "--compile",
        panel=HOW,
    )
    device: str = option(
        "auto",
        "auto, cpu, cuda or cuda:N.",
        "--device",
        panel=WHERE,
        suggestions=("auto", "cpu", "cuda"),
    )
    dtype: str = option(
        "auto",
        "auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16 or float16.",
        "--dtype",
        panel=WHERE,
        suggestions=DTYPES,
    )
    offload: str = option(
        "none",
        "What is kept in host memory until the GPU needs it: none, model (components), group or "
        "sequential (layers).",
        "--offload",
        panel=WHERE,
        suggestions=tuple(OFFLOAD),
    )
    progress: Progress | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        Layers().changed(linears=self.linears, attention=self.attention)  # refuses any other
        if self.fp8_from is not None:
            Layers(fp8_from=self.fp8_from)  # type: ignore[arg-type]
        if isinstance(self.loras, str):
            raise SettingError(f"loras must be a list, such as ['{self.loras}']")
        if self.model is None or isinstance(self.model, str | os.PathLike):
            return
        if not hasattr(self.model, "geometry"):
            raise no_model(self.model)
        for f in fields(Request):
            if f.name in FOR_LOADING:
                value = getattr(self, f.name)
                if value != f.default:
                    raise SettingError(
                        f"{f.name} {value!r} was given beside a pipeline that is loaded already; "
                        "pass it to load_pipeline"
                    )

    @property
    def computed(self) -> dict[str, Any]:
        """Return by what a clip is computed: what `sparsify` takes beside method and schedule."""
        return {"backend": self.backend, **self.layers}

    @property
    def computed_dense(self) -> dict[str, Any]:
        """Return by what the dense clip is computed that others are compared with: not in fp8."""
        return {"backend": self.backend}

    @property
    def layers(self) -> dict[str, Any]:
        """Return what was given of the precision of the layers."""
        names = ("linears", "attention", "fp8_from")
        asked = {name: getattr(self, name) for name in names}
        return {name: value for name, value in asked.items() if value is not None}

    @property
    def adjustments(self) -> dict[str, Any]:
        """Return the settings of a method and schedule that were given beside their name."""
        names = ("q_clusters", "k_clusters", *SCHEDULE_SETTINGS)
        asked = {name: getattr(self, name) for name in names}
        return {name: value for name, value in asked.items() if value is not None}

    def with_model(self, loaded: LoadedPipeline) -> Self:
        """Return what is left to ask for once the model is loaded."""
        usual = {f.name: f.default for f in fields(self) if f.name in (*FOR_LOADING, "gpus")}
        return self.replace(model=loaded, **usual)

    def report(self, stage: str, done: float, total: float) -> None:
        """Call `progress`, if there is one."""
        if self.progress is not None:
            self.progress(stage, done, total)


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(Request):
    """What `generate` takes."""

    method: str | Method | MethodSpec = option(
        "auto",
        "auto (the model's recipe), " + ", ".join(n for n in METHODS if n != "auto") + ".",
        "--method",
        panel=HOW,
        suggestions=tuple(METHODS),
    )
    density: float | None = option(
        None,
        "Share of query-key pairs to compute in sparse calls, 0 to 1.",
        "--density",
        kind=float,
        panel=HOW,
    )
    top_p: float | None = option(
        None,
        "Share of attention weight that SVG2 keeps, 0 to 1, instead of a density.",
        "--top-p",
        kind=float,
        panel=HOW,
    )
    compensate: bool = option(
        False,
        "Let unread clusters contribute through their centroids: auto and svg2 become svg2-comp.",
        "--compensate",
        panel=HOW,
    )
    preset: str | None = option(
        None,
        "quality, balanced or fast: measured settings, instead of a method.",
        "--preset",
        panel=HOW,
        suggestions=tuple(PRESETS),
    )
    recipe: str | os.PathLike[str] | Recipe | None = option(
        None,
        "Recipe file, as written by svg tune, instead of a method.",
        "--recipe",
        metavar="FILE",
        panel=HOW,
    )
    gpus: int = option(
        1,
        "Number of GPUs, one process each: together on one clip, or in parallel on the clips of a "
        "batch. With --device cpu, number of processes.",
        "--gpus",
        kind=int,
        least=1,
        most=64,
        panel=WHERE,
    )
    profile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus > 1 and not isinstance(self.model, str | os.PathLike | None):
            raise SettingError(
                f"gpus {self.gpus} was given beside a pipeline that is loaded already, in one "
                "process; pass the model's folder or id"
            )
        check_gpus(self.gpus, self.device)
        _check_recipe(self.recipe)
        if self.preset is not None or isinstance(self.recipe, Recipe | None):
            _ = self.spec

    @property
    def spec(self) -> MethodSpec:
        """Return the attention method.

        Raises:
            SettingError: if it is unknown, out of range, or given twice; or if the recipe is none.
        """
        method = None if self.method == "auto" else self.method
        spec = read_method(
            method,
            density=self.density,
            top_p=self.top_p,
            recipe=self.recipe,
            preset=self.preset,
        )
        spec = spec.compensated() if self.compensate else spec
        return spec.adjusted(**self.adjustments)


@dataclass(frozen=True, kw_only=True)
class CompareRequest(Request):
    """What `compare` takes."""

    methods: Sequence[str | Method | MethodSpec] = option(
        (),
        "Method to compare with dense; can be repeated. svg2, svg2-comp, svg2-error, svg1 or "
        "random, each optionally with @DENSITY. [dim]Default: "
        + ", ".join(DEFAULT_METHODS)
        + ".[/]",
        "--method",
        repeats=True,
        panel=HOW,
        suggestions=tuple(n for n in METHODS if n not in ("auto", "dense")),
    )
    density: float | None = option(
        None,
        "Density of every method without one, 0 to 1.",
        "--density",
        kind=float,
        panel=HOW,
    )
    presets: Sequence[str] = option(
        (),
        "Preset to compare with dense; can be repeated. quality, balanced or fast.",
        "--preset",
        repeats=True,
        panel=HOW,
        suggestions=tuple(PRESETS),
    )
    recipes: Sequence[str | os.PathLike[str] | Recipe] = option(
        (),
        "Recipe file to compare with dense; can be repeated.",
        "--recipe",
        metavar="FILE",
        repeats=True,
        panel=HOW,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("methods", "presets", "recipes"):
            if isinstance(getattr(self, name), str):
                raise SettingError(f"{name} must be a list, such as ['{getattr(self, name)}']")
        for recipe in self.recipes:
            _check_recipe(recipe)
        _ = _numbered(self._adjusted(self._named_specs) if not self.recipes else self._named_specs)

    @property
    def specs(self) -> tuple[MethodSpec, ...]:
        """Return what is compared: the methods, the presets, then the recipes.

        Raises:
            SettingError: if one is unknown, is dense or auto, or stands there twice; or if a
                density is given that none of them takes.
        """
        recipes = [read_method(None, recipe=recipe) for recipe in self.recipes]
        return _numbered(self._adjusted([*self._named_specs, *recipes]))

    def _adjusted(self, specs: list[MethodSpec]) -> list[MethodSpec]:
        """Return the methods with what was given for all; clusters are for those that have any."""
        given = self.adjustments
        schedule = {name: v for name, v in given.items() if name in SCHEDULE_SETTINGS}
        clusters = {name: v for name, v in given.items() if name not in SCHEDULE_SETTINGS}
        clustered = [spec.has_clusters for spec in specs]
        if clusters and not any(clustered):
            raise SettingError(f"{next(iter(clusters))} is for svg2 methods, and none is compared")
        return [
            spec.adjusted(**schedule, **(clusters if has else {}))
            for spec, has in zip(specs, clustered, strict=True)
        ]

    @property
    def _named_specs(self) -> list[MethodSpec]:
        """Return the methods, with one budget for all that name none, and the presets."""
        budget = DEFAULT_DENSITY if self.density is None else self.density
        specs = []
        others = self.presets or self.recipes
        for method in self.methods or (() if others else DEFAULT_METHODS):
            bare = isinstance(method, str) and "@" not in method and method not in WITHOUT_BUDGET
            specs.append(read_method(method, density=budget if bare else None))
        if any(spec.name == "dense" for spec in specs):
            raise SettingError("dense is always part of a comparison; name the others")
        if any(spec.name == "auto" for spec in specs):
            raise SettingError("a comparison names its methods; auto is for svg generate alone")
        if (
            self.density is not None
            and self.methods
            and not any(isinstance(method, str) and "@" not in method for method in self.methods)
        ):
            raise SettingError(
                f"density {self.density:g} is for methods that name none, and all of them do"
            )
        return [*specs, *(read_method(None, preset=preset) for preset in self.presets)]


def _check_recipe(recipe: Any) -> None:
    """Refuse what is no recipe as far as it can be told without torch.

    Raises:
        SettingError: says why.
    """
    if isinstance(recipe, str | os.PathLike):
        read_document(recipe)
    elif not isinstance(recipe, Recipe | None):
        raise SettingError(f"recipe must be a file or a Recipe, got a {type(recipe).__name__}")


def _numbered(specs: Sequence[MethodSpec]) -> tuple[MethodSpec, ...]:
    """Number methods that differ in more than name and budget names of their own."""
    import dataclasses

    told: list[MethodSpec] = []
    for spec in specs:
        if spec in specs[: len(told)]:
            raise SettingError(f"each method is compared once, got {spec.slug} more than once")
        same = sum(other.slug == spec.slug for other in specs[: len(told)])
        told.append(dataclasses.replace(spec, number=same + 1))
    return tuple(told)


P = ParamSpec("P")
R = TypeVar("R", bound=Request)
T = TypeVar("T")


def takes(
    kind: Callable[P, R],
) -> Callable[[Callable[[R], T]], Callable[P, T]]:
    """Turn a function of a request into one that takes the fields of the request.

    Its signature is that of the request, so that an editor completes it. diffusers' names of a
    setting are understood, and an unknown one is refused with the nearest that is known.

    Args:
        kind: the class of the request.
    """
    signature = inspect.signature(kind)
    known = list(signature.parameters)

    def wrap(function: Callable[[R], T]) -> Callable[P, T]:
        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> T:
            settings = respell(kwargs, DIFFUSERS_NAMES)
            check_names(function.__name__, settings, [*known, *DIFFUSERS_NAMES])
            return function(kind(*args, **settings))  # type: ignore[arg-type]

        returned = inspect.signature(function).return_annotation
        called.__signature__ = signature.replace(return_annotation=returned)  # type: ignore[attr-defined]
        return called

    return wrap
