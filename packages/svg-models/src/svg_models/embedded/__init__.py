"""A small Wan text-to-video model that lives in the package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["embedded_path"]


def embedded_path() -> Path:
    """Return the folder of the packaged pipeline, for `WanPipeline.from_pretrained`.

    Raises:
        FileNotFoundError: if the package was installed without its weights.
    """
    folder = Path(__file__).parent / "model"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no pipeline in {folder}; install svg-models from its wheel or a full checkout"
        )
    return folder
