"""A dense clip and sparse ones beside it: their numbers and files."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svg_models.comparison.candidate import Candidate
from svg_models.comparison.page import comparison_page
from svg_models.errors import OutputError, SvgModelsError, shortened
from svg_models.files import atomic_folder, spare_folders, user_path
from svg_models.generation.clip import Clip
from svg_models.summary import Summarised
from svg_models.video import METRICS, side_by_side, write_video

__all__ = ["Comparison", "clip_label"]

PAGE, DATA, TOGETHER = "index.html", "compare.json", "side-by-side.mp4"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Comparison(Summarised):
    """One prompt and seed, dense and by one or more sparse methods.

    Attributes:
        dense: the reference clip.
        candidates: the sparse clips in the order that was asked for.
        machine: what it ran on.
        no_speed: why no speed can be claimed; empty where speeds are.
        gains_from: at which size this machine would gain, where this clip is too short to.
    """

    dense: Clip
    candidates: tuple[Candidate, ...]
    machine: dict[str, Any]
    no_speed: str = ""
    gains_from: str = ""

    @property
    def clips(self) -> list[Clip]:
        """Return the dense clip, then the others."""
        return [self.dense, *(c.clip for c in self.candidates)]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures as plain values for JSON."""
        dense = _clip_dict(self.dense) | {"speed": None, "similarity": None}
        sparse = [
            _clip_dict(c.clip)
            | {
                "speed": None if c.speed is None else c.speed.to_dict(),
                "similarity": c.similarity.to_dict(),
                "recall": c.clip.recall,
                "paired_steps": [asdict(step) for step in c.clip.paired_steps],
            }
            for c in self.candidates
        ]
        return {
            "format": "svg-compare/2",
            "model": self.dense.model,
            "loras": list(self.dense.loras),
            "tokens": self.dense.stats.tokens,
            "settings": asdict(self.dense.settings),
            "machine": self.machine,
            "no_speed": self.no_speed or None,
            "gains_from": self.gains_from or None,
            "reference": "dense",
            "metrics": METRICS,
            "runs": [dense, *sparse],
        }

    def _summary(self) -> tuple[str, list[tuple[str, str]]]:
        settings = self.dense.settings
        rows = []
        for candidate in self.candidates:
            clip, speed = candidate.clip, candidate.speed
            line = (
                f"{clip.stats.mean_density:.0%} computed, {candidate.similarity.mean_psnr:.1f} dB"
            )
            rows.append(
                (clip.method.title, line + ("" if speed is None else f", {speed.speedup:.2f}x"))
            )
        if self.no_speed:
            rows.append(("no speed", self.no_speed))
        if self.gains_from:
            rows.append(("note", self.gains_from))
        return f"Comparison with dense attention: {shortened(str(settings.prompt), 80)}", rows

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the clips, one clip of all side by side, the numbers and the page.

        Args:
            folder: created if missing; `index.html`, `compare.json`, `side-by-side.mp4` and one
                mp4 per method appear in it together, when all are complete.

        Returns:
            The page.

        Raises:
            SettingError: if the folder cannot be written.
            OutputError: if a file cannot be written; the sentence says where everything is kept.
        """
        try:
            return self._write(Path(folder))
        except SvgModelsError as error:
            raise OutputError(f"{error}; {self._keep_elsewhere()}") from error

    def _keep_elsewhere(self) -> str:
        for folder in spare_folders():
            with contextlib.suppress(SvgModelsError):
                page = self._write(folder / f"svg-compare-{secrets.token_hex(4)}")
                return f"everything is kept in {page.parent}"
        return "and there was no room for it anywhere else"

    def _write(self, folder: Path) -> Path:
        with atomic_folder(folder) as staging:
            for clip in self.clips:
                path = staging / f"{clip.method.slug}.mp4"
                write_video(clip.frames, path, fps=clip.settings.fps)
            everything = side_by_side(
                [c.frames for c in self.clips], [clip_label(c) for c in self.clips]
            )
            write_video(everything, staging / TOGETHER, fps=self.dense.settings.fps)
            data = json.dumps(self.to_dict(), indent=1)
            (staging / DATA).write_text(data, encoding="utf-8")
            (staging / PAGE).write_text(comparison_page(self), encoding="utf-8")
        return user_path(folder) / PAGE


def clip_label(clip: Clip) -> str:
    """Return a label of a clip: its method and the density that was measured."""
    if clip.method.name == "dense":
        return "Dense"
    short = clip.method.label.replace("compensation", "comp.").replace(" routing", "")
    return f"{short}, {clip.stats.mean_density:.0%}"


def _clip_dict(clip: Clip) -> dict[str, Any]:
    return {
        "name": clip.method.slug,
        "label": clip.method.title,
        "file": f"{clip.method.slug}.mp4",
        "config": clip.stats.recipe,
        "seconds": round(clip.seconds, 4),
        "decode_seconds": round(clip.decode_seconds, 4),
        "tiles": clip.tiles,
        "total_seconds": round(clip.total_seconds, 4),
        "peak_memory": clip.peak_memory,
        "attention": {k: v for k, v in clip.stats.numbers().items() if not isinstance(v, dict)},
        "step_seconds": [round(value, 5) for value in clip.step_seconds],
        "messages": list(clip.stats.messages),
        **_tables(clip),
    }


def _tables(clip: Clip) -> dict[str, Any]:
    """Return density and seconds as `[step][layer]`; null where nothing ran or was timed."""
    table = clip.stats.grids
    if table is None:
        return {"density": None, "attention_seconds": None}
    density = [[round(x, 5) if x == x else None for x in row] for row in table.density.tolist()]
    timed = table.seconds
    return {
        "density": density,
        "attention_seconds": None if timed is None else timed.round(6).tolist(),
    }
