"""Sample one clip with a loaded pipeline, dense or sparse."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from svg_models.errors import SettingError
from svg_models.generation.clip import Clip
from svg_models.generation.conditioning import NOTHING, Media, read_media
from svg_models.generation.decoding import Decoding
from svg_models.generation.memory import PeakMemory
from svg_models.generation.request import GenerateRequest, Request
from svg_models.generation.settings import Settings
from svg_models.generation.shift import check_flow_shift, shifted
from svg_models.generation.timer import StepTimer
from svg_models.loading import (
    LoadedPipeline,
    Progress,
    load_pipeline,
    pick_device,
    pick_dtype,
    quiet,
)
from svg_models.method_names import MethodSpec
from svg_models.sparse.checks import check_backend
from svg_models.sparse.layers import check_layers
from svg_models.sparse.run import sparsify
from svg_models.video import to_frames

__all__ = ["clip_of", "prepare", "sample"]


def prepare(request: Request, *specs: MethodSpec) -> tuple[LoadedPipeline, Settings, Media]:
    """Check everything that can be checked, load the model, and settle every setting.

    Raises what `svg_models.generate` raises.

    Args:
        request: what was asked for.
        *specs: the methods that will run.

    Returns:
        The model, complete settings, and what the clip starts from.
    """
    model, loaded = request.model, None
    if isinstance(model, LoadedPipeline):
        model, loaded = None, model
    device = loaded.device if loaded else pick_device(request.device)
    dtype = loaded.dtype if loaded else pick_dtype(request.dtype, device)
    check_backend(request.backend, device, dtype)
    for spec in specs:
        layers = spec.layers.changed(**request.layers)
        check_layers(layers, device, dtype, backend=request.backend)
    media = read_media(request.image, request.video, request.last_image)
    starts = {"image": request.image is not None, "video": request.video is not None}
    given = request.given()
    if loaded:
        loaded.inputs.check(loaded.name, **starts)
    else:
        # A video that is given decides how many frames of it are taken.
        frames = None if starts["video"] else given.get("frames")
        loaded = load_pipeline(
            model,
            device=request.device,
            dtype=request.dtype,
            offload=request.offload,
            compiled=request.compiled,
            loras=request.loras,
            height=given.get("height"),
            width=given.get("width"),
            frames=frames,
            progress=request.report,
            **starts,
        )
    if "flow_shift" in given:
        check_flow_shift(loaded)
    for name in ("negative_prompt", "max_sequence_length", "last_image"):
        if name in given and not loaded.accepts(name):
            raise SettingError(
                f"{loaded.name} takes no {name}, so it would change nothing; leave it out"
            )
    return loaded, request.complete(loaded.defaults, **media.shape(loaded, given)), media


def clip_of(
    request: GenerateRequest, loaded: LoadedPipeline, settings: Settings, media: Media
) -> Clip:
    """Return the clip that a request asks for, given what `prepare` returned of it."""
    return sample(
        loaded,
        settings,
        request.spec,
        media=media,
        computed=request.computed,
        profile=request.profile,
        progress=request.report,
    )


def sample(
    loaded: LoadedPipeline,
    settings: Settings,
    spec: MethodSpec,
    *,
    media: Media = NOTHING,
    computed: Mapping[str, Any] = MappingProxyType({}),
    profile: bool = False,
    beside_dense: bool = False,
    progress: Progress = quiet,
) -> Clip:
    """Run a loaded pipeline once; see `prepare` and `Request.computed`.

    With `profile` the device is waited for after each step, so that the time of each is exact. With
    `beside_dense` some sparse steps are timed beside the same steps dense, and the recall of others
    is measured; no step's time includes that.
    """
    loaded.geometry.check(height=settings.height, width=settings.width, frames=settings.frames)
    with shifted(loaded, settings.flow_shift):
        return _sample(loaded, settings, spec, media, computed, profile, beside_dense, progress)


def _sample(
    loaded: LoadedPipeline,
    settings: Settings,
    spec: MethodSpec,
    media: Media,
    computed: Mapping[str, Any],
    profile: bool,
    beside_dense: bool,
    progress: Progress,
) -> Clip:
    timer = StepTimer(loaded, settings.steps_to_run, progress, exact=profile)
    with (
        sparsify(loaded.pipe, spec, seed=settings.seed, **computed) as run,
        timer,
        Decoding(
            loaded.pipe,
            width=settings.width,
            height=settings.height,
            release=run.release,
            progress=progress,
        ) as decoding,
        run.beside_dense(now=timer.now, leave_out=timer.leave_out)
        if beside_dense
        else nullcontext() as pairs,
        PeakMemory(loaded.device) as memory,
    ):
        began = timer.now()
        output = loaded.pipe(**_call(loaded, settings), **media.arguments(loaded, settings))
        finished = timer.now()
        stats = run.stats()
        paired = () if pairs is None else pairs.steps()
        recall = None if pairs is None else pairs.recall()
    if spec.name == "auto" and run.recipe is not None:
        spec = replace(MethodSpec.of(run.recipe.method), method=None)
    return Clip(
        frames=to_frames(output.frames[0]),
        settings=settings,
        method=spec,
        model=loaded.name,
        loras=tuple(str(lora) for lora in loaded.loras),
        seconds=timer.seconds,
        step_seconds=timer.step_seconds,
        decode_seconds=finished - timer.last,
        tiles=decoding.tiles,
        stats=stats,
        total_seconds=finished - began,
        peak_memory=memory.bytes,
        paired_steps=paired,
        recall=recall,
    )


def _call(loaded: LoadedPipeline, settings: Settings) -> dict[str, Any]:
    guider = getattr(loaded.pipe, "guider", None)
    if guider is not None:  # guidance is a component of such a pipeline, no argument of its call
        loaded.pipe.guider = guider.new(guidance_scale=settings.guidance)
    optional: dict[str, Any] = {
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.frames,
        "guidance_scale": settings.guidance,
        "negative_prompt": settings.negative_prompt,
        "max_sequence_length": settings.max_sequence_length,
        "strength": settings.strength,
        "fps": round(settings.fps),
        "frame_rate": round(settings.fps),
    }
    return {
        "prompt": settings.prompt,
        "num_inference_steps": settings.steps,
        "generator": torch.Generator("cpu").manual_seed(settings.seed),
        "output_type": "np",
    } | {
        name: value
        for name, value in optional.items()
        if value is not None and loaded.accepts(name)
    }
