"""Load a diffusers video pipeline: the embedded model, a folder, or a model of the hub.

All three end in the same place, a folder in diffusers' format that is loaded one component at a
time.
"""

from __future__ import annotations

import importlib
import inspect
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svg_models.errors import ModelUnavailableError, first_line
from svg_models.loading.checkpoint import (
    check_family,
    check_transformers,
    components,
    networks,
)
from svg_models.loading.defaults import Defaults, defaults_for
from svg_models.loading.device import pick_device, pick_dtype
from svg_models.loading.geometry import Geometry
from svg_models.loading.hub import fetch_weights, locate
from svg_models.loading.inputs import Inputs, choose_pipeline
from svg_models.loading.lora import Lora, load_loras
from svg_models.loading.memory import check_memory
from svg_models.loading.placement import check_offload, compile_transformers, place
from svg_models.loading.progress import Progress, quiet

__all__ = ["LoadedPipeline", "load_pipeline"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedPipeline:
    """A pipeline that is ready to run, and what is known about it.

    Args:
        pipe: the diffusers pipeline.
        name: what the person called it.
        inputs: what it can start from.
        defaults: what it generates when nothing else is said.
        geometry: sizes it accepts.
        device: where it runs.
        dtype: of the transformer.
        loras: adapters in the transformer.
        seconds: time that loading took.
    """

    pipe: Any
    name: str
    inputs: Inputs
    defaults: Defaults
    geometry: Geometry
    device: str
    dtype: torch.dtype
    loras: tuple[Lora, ...]
    seconds: float

    def accepts(self, argument: str) -> bool:
        """Return whether the pipeline's call takes this argument."""
        return argument in inspect.signature(self.pipe.__call__).parameters

    def default(self, argument: str) -> Any:
        """Return what the pipeline's call takes if this argument is left out."""
        return inspect.signature(self.pipe.__call__).parameters[argument].default

    def size_of_image(self, *, height: int, width: int) -> dict[str, int]:
        """Return the size of the clip that a pipeline makes of an image, if only it can choose."""
        pipe = self.pipe
        rows, columns = pipe.video_processor.calculate_default_height_width(
            height=height, width=width, target_size=pipe.target_size
        )
        return {"height": rows, "width": columns}


def load_pipeline(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "none",
    image: bool = False,
    video: bool = False,
    loras: Sequence[Lora] = (),
    size: Mapping[str, int | None] | None = None,
    compiled: bool = False,
    progress: Progress = quiet,
) -> LoadedPipeline:
    """Load a video pipeline.

    Args:
        model: `None` or "embedded" for the model in this package, a folder in diffusers' format,
            or a hub id such as `Wan-AI/Wan2.1-T2V-14B-Diffusers`.
        device: "auto" (a CUDA GPU if there is one), "cpu", "cuda", "cuda:1".
        dtype: "auto" (bfloat16 on a GPU, float32 on a CPU), "float32", "bfloat16", "float16".
            The VAE stays in float32.
        offload: what waits in CPU memory until it is needed: "none", "model" (components),
            "group" or "sequential" (layers), see `svg_models.loading.placement`.
        image: a clip will start from an image, so the pipeline must take one.
        video: a clip will start from a video.
        loras: adapters to load into the transformer.
        size: "height", "width" and "frames" that a clip shall have, if somebody has chosen them.
        compiled: compile the blocks of the transformer, at their first call.
        progress: called while components load.

    Returns:
        The pipeline on its device, in evaluation mode, its own progress bar off.

    Raises:
        ModelUnavailableError: if the model cannot be found, reached or read.
        MachineError: if this machine is too small, or has no GPU where one is needed.
        SettingError: if `device`, `dtype` or `offload` is unknown, or the model cannot start from
            what is given or knows no such size.
    """
    started = time.perf_counter()
    target = pick_device(device)
    kind = pick_dtype(dtype, target)
    check_offload(offload, target, compiled=compiled)
    name, folder, on_hub = locate(model, progress=progress)
    check_family(name, folder)
    pipeline = choose_pipeline(name, folder, image=image, video=video)
    built = networks(folder)
    check_transformers(name, built)
    sizes = {part: sum(p.numel() for p in network.parameters()) for part, network in built.items()}
    check_memory(name, sizes, target, kind, explicit_cpu=device == "cpu", offload=offload)
    chosen = {name: number for name, number in (size or {}).items() if number is not None}
    if chosen:
        Geometry.of(_outline(pipeline, built)).check_given(**chosen)
    if on_hub:  # only now, so that nobody downloads 60 GB to be told that they do not fit
        progress("downloading", 0, 0)
        folder = fetch_weights(name)
    pipe = _assemble(pipeline, folder, sizes, kind, progress)
    pipe.set_progress_bar_config(disable=True)
    load_loras(pipe, loras)
    place(pipe, target, offload)
    if compiled:
        compile_transformers(pipe)
    return LoadedPipeline(
        pipe=pipe,
        name=name,
        inputs=Inputs.of(pipeline),
        defaults=defaults_for(name, pipe),
        geometry=Geometry.of(pipe),
        device=target,
        dtype=kind,
        loras=tuple(loras),
        seconds=time.perf_counter() - started,
    )


def _outline(pipeline: type[Any], built: Mapping[str, Any]) -> Any:
    """Return the pipeline with networks that have no weights, and with nothing else."""
    parameters = inspect.signature(pipeline.__init__).parameters
    wanted = [n for n, p in parameters.items() if n != "self" and p.default is p.empty]
    parts = dict.fromkeys(wanted) | {n: x for n, x in built.items() if n in parameters}
    if "safety_checker" in parameters:  # else the pipeline would load one
        parts["safety_checker"] = _Absent()
    pipe = pipeline(**parts)
    _correct_scale(pipe)
    return pipe


class _Absent:
    """Stand for a component that is not loaded."""


def _assemble(
    pipeline: type[Any],
    folder: Path,
    sizes: dict[str, int],
    dtype: torch.dtype,
    progress: Progress,
) -> Any:
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
        pipe = pipeline.from_pretrained(folder, **loaded)
    except (OSError, ValueError, ImportError) as error:
        raise ModelUnavailableError(f"cannot load {folder}: {first_line(error)}") from error
    _correct_scale(pipe)
    return pipe


def _correct_scale(pipe: Any) -> None:
    # Some of diffusers' pipelines for Wan count the stages of the VAE, and so miss that it may
    # also join neighbouring pixels.
    space = getattr(pipe.vae.config, "scale_factor_spatial", None)
    if space and getattr(pipe, "vae_scale_factor_spatial", space) != space:
        pipe.vae_scale_factor_spatial = space
        pipe.video_processor.register_to_config(vae_scale_factor=space)
