"""A recipe: what a video runs with, where that comes from, and what it was measured on.

A recipe is written to a JSON file and read from one. Reading runs nothing and believes nothing:
every name must be known, every value of its type and in its range.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from svg_models.caching import NO_CACHE, read_cache
from svg_models.errors import SettingError, first_line, printable, shortened
from svg_models.files import atomic_path, regular_file
from svg_models.numeric import as_number, as_whole, written
from svg_models.plain_json import parse_json
from svg_models.spelling import check_names, did_you_mean
from svg_models.summary import Summarised, described

if TYPE_CHECKING:
    from svg_attention import Method, Schedule

__all__ = ["FORMAT", "From", "Layers", "Measured", "Precision", "Recipe", "read_document"]

Precision: TypeAlias = Literal["bf16", "fp8"]
From: TypeAlias = Literal["sparse", "start"]

FORMAT = "svg-recipe/1"
_KIND = FORMAT.partition("/")[0]
_MOST_BYTES = 1 << 20
_MOST_ROUNDS = 10_000  # of k-means: a file must not make a call run for hours
_MOST_TEXT = 2_000


@dataclass(frozen=True, kw_only=True)
class Layers:
    """How a recipe has things computed; see `svg_models.sparsify`, whose names these are.

    Attributes:
        exact_dense: compute dense calls by the kernel of the model's own processor.
        fuse: join what stands between the matrix products of a block.
        linears: precision of the matrix products.
        attention: precision of self-attention.
        fp8_from: which steps have in fp8 what is to be: sparse ones but those at the end, or all.
        cache: steps whose blocks are not computed, see `svg_models.caching`.
    """

    exact_dense: bool = False
    fuse: bool = True
    linears: Precision = "bf16"
    attention: Precision = "bf16"
    fp8_from: From = "sparse"
    cache: str = NO_CACHE

    def __post_init__(self) -> None:
        for name in ("exact_dense", "fuse"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise SettingError(f"{name} must be True or False, got {written(value)}")
        kinds = (("linears", Precision), ("attention", Precision), ("fp8_from", From))
        for name, kind in kinds:
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                raise SettingError(
                    f"{name} must be one of {', '.join(known)}, got {written(value)}"
                    f"{did_you_mean(str(value), known)}"
                )
        read_cache(self.cache)
        if self.exact_dense and self.attention == "fp8" and self.fp8_from == "start":
            raise SettingError(
                "exact_dense=True computes dense calls by the model's own kernel, attention='fp8' "
                "with fp8_from='start' computes them in fp8; leave one of them out"
            )

    @property
    def has_fp8(self) -> bool:
        """Whether anything is computed in fp8."""
        return "fp8" in (self.linears, self.attention)

    def in_fp8(self, *, sparse: bool, step: int | None, num_steps: int | None) -> bool:
        """Return whether a step is one of those that fp8 is for.

        Args:
            sparse: whether its attention is sparse.
            step: its number, if it is known.
            num_steps: of the video, if it is known.
        """
        if self.fp8_from == "start":
            return True
        if step is None or num_steps is None:
            return sparse
        return sparse and step < num_steps - last_steps(num_steps)

    def changed(self, **given: Any) -> Layers:
        """Return a copy in which what was given, that is not None, takes the place of the rest.

        Raises:
            SettingError: if a value is unknown, or says when fp8 begins where nothing is in fp8.
        """
        new = dataclasses.replace(self, **{k: v for k, v in given.items() if v is not None})
        if given.get("fp8_from") is not None and not new.has_fp8:
            raise SettingError(
                "fp8_from says in which step fp8 begins, and nothing is in fp8; give "
                "linears='fp8' or attention='fp8' beside it"
            )
        return new


def last_steps(num_steps: int) -> int:
    """Return how many steps at the end of a video keep their precision, unless fp8 is for all.

    No later step takes their errors away. If only one of 20 steps of the embedded model rounds the
    inputs of its products, the clip keeps a PSNR of 47 dB where that is the last, 51.5 where it is
    the one before, and 57 to 62 elsewhere; of 50 steps 52, 52 and 60 to 65; of 8 steps 44, 50 and
    54 to 57.
    """
    return 2 if num_steps > 10 else 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a recipe came to, and under which conditions; the reference is the dense clip.

    Attributes:
        model: name of the model.
        frames: video frames of a clip.
        height: pixels.
        width: pixels.
        tokens: video tokens.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        prompts: clips that the means are over.
        psnr: mean PSNR in dB; None if every clip was identical.
        psnr_spread: standard deviation over the prompts, dB.
        ssim: mean structural similarity.
        flip: mean perceived difference, 0 to 1.
        flicker: mean added flicker, see `svg_models.video.similarity`.
        noise_floor: PSNR in dB of one dense kernel against another.
        work: query-key pairs computed over all calls, probes included, as a share of dense.
        seconds: of denoising one clip; None if it was not timed.
        dense_seconds: the same, dense, in the same run.
        machine: device and floating type.
        versions: of the packages that computed it.
        evidence: file of the results that it comes from.
        date: day of the measurement, as in 2026-11-28.
    """

    model: str
    frames: int
    height: int
    width: int
    tokens: int
    steps: int
    guidance: float
    prompts: int
    psnr: float | None = None
    psnr_spread: float | None = None
    ssim: float | None = None
    flip: float | None = None
    flicker: float | None = None
    noise_floor: float | None = None
    work: float | None = None
    seconds: float | None = None
    dense_seconds: float | None = None
    machine: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    evidence: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f.name, getattr(self, f.name), str(f.type)))

    @property
    def speedup(self) -> float | None:
        """Return dense seconds over seconds; None if it was not timed."""
        if not self.seconds or self.dense_seconds is None:
            return None
        return self.dense_seconds / self.seconds

    def __str__(self) -> str:
        """Return one line for people."""
        words = ["identical" if self.psnr is None else f"{self.psnr:.1f} dB"]
        if self.psnr_spread is not None:
            words[-1] += f" ± {self.psnr_spread:.1f}"
        if self.work is not None:
            words.append(f"{self.work:.0%} of the attention")
        if self.speedup is not None:
            words.append(f"{self.speedup:.2f}x as fast as dense")
        size = f"{self.frames} x {self.width} x {self.height}, {self.steps} steps"
        prompts = f"{self.prompts} prompt{'s' if self.prompts > 1 else ''}"
        where = f", {self.machine}" if self.machine else ""
        return f"{', '.join(words)} ({self.model}, {size}, {prompts}{where})"


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe(Summarised):
    """What to run, where it comes from, and what was changed.

    Attributes:
        method: the sparse method, or `Dense()` where sparsity cannot pay.
        schedule: which steps and layers stay dense.
        schedules: of transformers that have one of their own, by their name in the pipeline, such
            as `transformer_2`. Steps are counted over the whole video there, too.
        layers: what is done beside attention.
        source: where the settings come from.
        note: why they differ from the published ones; empty if they don't.
        measured: what it came to, once for each set of conditions.

    Raises:
        ValueError: if a schedule needs what the method does not have.
    """

    method: Method
    schedule: Schedule
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    layers: Layers = field(default_factory=Layers)
    source: str = "user"
    note: str = ""
    measured: tuple[Measured, ...] = ()

    def __post_init__(self) -> None:
        for schedule in (self.schedule, *self.schedules.values()):
            schedule.check_suits(self.method)

    def schedule_of(self, transformer: str) -> Schedule:
        """Return the schedule of a transformer of the pipeline."""
        return self.schedules.get(transformer, self.schedule)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold; `from_dict` reads them."""
        settings = self.method.to_dict()
        return {
            "format": FORMAT,
            "method": settings.pop("name"),
            "settings": settings,
            "schedule": self.schedule.to_dict(),
            "schedules": {name: one.to_dict() for name, one in self.schedules.items()},
            **dataclasses.asdict(self.layers),
            "source": self.source,
            "note": self.note,
            "measured": [_given(one) for one in self.measured],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Build a recipe from what `to_dict` returned, or a person wrote.

        Args:
            document: plain values; what is missing is as it is by default, but for the method.
            where: what they come from, for sentences.

        Raises:
            SettingError: if a name is unknown (with the nearest), or a value is of another type or
                out of range.
        """
        from svg_attention import Schedule, method_from_dict
        from svg_models.families import TRANSFORMERS

        document = _checked_document(document, where)
        settings = _mapping(where, "settings", document.get("settings", {}))
        for name in ("first_iterations", "step_iterations"):
            rounds = settings.get(name)
            if isinstance(rounds, int) and rounds > _MOST_ROUNDS:
                raise SettingError(f"{where}: {name} must be at most {_MOST_ROUNDS:,}")
        layers = {f.name: document[f.name] for f in fields(Layers) if f.name in document}
        schedules = _mapping(where, "schedules", document.get("schedules", {}))
        check_names(f"{where}: schedules", schedules, TRANSFORMERS)
        measured = document.get("measured", [])
        if not isinstance(measured, list):
            raise SettingError(f"{where}: measured must be a list, got {written(measured)}")
        try:
            return cls(
                method=method_from_dict({**settings, "name": document["method"]}),
                schedule=Schedule.from_dict(
                    _mapping(where, "schedule", document.get("schedule", {}))
                ),
                schedules={
                    name: Schedule.from_dict(_mapping(where, name, one))
                    for name, one in schedules.items()
                },
                layers=Layers(**layers),
                source=_checked("source", document.get("source", "user"), "str"),
                note=_checked("note", document.get("note", ""), "str"),
                measured=tuple(_measured(one) for one in measured),
            )
        except (TypeError, ValueError) as error:
            raise SettingError(f"{where}: {first_line(error)}") from error

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe file.

        Raises:
            SettingError: if it is no such file, or `from_dict` refuses what it says.
        """
        return cls.from_dict(read_document(path), Path(path).name)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a recipe file, whole or not at all.

        Returns:
            The path written.

        Raises:
            SettingError: if the method is none of `svg_attention`, which a file could not name, or
                no file can be there.
            OutputError: if it cannot be written.
        """
        document = self.to_dict()
        Recipe.from_dict(document, "this recipe")
        with atomic_path(path) as temporary:
            text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")
        return Path(path).expanduser()

    def _summary(self) -> tuple[str, list[tuple[str, str]]]:
        rows = [
            ("method", f"{self.method}"),
            ("schedule", described(self.schedule.to_dict())),
        ]
        rows += [(name, described(one.to_dict())) for name, one in self.schedules.items()]
        if self.layers != Layers():
            rows.append(("layers", described(dataclasses.asdict(self.layers))))
        rows.append(("source", shortened(self.source, 100)))
        if self.note:
            rows.append(("note", self.note))
        rows += [("measured", str(one)) for one in self.measured]
        return f"Recipe: {type(self.method).__name__}", rows


def read_document(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the JSON of a recipe file, without torch: size, syntax, format and names.

    Raises:
        SettingError: if it is no file of a recipe.
    """
    if not isinstance(path, str | os.PathLike):
        raise SettingError(f"a recipe is a Recipe or the path of its file, got {written(path)}")
    file = regular_file(path, "as a recipe")
    if file.stat().st_size > _MOST_BYTES:
        raise SettingError(f"cannot read {path} as a recipe (more than a megabyte)")
    try:
        document = parse_json(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingError(f"cannot read {path} as a recipe ({first_line(error)})") from error
    return _checked_document(document, file.name)


def _checked_document(document: Any, where: str) -> dict[str, Any]:
    where = printable(shortened(where, 80))
    if not isinstance(document, Mapping):
        raise SettingError(f"{where}: a recipe is a JSON object, got {written(document)}")
    given = document.get("format", FORMAT)
    kind, _, number = str(given).partition("/")
    if kind != _KIND:
        raise SettingError(f"{where}: the format must be {FORMAT}, got {written(given)}")
    if given != FORMAT:
        newer = number.isdecimal() and int(number[:9]) > 1
        hint = "; a newer svg-models wrote it, update yours" if newer else ""
        raise SettingError(f"{where}: the format must be {FORMAT}, got {written(given)}{hint}")
    known = [f.name for f in fields(Recipe) if f.name != "layers"]
    known += [f.name for f in fields(Layers)]
    check_names(where, document, ["format", "settings", *known])
    if not isinstance(document.get("method"), str):
        raise SettingError(f"{where}: a recipe names its method, as in SVG2")
    return dict(document)


def _mapping(where: str, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise SettingError(f"{where}: {name} must be an object, got {written(value)}")
    return dict(value)


def _given(measured: Measured) -> dict[str, Any]:
    """Return the fields that say something."""
    return {k: v for k, v in dataclasses.asdict(measured).items() if v not in (None, "", {})}


def _measured(value: Any) -> Measured:
    if not isinstance(value, Mapping):
        raise SettingError(f"each measurement is an object, got {written(value)}")
    names = [f.name for f in fields(Measured)]
    check_names("measured", value, names)
    required = [f.name for f in fields(Measured) if f.default is dataclasses.MISSING]
    missing = [name for name in required if name not in value and name != "versions"]
    if missing:
        raise SettingError(f"a measurement says its {missing[0]}; it is missing")
    return Measured(**value)


def _checked(name: str, value: Any, kind: str) -> Any:
    """Return a value of a measurement if it is of its type."""
    if value is None and kind.endswith("| None"):
        return None
    if kind.startswith("Mapping"):
        if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
            raise SettingError(f"{name} must hold texts, got {written(value)}")
        return dict(value)
    if kind == "str":
        if not isinstance(value, str) or len(value) > _MOST_TEXT:
            raise SettingError(f"{name} must be a text of at most {_MOST_TEXT:,} characters")
        return value
    if kind == "int":
        number = as_whole(name, value)
        if not 0 <= number < 2**63:
            raise SettingError(f"{name} must be 0 or more, got {written(number)}")
        return number
    return as_number(name, value)
