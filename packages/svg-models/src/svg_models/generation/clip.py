"""A generated clip and how it came about."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svg_models.errors import OutputError, SvgModelsError, shortened
from svg_models.files import check_suffix
from svg_models.generation.settings import Settings
from svg_models.method_names import MethodSpec
from svg_models.sparse.pairs import PairedStep
from svg_models.stats import RunStats
from svg_models.summary import Summarised
from svg_models.video import encode, enlarge, keep_elsewhere, write_video

__all__ = ["Clip"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Clip(Summarised):
    """A generated clip and how it came about.

    Attributes:
        frames: uint8 `[F, H, W, 3]`.
        settings: what was asked for.
        method: what attention was asked for; what `auto` came to.
        model: name of the model.
        loras: adapters that it had, each with its weight.
        seconds: time of the denoising loop.
        step_seconds: time of each step; exact only if profiled, else a device may lag behind.
        decode_seconds: time of the VAE afterwards.
        stats: densities and times of every attention call, and the recipe.
        total_seconds: time of the whole call of the pipeline: prompt, loop and VAE.
        peak_memory: most bytes that were taken meanwhile, on the GPU or else of this process; None
            where nobody counts.
        paired_steps: sparse steps timed beside the same steps dense, where that was asked for.
        recall: share of the attention weight that sparse calls kept, sampled; None if not measured.
        gpus: how many made it together, a process on each.
        tiles: how large those were in which the VAE had to decode, since memory ran out without;
            empty if there were none.
    """

    frames: np.ndarray
    settings: Settings
    method: MethodSpec
    model: str
    loras: tuple[str, ...]
    seconds: float
    step_seconds: tuple[float, ...]
    decode_seconds: float
    stats: RunStats
    total_seconds: float = 0.0
    peak_memory: int | None = None
    paired_steps: tuple[PairedStep, ...] = ()
    recall: float | None = None
    gpus: int = 1
    tiles: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures as plain values for JSON."""
        return {
            "model": self.model,
            "loras": list(self.loras),
            "settings": asdict(self.settings),
            "method": self.method.label,
            "config": self.stats.recipe,
            "seconds": round(self.seconds, 4),
            "decode_seconds": round(self.decode_seconds, 4),
            "tiles": self.tiles,
            "total_seconds": round(self.total_seconds, 4),
            "peak_memory": self.peak_memory,
            "gpus": self.gpus,
            "step_seconds": [round(value, 5) for value in self.step_seconds],
            "attention": {k: v for k, v in self.stats.numbers().items() if not isinstance(v, dict)},
            "messages": list(self.stats.messages),
        }

    def _summary(self) -> tuple[str, list[tuple[str, str]]]:
        settings = self.settings
        size = f"{len(self.frames)} frames of {settings.width} x {settings.height}"
        rows = [
            ("prompt", shortened(str(settings.prompt), 100)),
            ("model", f"{self.model}, {settings.steps_to_run} steps, seed {settings.seed}"),
            ("seconds", f"{self.seconds:.1f} of denoising, {self.decode_seconds:.1f} of decoding"),
        ]
        if self.stats.sparse_calls:
            density = f"{self.stats.mean_density:.1%} of the query-key pairs in sparse calls"
            rows.insert(2, ("density", density))
        return f"Clip: {size} with {self.method.title}", rows

    def _repr_html_(self) -> str:
        """Return the clip, playing, above what `repr` says."""
        file = io.BytesIO()
        shown = enlarge(self.frames, max(1, 256 // self.frames.shape[2]))
        try:
            encode(shown, file, fps=self.settings.fps)
        except SvgModelsError:  # no encoder
            return super()._repr_html_()
        data = base64.b64encode(file.getvalue()).decode("ascii")
        video = f'<video src="data:video/mp4;base64,{data}" autoplay loop muted controls></video>'
        return video + super()._repr_html_()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the clip as an mp4; see `svg_models.video.write_video`.

        Raises:
            SettingError: if the name is no mp4.
            OutputError: if it cannot be written there; the sentence says where it is kept.
        """
        check_suffix(path)
        fps = self.settings.fps
        try:
            return write_video(self.frames, path, fps=fps)
        except SvgModelsError as error:
            kept = keep_elsewhere(self.frames, self.method.slug, fps=fps)
            raise OutputError(f"{error}; {kept}") from error
