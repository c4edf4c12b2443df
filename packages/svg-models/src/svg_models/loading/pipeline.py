"""Load a diffusers video pipeline: the embedded model, a folder, or a model of the hub.

All three end in the same place, a folder in diffusers' format that is loaded one component at a
time.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svg_models.errors import ModelUnavailableError, SettingError, foreign_faults
from svg_models.loading.checkpoint import (
    check_family,
    check_transformers,
    class_of,
    networks,
    sizes_of,
)
from svg_models.loading.defaults import Defaults, defaults_for
from svg_models.loading.device import pick_device, pick_dtype
from svg_models.loading.folder import ModelIndex, check_components, check_weights, read_index
from svg_models.loading.geometry import Geometry
from svg_models.loading.hub import fetch_weights, locate
from svg_models.loading.inputs import Inputs, choose_pipeline
from svg_models.loading.lora import Lora, load_loras
from svg_models.loading.memory import check_memory
from svg_models.loading.placement import check_offload, compile_transformers, place
from svg_models.loading.progress import Progress, quiet
from svg_models.numeric import as_whole
from svg_models.spelling import checks_names

__all__ = ["LoadedPipeline", "load_pipeline"]

# VAEs that their publishers, and the examples of diffusers, run in float32 beside a transformer in
# bf16; the others run in its dtype. So does Mochi's, which its publishers run in float32, too: its
# pipeline gives the VAE latents in the dtype of the transformer, which one in float32 refuses.
_PRECISE = frozenset({"AutoencoderKLWan", "AutoencoderKLAllegro"})


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


@checks_names({"num_frames": "frames", "torch_dtype": "dtype"})
def load_pipeline(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    offload: str = "none",
    image: bool = False,
    video: bool = False,
    loras: Sequence[str | Lora] = (),
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    compiled: bool = False,
    progress: Progress = quiet,
) -> LoadedPipeline:
    """Load a video pipeline.

    Args:
        model: `None` or "embedded" for the model in this package, a folder in diffusers' format,
            or a hub id such as `Wan-AI/Wan2.1-T2V-14B-Diffusers`.
        device: "auto" (a CUDA GPU if there is one), "cpu", "cuda", "cuda:1".
        dtype: "auto" (bfloat16 on a GPU, float32 on a CPU), "float32", "bfloat16", "float16", or
            torch's; `torch_dtype` is understood, too.
            The VAE of Wan and that of Allegro stay in float32, as their publishers run them.
        offload: what waits in CPU memory until it is needed: "none", "model" (components),
            "group" or "sequential" (layers), see `svg_models.loading.placement`.
        image: a clip will start from an image, so the pipeline must take one.
        video: a clip will start from a video.
        loras: adapters to load into the transformer, each a file, a folder or a hub id, with
            `:WEIGHT` behind it if it is not 1.
        height: pixels that a clip shall have, if somebody has chosen them; refused before weights
            are read if the model cannot make them.
        width: as `height`.
        frames: of such a clip; `num_frames` is understood, too.
        compiled: compile the blocks of the transformer, at their first call.
        progress: called while components load.

    Returns:
        The pipeline on its device, in evaluation mode, its own progress bar off.

    Raises:
        ModelUnavailableError: if the model cannot be found, reached or read.
        MachineError: if this machine is too small, or has no GPU where one is needed.
        SettingError: if `device`, `dtype`, `offload` or an argument is unknown, or the model cannot
            start from what is given or knows no such size.
    """
    started = time.perf_counter()
    if isinstance(loras, str):
        raise SettingError(f"loras must be a list, such as ['{loras}']")
    adapters = tuple(lora if isinstance(lora, Lora) else Lora.parse(lora) for lora in loras)
    given = {"height": height, "width": width, "frames": frames}
    chosen = {name: as_whole(name, size) for name, size in given.items() if size is not None}
    target = pick_device(device)
    kind = pick_dtype(str(dtype).removeprefix("torch."), target)
    check_offload(offload, target, compiled=compiled)
    name, folder, on_hub = locate(model, progress=progress)
    index = read_index(folder)
    check_components(folder, index)
    check_family(name, index)
    pipeline = choose_pipeline(name, index, image=image, video=video)
    built = networks(folder, index)
    check_transformers(name, built)
    sizes = sizes_of(built)
    check_memory(
        name,
        sizes,
        target,
        kind,
        precise=_in_float32(index),
        explicit_cpu=device == "cpu",
        offload=offload,
    )
    if chosen:
        Geometry.of(_outline(pipeline, built)).check_given(**chosen)
    if on_hub:  # only now, so that nobody downloads 60 GB to be told that they do not fit
        progress("downloading", 0, 0)
        folder = fetch_weights(name)
        index = read_index(folder)
        check_components(folder, index)
    check_weights(folder, index)
    pipe = _assemble(pipeline, folder, index, sizes, kind, progress)
    pipe.set_progress_bar_config(disable=True)
    load_loras(pipe, adapters)
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
        loras=adapters,
        seconds=time.perf_counter() - started,
    )


def _in_float32(index: ModelIndex) -> frozenset[str]:
    """Return which components are in float32 whatever the others are in."""
    return frozenset(name for name, (_, kind) in index.components.items() if kind in _PRECISE)


def _outline(pipeline: type[Any], built: Mapping[str, Any]) -> Any:
    """Return the pipeline with networks that have no weights, and with nothing else."""
    parameters = inspect.signature(pipeline.__init__).parameters
    wanted = [n for n, p in parameters.items() if n != "self" and p.default is p.empty]
    parts = dict.fromkeys(wanted) | {n: x for n, x in built.items() if n in parameters}
    if "safety_checker" in parameters:  # else the pipeline would load one
        parts["safety_checker"] = _Absent()
    sentence = f"the configurations do not fit diffusers.{pipeline.__name__}"
    with foreign_faults(sentence, ModelUnavailableError):
        pipe = pipeline(**parts)
        _correct_scale(pipe)
    return pipe


class _Absent:
    """Stand for a component that is not loaded."""


def _assemble(
    pipeline: type[Any],
    folder: Path,
    index: ModelIndex,
    sizes: dict[str, int],
    dtype: torch.dtype,
    progress: Progress,
) -> Any:
    total, done, precise = sum(sizes.values()), 0, _in_float32(index)
    progress("loading", 0, total)
    # What has no weights is read first: a broken tokenizer is told before gigabytes are read.
    small = [name for name in index.components if name not in sizes]
    loaded = {name: _component(folder, index, name) for name in _accepted(pipeline, small)}
    for name in sorted(sizes, key=lambda n: sizes[n]):
        loaded[name] = _network(folder, index, name, torch.float32 if name in precise else dtype)
        done += sizes[name]
        progress("loading", done, total)
    with foreign_faults(f"cannot load {folder}", ModelUnavailableError):
        pipe = pipeline.from_pretrained(folder, use_safetensors=True, **loaded)
        _correct_scale(pipe)
    return pipe


def _accepted(pipeline: type[Any], names: Sequence[str]) -> list[str]:
    known = inspect.signature(pipeline.__init__).parameters
    return [name for name in names if name in known]


def _component(folder: Path, index: ModelIndex, name: str) -> Any:
    """Load a tokenizer, scheduler or processor."""
    kind = class_of(index, name)
    sentence = f"cannot load {folder / name} as {kind.__name__}"
    with foreign_faults(sentence, ModelUnavailableError):
        return kind.from_pretrained(folder / name)


def _network(folder: Path, index: ModelIndex, name: str, dtype: torch.dtype) -> Any:
    """Load a network from safetensors; every weight must be there."""
    kind = class_of(index, name)
    argument = "dtype" if index.components[name][0] == "transformers" else "torch_dtype"
    with foreign_faults(f"cannot load {folder / name} as {kind.__name__}", ModelUnavailableError):
        network, found = kind.from_pretrained(
            folder / name, use_safetensors=True, output_loading_info=True, **{argument: dtype}
        )
        missing = sorted(found["missing_keys"])
    if missing:
        raise ModelUnavailableError(
            f"{folder / name} lacks {len(missing)} of the weights of {kind.__name__}, "
            f"{missing[0]} for one; copy or download it again"
        )
    return network


def _correct_scale(pipe: Any) -> None:
    # Some of diffusers' pipelines for Wan count the stages of the VAE, and so miss that it may
    # also join neighbouring pixels.
    space = getattr(pipe.vae.config, "scale_factor_spatial", None)
    if space and getattr(pipe, "vae_scale_factor_spatial", space) != space:
        pipe.vae_scale_factor_spatial = space
        pipe.video_processor.register_to_config(vae_scale_factor=space)
