"""The names of models, told apart before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from svg_models.errors import SettingError
from svg_models.spelling import did_you_mean

__all__ = ["PIPELINES", "check_model_name", "unknown"]

PIPELINES: dict[str, tuple[str, ...]] = {
    "wan": (
        "WanPipeline",
        "WanImageToVideoPipeline",
        "WanVideoToVideoPipeline",
        "WanVACEPipeline",
    ),
    "skyreels_v2": ("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline"),
    "hunyuan_video": ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    "hunyuan_video15": ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
    "cogvideox": (
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
    ),
    "cosmos": (
        "CosmosTextToWorldPipeline",
        "CosmosVideoToWorldPipeline",
        "Cosmos2VideoToWorldPipeline",
        "Cosmos2_5_PredictBasePipeline",
    ),
    "ltx2": ("LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline"),
    "mochi": ("MochiPipeline",),
    "wan_animate": ("WanAnimatePipeline",),
    "chronoedit": ("ChronoEditPipeline",),
    "allegro": ("AllegroPipeline",),
    "framepack": ("HunyuanVideoFramepackPipeline",),
    "easyanimate": ("EasyAnimatePipeline",),
    "anyflow": ("AnyFlowPipeline",),
    "consisid": (),  # its pipeline reads faces that other packages prepare, and needs OpenCV
    "ltx": ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"),
}
"""Family -> the pipelines of diffusers that run its transformers."""


_EXPORTS = re.compile(r"^__all__ = \[.*?\]", re.DOTALL | re.MULTILINE)


def check_model_name(name: str) -> None:
    """Refuse what no family of this package names: itself, a checkpoint or a transformer.

    Each name is a literal in the file of its family, so what stands in none of these files is
    unknown, and nobody waits for torch and diffusers to be told so.

    Raises:
        SettingError: it lists the families, and names the nearest.
    """
    files = Path(__file__).with_name("families").glob("[!_]*.py")
    if not re.fullmatch(r"[\w./-]+", name) or not any(
        f'"{name}"' in _EXPORTS.sub("", file.read_text(encoding="utf-8")) for file in files
    ):
        raise unknown(name, list(PIPELINES))


def unknown(name: str, families: Sequence[str]) -> SettingError:
    """Return the error for a name that is none of a family or checkpoint."""
    near = did_you_mean(name.strip().lower(), families)
    return SettingError(
        f"no family or checkpoint is called '{name}'{near}; the families are {', '.join(families)}"
    )
