"""Load a diffusers video pipeline: the embedded model, a folder, or a model of the hub.

All three end in the same place, a folder in diffusers' format that is loaded one component at a
time.
"""

from __future__ import annotations

import importlib
import inspect
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svg_models.errors import ModelUnavailableError, first_line
from svg_models.loading.checkpoint import check_family, component_parameters, components
from svg_models.loading.defaults import Defaults, defaults_for
from svg_models.loading.device import pick_device, pick_dtype
from svg_models.loading.geometry import Geometry
from svg_models.loading.hub import fetch_weights, locate
from svg_models.loading.memory import check_memory
from svg_models.loading.progress import Progress, quiet

__all__ = ["LoadedPipeline", "load_pipeline"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedPipeline:
    """A pipeline that is ready to run, and what is known about it.

    Args:
        pipe: the diffusers pipeline.
        name: what the person called it.
        defaults: what it generates when nothing else is said.
        geometry: sizes it accepts.
        device: where it runs.
        dtype: of the transformer.
        seconds: time that loading took.
    """

    pipe: Any
    name: str
    defaults: Defaults
    geometry: Geometry
    device: str
    dtype: torch.dtype
    seconds: float

    def accepts(self, argument: str) -> bool:
        """Return whether the pipeline's call takes this argument."""
        return argument in inspect.signature(self.pipe.__call__).parameters


def load_pipeline(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    offload: bool = False,
    progress: Progress = quiet,
) -> LoadedPipeline:
    """Load a video pipeline.

    Args:
        model: `None` or "embedded" for the model in this package, a folder in diffusers' format,
            or a hub id such as `Wan-AI/Wan2.1-T2V-14B-Diffusers`.
        device: "auto" (a CUDA GPU if there is one), "cpu", "cuda", "cuda:1".
        dtype: "auto" (bfloat16 on a GPU, float32 on a CPU), "float32", "bfloat16", "float16".
            The VAE stays in float32.
        offload: keep components in CPU memory until they are needed.
        progress: called while components load.

    Returns:
        The pipeline on its device, in evaluation mode, its own progress bar off.

    Raises:
        ModelUnavailableError: if the model cannot be found, reached or read.
        MachineError: if this machine is too small, or has no GPU where one is needed.
        SettingError: if `device` or `dtype` is unknown.
    """
    started = time.perf_counter()
    target = pick_device(device)
    kind = pick_dtype(dtype, target)
    name, folder, on_hub = locate(model, progress=progress)
    check_family(name, folder)
    sizes = component_parameters(folder)
    check_memory(name, sizes, target, kind, explicit_cpu=device == "cpu", offload=offload)
    if on_hub:  # only now, so that nobody downloads 60 GB to be told that they do not fit
        progress("downloading", 0, 0)
        folder = fetch_weights(name)
    pipe = _assemble(folder, sizes, kind, progress)
    pipe.set_progress_bar_config(disable=True)
    if offload and target != "cpu":
        pipe.enable_model_cpu_offload(device=target)
    else:
        pipe.to(target)
    return LoadedPipeline(
        pipe=pipe,
        name=name,
        defaults=defaults_for(name, pipe),
        geometry=Geometry.of(pipe),
        device=target,
        dtype=kind,
        seconds=time.perf_counter() - started,
    )


def _assemble(folder: Path, sizes: dict[str, int], dtype: torch.dtype, progress: Progress) -> Any:
    from diffusers import DiffusionPipeline

    parts = components(folder)
    total, done = sum(sizes.values()), 0
    loaded = {}
    progress("loading", 0, total)
    try:
        for name in sorted(sizes, key=lambda n: sizes[n]):
            library, class_name = parts[name]
            kind = getattr(importlib.import_module(library), class_name)
            precision = torch.float32 if name == "vae" else dtype
            argument = "torch_dtype" if library == "diffusers" else "dtype"
            loaded[name] = kind.from_pretrained(folder / name, **{argument: precision})
            done += sizes[name]
            progress("loading", done, total)
        return DiffusionPipeline.from_pretrained(folder, **loaded)
    except (OSError, ValueError) as error:
        raise ModelUnavailableError(f"cannot load {folder}: {first_line(error)}") from error
