"""Many clips of one model: read what to make, make what is missing, show what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svg_models.errors import SettingError, SvgModelsError
from svg_models.files import atomic_folder, atomic_path, regular_file
from svg_models.generation.request import FOR_LOADING, GenerateRequest
from svg_models.generation.settings import MEDIA
from svg_models.plain_json import parse_json
from svg_models.recipe import Recipe, read_document

if TYPE_CHECKING:
    from svg_models.generation.clip import Clip

__all__ = [
    "BatchClip",
    "BatchResult",
    "Makers",
    "plan_batch",
    "read_lines",
    "run_batch",
    "write_sheet",
]

_MOST_BYTES = 1 << 26
_MOST_CLIPS = 100_000
SHEET = "contact-sheet.jpg"

Reader = Callable[[str, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class BatchClip:
    """One clip of a batch.

    Attributes:
        name: of its files, without a suffix.
        request: what to make.
        line: of the file that it stands on.
    """

    name: str
    request: GenerateRequest
    line: int

    def identity(self) -> dict[str, Any]:
        """Return everything that the clip depends on, as plain values."""
        ours = {f.name: getattr(self.request, f.name) for f in fields(GenerateRequest)}
        found: dict[str, Any] = {
            name: value if isinstance(value, bool | int | float | None) else str(value)
            for name, value in ours.items()
            if name not in ("progress", "profile", "gpus")
        }
        recipe = self.request.recipe
        if recipe is not None:  # what the file says, since another may stand there tomorrow
            whole = recipe.to_dict() if isinstance(recipe, Recipe) else read_document(recipe)
            found["recipe"] = whole
        return found


Makers = Callable[[Sequence[BatchClip]], "Iterator[tuple[BatchClip, Clip | SvgModelsError]]"]
"""What makes clips; yields each, or why it could not be made, as soon as that is known."""


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """What became of one clip.

    Attributes:
        clip: of the batch.
        path: its file, or None if it could not be made.
        facts: what `Clip.to_dict` returned when it was made.
        error: why it could not be made.
        made: in this run, not in one before.
    """

    clip: BatchClip
    path: Path | None = None
    facts: Mapping[str, Any] | None = None
    error: str = ""
    made: bool = False


def read_lines(path: str) -> list[tuple[int, dict[str, Any]]]:
    """Read a file of prompts.

    A file that ends with `.jsonl` holds an object a line, with a prompt and other settings; any
    other holds a prompt a line. Empty lines and, among prompts, those that begin with `#` are
    skipped.

    Returns:
        The number of each line and what it gives.

    Raises:
        SettingError: if the file cannot be read, a line is no object, or nothing is in it.
    """
    file = regular_file(path, "as prompts")
    if file.stat().st_size > _MOST_BYTES:
        raise SettingError(f"cannot read {path} as prompts (more than {_MOST_BYTES >> 20} MiB)")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise SettingError(f"cannot read {path} as prompts ({error})") from error
    as_json = file.suffix.lower() == ".jsonl"
    found = []
    # Not `splitlines`: a prompt may hold one of the ten other characters that it takes for an end.
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        if not line.strip() or (not as_json and line.lstrip().startswith("#")):
            continue
        found.append((number, _object(path, number, line) if as_json else {"prompt": line.strip()}))
    if not found:
        raise SettingError(f"{path} holds no prompt; write one a line")
    if len(found) > _MOST_CLIPS:
        raise SettingError(f"{path} holds {len(found):,} prompts, and at most {_MOST_CLIPS:,} go")
    return found


def _object(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{path}, line {number}: no JSON ({error})") from error
    if not isinstance(value, dict):
        raise SettingError(f"{path}, line {number}: expected an object, got {line.strip()[:40]}")
    return value


def plan_batch(
    path: str, lines: Sequence[tuple[int, Mapping[str, Any]]], base: GenerateRequest, read: Reader
) -> tuple[BatchClip, ...]:
    """Check every line before the first clip is made.

    Args:
        path: of the file, for sentences.
        lines: what `read_lines` returns.
        base: what holds for all clips that say nothing else.
        read: turns a line into fields of the request.

    Raises:
        SettingError: names the first line that is wrong, and why; also if lines name another
            model or a file that is none, or some start from an image or video and others do not.
    """
    fixed = {"model", "gpus", *FOR_LOADING}
    clips = []
    for position, (number, line) in enumerate(lines, start=1):
        try:
            values = read(path, line)
            if fixed & set(values):
                name = sorted(fixed & set(values))[0]
                raise SettingError(f"{name} holds for the whole batch; give it as an option")
            request = base.replace(**values)
            for what in MEDIA:
                if values.get(what) is not None:
                    regular_file(values[what], "as a video" if what == "video" else "as an image")
        except SvgModelsError as error:
            raise SettingError(f"{path}, line {number}: {error}") from error
        words = re.sub(r"[^a-z0-9]+", "-", (request.prompt or "").lower()).strip("-")
        # As wide for nine lines as for ten, so that lines can be added and the old clips stay.
        name = f"{position:04d}-{words[:40].strip('-') or 'clip'}"
        clips.append(BatchClip(name=name, request=request, line=number))
    for what in ("image", "video"):
        with_it = [getattr(clip.request, what) is not None for clip in clips]
        if any(with_it) and not all(with_it):
            odd = clips[with_it.index(not with_it[0])].line
            raise SettingError(
                f"{path}, line {odd}: all clips of a batch start from {what}s, or none"
            )
    return tuple(clips)


def run_batch(clips: Sequence[BatchClip], folder: Path, make: Makers) -> Iterator[BatchResult]:
    """Make the clips that are not there yet.

    A clip is there if its files are, and were made from the same request. One that fails is told
    and passed over.

    Args:
        clips: of the batch.
        folder: where `NAME.mp4` and `NAME.json` appear together.
        make: called once with the clips that are missing, if any are; see
            `svg_models.generation.makers`.

    Yields:
        What became of each, those that are there first, the others as they are made.

    Raises:
        SettingError, ModelUnavailableError, MachineError: if the model cannot be loaded.
        OutputError: if a clip cannot be written; the sentence says where it is kept.
    """
    missing = []
    for clip in clips:
        facts = _made_before(clip, folder)
        if facts is None:
            missing.append(clip)
        else:
            yield BatchResult(clip=clip, path=folder / f"{clip.name}.mp4", facts=facts)
    for clip, found in make(missing) if missing else ():
        if isinstance(found, SvgModelsError):
            yield BatchResult(clip=clip, error=str(found))
            continue
        made = found.to_dict()
        with atomic_folder(folder) as staging:
            found.save(staging / f"{clip.name}.mp4")
            document = {"asked": clip.identity(), **made}
            (staging / f"{clip.name}.json").write_text(
                json.dumps(document, indent=1, default=str), encoding="utf-8"
            )
        yield BatchResult(clip=clip, path=folder / f"{clip.name}.mp4", facts=made, made=True)


def write_sheet(results: Sequence[BatchResult], folder: Path) -> Path | None:
    """Write one picture of each clip, the middle one, to `contact-sheet.jpg`.

    Returns:
        Its path; None if there is no clip.
    """
    from PIL import Image

    from svg_models.video import VideoFile, contact_sheet

    pictures, labels = [], []
    for result in results:
        if result.path is not None:
            video = VideoFile.open(result.path)
            pictures += video.pictures([video.frames // 2], lambda picture: picture.copy())
            labels.append(result.clip.name)
    if not pictures:
        return None
    with atomic_path(folder / SHEET) as temporary:
        Image.fromarray(contact_sheet(pictures, labels)).save(temporary, "JPEG", quality=88)
    return folder / SHEET


def _made_before(clip: BatchClip, folder: Path) -> dict[str, Any] | None:
    """Return the facts of a clip that is there, whole, and made from the same request."""
    from svg_models.video import VideoFile

    try:
        document = parse_json((folder / f"{clip.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or not _are_facts(document):
        return None
    if document.pop("asked", None) != json.loads(json.dumps(clip.identity(), default=str)):
        return None
    try:
        VideoFile.open(folder / f"{clip.name}.mp4")
    except SvgModelsError:
        return None
    return document


def _are_facts(document: Mapping[str, Any]) -> bool:
    """Return whether a file says what the table needs; anybody may have written it."""
    attention = document.get("attention")
    if not isinstance(attention, dict):
        return False
    numbers = (document.get("seconds"), attention.get("mean_density", 0.0))
    return all(isinstance(number, int | float) for number in numbers)
