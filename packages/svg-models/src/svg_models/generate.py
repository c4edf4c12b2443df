"""Generate one clip, dense or sparse."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from svg_attention import SVG2, UnsupportedError
from svg_models.errors import SettingError
from svg_models.pipelines import Defaults, LoadedPipeline, Progress, load_pipeline, quiet
from svg_models.specs import MethodSpec
from svg_models.video import to_frames, write_video

if TYPE_CHECKING:
    from svg_models.sparsify import RunStats


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to generate, complete: every field has its value.

    Args:
        prompt: what the clip shows.
        negative_prompt: what guidance steers away from; `None` leaves it to the pipeline.
        steps: denoising steps, 1 or more.
        guidance: classifier-free guidance scale, 0 or more; up to 1 turns guidance off.
        height: pixels.
        width: pixels.
        frames: video frames.
        fps: frames a second of the file.
        seed: of the initial noise, drawn on the CPU so that it is the same on every device.
        max_sequence_length: text tokens the pipeline pads to; `None` leaves it to the pipeline.

    Raises:
        SettingError: if a number is out of its range.
    """

    prompt: str
    negative_prompt: str | None
    steps: int
    guidance: float
    height: int
    width: int
    frames: int
    fps: float
    seed: int
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        check_numbers(
            steps=self.steps,
            guidance=self.guidance,
            fps=self.fps,
            seed=self.seed,
            height=self.height,
            width=self.width,
            frames=self.frames,
        )

    @classmethod
    def resolve(cls, defaults: Defaults, **given: Any) -> Settings:
        """Fill what was not given (or given as `None`) from a model's defaults."""
        values = asdict(defaults) | {"seed": 0}
        unknown = set(given) - set(values)
        if unknown:
            raise TypeError(f"unknown settings {sorted(unknown)}; known are {sorted(values)}")
        return cls(**values | {key: value for key, value in given.items() if value is not None})


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


def check_numbers(**numbers: float | None) -> None:
    """Refuse numbers no model could use; `None` means not given.

    Raises:
        SettingError: names the first that is out of range.
    """
    for name, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise SettingError(f"{name} must be a finite number, got {value}")
    at_least = {"steps": 1, "guidance": 0, "seed": 0, "height": 1, "width": 1, "frames": 1}
    for name, least in at_least.items():
        value = numbers.get(name)
        if value is not None and not value >= least:
            raise SettingError(f"{name} must be {least} or more, got {value:g}")
    fps = numbers.get("fps")
    if fps is not None and not fps > 0:
        raise SettingError(f"fps must be above 0, got {fps:g}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """A generated clip and how it came about.

    Attributes:
        frames: uint8 `[F, H, W, 3]`.
        settings: what was asked for.
        method: what attention was asked for.
        model: name of the model.
        config: the attention method and schedule in full and where they come from, as plain values.
        seconds: time of the denoising loop.
        step_seconds: time of each step; exact only if profiled, else a device may lag behind.
        decode_seconds: time of the VAE afterwards.
        tokens: video tokens of the clip.
        stats: densities and times of every attention call.
    """

    frames: np.ndarray
    settings: Settings
    method: MethodSpec
    model: str
    config: dict[str, Any]
    seconds: float
    step_seconds: tuple[float, ...]
    decode_seconds: float
    tokens: int
    stats: RunStats

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the clip as an mp4; see `svg_models.video.write_video`."""
        return write_video(self.frames, path, fps=self.settings.fps)


def generate(
    prompt: str | None = None,
    *,
    model: str | os.PathLike[str] | LoadedPipeline | None = None,
    method: str | MethodSpec = "svg2",
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    profile: bool = False,
    progress: Progress = quiet,
    **settings: Any,
) -> Clip:
    """Generate a clip.

    Args:
        prompt: what it shows; `None` takes the model's own example.
        model: what `load_pipeline` takes, or a pipeline it returned.
        method: an attention method such as `"svg2"`, `"svg2-error@0.25"`, `"dense"`.
        device: see `load_pipeline`; unused when a loaded pipeline is given.
        dtype: see `load_pipeline`; unused when a loaded pipeline is given.
        backend: kernel of the sparse attention, see `svg doctor`.
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
    check_numbers(**{k: v for k, v in settings.items() if isinstance(v, int | float)})
    loaded = (
        model
        if isinstance(model, LoadedPipeline)
        else load_pipeline(model, device=device, dtype=dtype, progress=progress)
    )
    wanted = Settings.resolve(loaded.defaults, prompt=prompt, **settings)
    return sample(loaded, wanted, spec, backend=backend, profile=profile, progress=progress)


def sample(
    loaded: LoadedPipeline,
    settings: Settings,
    spec: MethodSpec,
    *,
    backend: str = "auto",
    profile: bool = False,
    progress: Progress = quiet,
) -> Clip:
    """Run a loaded pipeline once; see `generate`."""
    from svg_models.recipes import cluster_counts, recipe_for
    from svg_models.sparsify import sparsify

    size = {"height": settings.height, "width": settings.width, "frames": settings.frames}
    loaded.geometry.check(**size)
    check_backend(backend, loaded)
    tokens = loaded.geometry.tokens(**size)
    recipe = recipe_for(loaded.pipe, tokens)
    q_clusters, k_clusters = cluster_counts(tokens, 300, 1000)
    fitted = SVG2(q_clusters=q_clusters, k_clusters=k_clusters)
    method = spec.build(recipe.method if isinstance(recipe.method, SVG2) else fitted)
    timer = _StepTimer(loaded, settings.steps, progress, exact=profile)
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
        output = loaded.pipe(**_call(loaded, settings), callback_on_step_end=timer.step_done)
        finished = timer.now()
        stats = run.stats()
    return Clip(
        frames=to_frames(output.frames[0]),
        settings=settings,
        method=spec,
        model=loaded.name,
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


def _described(method: Any) -> dict[str, Any]:
    return {"name": type(method).__name__} | method.to_dict()


def _call(loaded: LoadedPipeline, settings: Settings) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "prompt": settings.prompt,
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.frames,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "generator": torch.Generator("cpu").manual_seed(settings.seed),
        "output_type": "np",
    }
    for name in ("negative_prompt", "max_sequence_length"):
        value = getattr(settings, name)
        if value is not None and loaded.accepts(name):
            arguments[name] = value
    return arguments


class _StepTimer:
    """Time the denoising loop from its first forward pass to the end of its last step."""

    def __init__(
        self, loaded: LoadedPipeline, steps: int, progress: Progress, *, exact: bool
    ) -> None:
        self._loaded, self._steps, self._progress = loaded, steps, progress
        self._exact = exact
        self._times: list[float] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> _StepTimer:
        for name in ("transformer", "transformer_2"):
            network = getattr(self._loaded.pipe, name, None)
            if network is not None:
                self._hooks.append(network.register_forward_pre_hook(self._begin))
        self._progress("reading the prompt", 0, 0)
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def seconds(self) -> float:
        """Time of the loop."""
        return self._times[-1] - self._times[0] if self._times else 0.0

    @property
    def step_seconds(self) -> tuple[float, ...]:
        """Time of each step."""
        pairs = zip(self._times, self._times[1:], strict=False)
        return tuple(later - earlier for earlier, later in pairs)

    @property
    def last(self) -> float:
        """When the last step ended."""
        return self._times[-1] if self._times else time.perf_counter()

    def now(self) -> float:
        """Return the time once the device has finished what it was given."""
        if self._loaded.device.startswith("cuda"):
            torch.cuda.synchronize(self._loaded.device)
        return time.perf_counter()

    def _begin(self, *_: object) -> None:
        if not self._times:
            self._times.append(self.now())
            self._progress("sampling", 0, self._steps)

    def step_done(
        self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """Count a step; diffusers calls this."""
        done = step + 1 >= self._steps
        self._times.append(self.now() if done or self._exact else time.perf_counter())
        self._progress("sampling", step + 1, self._steps)
        if done:
            self._progress("decoding", 0, 0)
        return tensors
