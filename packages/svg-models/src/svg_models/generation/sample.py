"""Generate one clip, dense or sparse."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from svg_attention import SVG2, Dense, UnsupportedError
from svg_models.errors import SettingError
from svg_models.generation.clip import Clip
from svg_models.generation.conditioning import NOTHING, Media, read_media
from svg_models.generation.method_names import MethodSpec
from svg_models.generation.settings import Settings, check_numbers
from svg_models.generation.timer import StepTimer
from svg_models.loading import LoadedPipeline, Lora, Progress, load_pipeline, quiet
from svg_models.video import to_frames

__all__ = ["Clip", "check_backend", "generate", "prepare", "sample"]


def generate(
    prompt: str | None = None,
    *,
    model: str | os.PathLike[str] | LoadedPipeline | None = None,
    method: str | MethodSpec = "auto",
    image: str | os.PathLike[str] | None = None,
    video: str | os.PathLike[str] | None = None,
    loras: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "none",
    backend: str = "auto",
    compiled: bool = False,
    profile: bool = False,
    progress: Progress = quiet,
    **settings: Any,
) -> Clip:
    """Generate a clip.

    Args:
        prompt: what it shows; `None` takes the model's own example.
        model: what `load_pipeline` takes, or a pipeline it returned.
        method: an attention method such as `"svg2"`, `"svg2-error@0.25"`, `"dense"`; `"auto"`
            takes the model's recipe, which leaves clips too short to gain dense.
        image: a picture to start from, for models that take one.
        video: a video to start from, for models that take one.
        loras: adapters for the transformer, each a path or hub id, with `:WEIGHT` if you like;
            unused, as the next three and `compiled`, when a loaded pipeline is given.
        device: see `load_pipeline`.
        dtype: see `load_pipeline`.
        offload: see `load_pipeline`.
        backend: kernel of the sparse attention, see `svg doctor`.
        compiled: see `load_pipeline`.
        profile: time every attention call.
        progress: called as `progress(stage, done, total)`.
        **settings: fields of `Settings`; what is missing or `None` comes from the model.

    Returns:
        The clip with its statistics.

    Raises:
        SettingError: if a setting is out of range or not a size of this model.
        ModelUnavailableError: if the model cannot be loaded.
        MachineError: if the machine is too small for it.
        UnsupportedError: if `backend` cannot run here; it lists every backend's reason.
    """
    spec = method if isinstance(method, MethodSpec) else MethodSpec.parse(method)
    loaded, wanted, media = prepare(
        prompt,
        model=model,
        image=image,
        video=video,
        loras=loras,
        device=device,
        dtype=dtype,
        offload=offload,
        compiled=compiled,
        progress=progress,
        **settings,
    )
    return sample(
        loaded, wanted, spec, media=media, backend=backend, profile=profile, progress=progress
    )


def prepare(
    prompt: str | None,
    *,
    model: str | os.PathLike[str] | LoadedPipeline | None,
    image: str | os.PathLike[str] | None,
    video: str | os.PathLike[str] | None,
    loras: Sequence[str],
    device: str,
    dtype: str,
    offload: str,
    compiled: bool = False,
    progress: Progress,
    **settings: Any,
) -> tuple[LoadedPipeline, Settings, Media]:
    """Check everything that can be checked, load the model, and settle every setting.

    Takes what `generate` takes, and raises what it raises.

    Returns:
        The model, complete settings, and what the clip starts from.
    """
    check_numbers(**{k: v for k, v in settings.items() if isinstance(v, int | float)})
    adapters = [Lora.parse(text) for text in loras]
    media = read_media(image, video)
    given = {"image": image is not None, "video": video is not None}
    if isinstance(model, LoadedPipeline):
        model.inputs.check(model.name, **given)
        loaded = model
    else:
        loaded = load_pipeline(
            model,
            device=device,
            dtype=dtype,
            offload=offload,
            compiled=compiled,
            loras=adapters,
            # A video that is given decides how many frames of it are taken.
            size={n: settings.get(n) for n in ("height", "width", *(() if video else ("frames",)))},
            progress=progress,
            **given,
        )
    settings |= media.shape(loaded, settings)
    settings |= {"image": image and str(image), "video": video and str(video)}
    return loaded, Settings.resolve(loaded.defaults, prompt=prompt, **settings), media


def sample(
    loaded: LoadedPipeline,
    settings: Settings,
    spec: MethodSpec,
    *,
    media: Media = NOTHING,
    backend: str = "auto",
    profile: bool = False,
    progress: Progress = quiet,
) -> Clip:
    """Run a loaded pipeline once; see `generate`."""
    from svg_models.recipes import cluster_counts, recipe_for
    from svg_models.sparse.run import sparsify

    size = {"height": settings.height, "width": settings.width, "frames": settings.frames}
    loaded.geometry.check(**size)
    check_backend(backend, loaded)
    tokens = loaded.geometry.tokens(**size)
    if media.image is not None and loaded.inputs.image == "reference_images":
        tokens += loaded.geometry.tokens(**size | {"frames": 1})  # it is denoised as one frame more
    whole = spec.name == "auto"  # else the recipe only fills what the name leaves open
    recipe = recipe_for(
        loaded.pipe,
        tokens,
        num_steps=settings.steps_to_run if whole else None,
        num_frames=loaded.geometry.latent_frames(settings.frames) if whole else None,
        method="svg1" if spec.name == "svg1" else "svg2",
    )
    base = recipe.method
    if isinstance(base, Dense) and (not whole or spec.density or spec.top_p):
        q_clusters, k_clusters = cluster_counts(tokens, 300, 1000)
        base = SVG2(q_clusters=q_clusters, k_clusters=k_clusters)
    method = spec.build(base)
    timer = StepTimer(loaded, settings.steps_to_run, progress, exact=profile)
    with (
        sparsify(
            loaded.pipe,
            method,
            recipe.schedule,
            backend=backend,
            seed=settings.seed,
            profile=profile,
        ) as run,
        timer,
    ):
        output = loaded.pipe(**_call(loaded, settings), **media.arguments(loaded, settings))
        finished = timer.now()
        stats = run.stats()
    return Clip(
        frames=to_frames(output.frames[0]),
        settings=settings,
        method=MethodSpec.of(method) if whole else spec,
        model=loaded.name,
        loras=tuple(str(lora) for lora in loaded.loras),
        config={
            "method": _described(method),
            "schedule": recipe.schedule.to_dict(),
            "source": recipe.source,
            "note": recipe.note,
        },
        seconds=timer.seconds,
        step_seconds=timer.step_seconds,
        decode_seconds=finished - timer.last,
        tokens=tokens,
        stats=stats,
    )


def check_backend(backend: str, loaded: LoadedPipeline) -> None:
    """Refuse a backend that cannot run here, before minutes of dense steps have passed.

    Raises:
        SettingError: if there is no such backend.
        UnsupportedError: if it cannot run; it lists every backend's reason.
    """
    from svg_models.doctor import backend_reasons

    if backend == "auto":
        return
    config = (loaded.pipe.transformer or loaded.pipe.transformer_2).config
    head_dim = int(config.get("attention_head_dim", 128))
    reasons = backend_reasons(loaded.device, loaded.dtype, head_dim=head_dim)
    if backend not in reasons:
        raise SettingError(f"backend must be one of auto, {', '.join(reasons)}, got '{backend}'")
    if reasons[backend]:
        raise UnsupportedError({name: why or "can run" for name, why in reasons.items()})


def _described(method: Any) -> dict[str, Any]:
    return {"name": type(method).__name__} | method.to_dict()


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
