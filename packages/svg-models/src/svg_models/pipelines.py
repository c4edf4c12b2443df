"""Load a diffusers video pipeline: the embedded model, a folder, or a model of the hub.

All three end in the same place, a folder in diffusers' format that is loaded one component at a
time.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svg_models.errors import MachineError, ModelUnavailableError, SettingError

Progress = Callable[[str, float, float], None]
"""Called as `progress(stage, done, total)`; a total of 0 means that it is not known."""

GIB = 1024**3
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_REACH_SECONDS = 6.0
_LARGEST_CPU_TRANSFORMER = 2e9  # parameters; beyond it one clip takes days on a CPU


def quiet(stage: str, done: float, total: float) -> None:
    """Ignore progress."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a model generates when nothing else is said.

    Args:
        prompt: a prompt that shows the model at work.
        negative_prompt: what guidance steers away from; `None` leaves it to the pipeline.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        height: pixels.
        width: pixels.
        frames: video frames.
        fps: frames a second when written to a file.
        max_sequence_length: text tokens the pipeline pads to; `None` leaves it to the pipeline.
    """

    prompt: str = "A red fox runs through fresh snow, camera moving alongside, golden light"
    negative_prompt: str | None = None
    steps: int = 50
    guidance: float = 5.0
    height: int = 480
    width: int = 832
    frames: int = 81
    fps: int = 16
    max_sequence_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes a pipeline accepts and the tokens they become.

    Args:
        space: pixels per latent pixel along a side.
        time: video frames per latent frame, the first frame excepted.
        patch: latent frames, rows and columns per token.
        multiple: what height and width must be divisible by.
    """

    space: int
    time: int
    patch: tuple[int, int, int]
    multiple: int

    @classmethod
    def of(cls, pipe: Any) -> Geometry:
        """Read the sizes from a loaded pipeline."""
        space = int(getattr(pipe, "vae_scale_factor_spatial", 8))
        time = int(getattr(pipe, "vae_scale_factor_temporal", 4))
        transformer = getattr(pipe, "transformer", None) or pipe.transformer_2
        patch = transformer.config.get("patch_size", (1, 2, 2))
        if isinstance(patch, int):
            patch = (int(transformer.config.get("patch_size_t") or 1), patch, patch)
        # diffusers' pipelines ask for 16 whatever the VAE
        step = space * max(patch[1:])
        multiple = math.lcm(16, step)
        return cls(space=space, time=time, patch=tuple(patch), multiple=multiple)

    def tokens(self, *, height: int, width: int, frames: int) -> int:
        """Return the number of video tokens of a clip."""
        latent = (frames - 1) // self.time + 1
        t, h, w = self.patch
        return (latent // t) * (height // self.space // h) * (width // self.space // w)

    def check(self, *, height: int, width: int, frames: int) -> None:
        """Refuse sizes that the pipeline would round.

        Raises:
            SettingError: names the nearest sizes that are valid.
        """
        bad = [s for s in (height, width) if s < self.multiple or s % self.multiple]
        if bad:
            near = [max(1, round(s / self.multiple)) * self.multiple for s in (height, width)]
            raise SettingError(
                f"height and width must be multiples of {self.multiple} (VAE factor {self.space}), "
                f"got {height} x {width}; the nearest valid size is {near[0]} x {near[1]}"
            )
        if frames < 1 or (frames - 1) % self.time:
            near_frames = max(0, round((frames - 1) / self.time)) * self.time + 1
            raise SettingError(
                f"frames must be a multiple of {self.time} plus 1, got {frames}; "
                f"the nearest valid number is {near_frames}"
            )


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
        folder = _hub_folder(name, weights=True)
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


def pick_device(device: str) -> str:
    """Return the torch device that `device` means on this machine.

    Raises:
        SettingError: if it is no device.
        MachineError: if it is a GPU that is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise SettingError(f"device must be auto, cpu, cuda or cuda:N, got '{device}'") from None
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise MachineError(
            f"device {device} was asked for, but torch sees {count or 'no'} CUDA GPU"
            f"{'s' if count > 1 else ''} here; use --device cpu, or ask svg doctor why"
        )
    return str(kind)


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """Return the torch dtype that `dtype` means on `device`.

    Raises:
        SettingError: if it is none of those a pipeline runs in.
    """
    names = {
        "auto": torch.float32 if device == "cpu" else torch.bfloat16,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(dtype, dtype)
    if short not in names:
        raise SettingError(f"dtype must be one of {', '.join(names)}, got '{dtype}'")
    return names[short]


def locate(
    model: str | os.PathLike[str] | None, *, progress: Progress = quiet
) -> tuple[str, Path, bool]:
    """Find a model.

    Returns:
        Its name, a folder with at least its configuration, and whether the weights have yet to
        come from the hub.

    Raises:
        ModelUnavailableError: in one sentence, what is missing.
    """
    if model is None or str(model) == "embedded":
        from svg_models.embedded import embedded_path

        return "embedded", Path(embedded_path()), False
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelUnavailableError(
                f"{folder} is not a diffusers pipeline: it has no model_index.json"
            )
        return str(model), folder, False
    text = str(model)
    if folder.is_absolute() or text.startswith((".", "~")) or not _HUB_ID.match(text):
        raise ModelUnavailableError(
            f"unknown model '{text}': expected 'embedded', an existing folder in diffusers' "
            "format, or a hub id like Wan-AI/Wan2.1-T2V-14B-Diffusers"
        )
    progress("looking for the model", 0, 0)
    return text, _hub_folder(text, weights=False), True


def _hub_folder(model: str, *, weights: bool) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
    )

    trouble = unreachable()
    try:
        if weights:
            return Path(DiffusionPipeline.download(model, local_files_only=trouble is not None))
        configs = ["model_index.json", "*/config.json"]
        folder = Path(
            snapshot_download(model, allow_patterns=configs, local_files_only=trouble is not None)
        )
        if (folder / "model_index.json").is_file():
            return folder
        raise ModelUnavailableError(
            f"{model} is not a diffusers pipeline: it has no model_index.json"
        )
    except GatedRepoError as error:
        raise ModelUnavailableError(
            f"{model} asks for your consent: accept its terms on the hub, then run hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelUnavailableError(
            f"the hub has no model '{model}' (or it is private); check the name"
        ) from error
    except ModelUnavailableError:
        raise
    except (HfHubHTTPError, OSError) as error:  # a file missing from the local cache included
        raise _offline(model, trouble or _first_line(error)) from error


def _offline(model: str, trouble: str) -> ModelUnavailableError:
    return ModelUnavailableError(
        f"could not reach {_endpoint()} to fetch {model}, and it is not in the local cache "
        f"({trouble}); connect, or give --model a folder"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def unreachable() -> str | None:
    """Return why the hub cannot be reached, or None if it answers.

    One request with a short time limit: the hub's own client would retry for half a minute.
    """
    import ssl
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    request = urllib.request.Request(_endpoint(), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_REACH_SECONDS).close()
    except urllib.error.HTTPError:
        return None  # it answered
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return None  # reached; the hub's client has certificates of its own
        return str(getattr(reason, "strerror", None) or reason)
    return None


def check_family(name: str, folder: Path) -> None:
    """Refuse a pipeline whose transformer no family covers, before its weights are fetched.

    Raises:
        ModelUnavailableError: it lists the known families, or says why this one is skipped.
    """
    from svg_models.families import SKIPPED, known_families

    kind = _components(folder).get("transformer", ("", "nothing"))[1]
    if kind in SKIPPED:
        raise ModelUnavailableError(f"{name} has {kind} as its transformer: {SKIPPED[kind]}")
    families = known_families()
    if not any(kind in family.transformers for family in families):
        known = ", ".join(f"{f.name} ({f.title})" for f in families)
        raise ModelUnavailableError(
            f"{name} has {kind} as its transformer, which no model family covers; known are {known}"
        )


def component_parameters(folder: Path) -> dict[str, int]:
    """Count the parameters of each component from its configuration, without its weights.

    Args:
        folder: a pipeline in diffusers' format.

    Returns:
        Component name -> number of parameters, only for components that are networks.

    Raises:
        ModelUnavailableError: if `model_index.json` cannot be read or names unknown classes.
    """
    counts = {}
    for name, (library, class_name) in _components(folder).items():
        if not (folder / name / "config.json").is_file():
            continue
        try:
            kind = getattr(importlib.import_module(library), class_name)
        except (ImportError, AttributeError) as error:
            raise ModelUnavailableError(
                f"component '{name}' of {folder} needs {library}.{class_name}, which is not "
                f"installed here; a newer {library} may have it"
            ) from error
        with torch.device("meta"):
            if library == "diffusers":
                network = kind.from_config(kind.load_config(folder / name))
            else:
                network = kind(kind.config_class.from_pretrained(folder / name))
        counts[name] = sum(p.numel() for p in network.parameters())
    return counts


def _components(folder: Path) -> dict[str, tuple[str, str]]:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ModelUnavailableError(
            f"cannot read {folder / 'model_index.json'}: {error}"
        ) from error
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)
    }


def weight_bytes(sizes: dict[str, int], dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes each component's weights take in `dtype`, the VAE's in float32."""
    return {n: count * (4 if n == "vae" else dtype.itemsize) for n, count in sizes.items()}


def check_memory(
    name: str,
    sizes: dict[str, int],
    device: str,
    dtype: torch.dtype,
    *,
    explicit_cpu: bool = False,
    offload: bool = False,
) -> None:
    """Refuse a model that this machine cannot hold, before any weight is read.

    Args:
        name: of the model.
        sizes: parameters per component.
        device: where it would run.
        dtype: of the weights.
        explicit_cpu: the person asked for the CPU, so only memory counts, not time.
        offload: only the largest component has to fit the GPU.

    Raises:
        MachineError: with an estimate of what is needed.
    """
    billions = max((n for part, n in sizes.items() if "transformer" in part), default=0) / 1e9
    gpu_bytes = weight_bytes(sizes, torch.bfloat16 if device == "cpu" else dtype)
    what = f"{name} has {billions:.1f} billion parameters"
    if device == "cpu":
        if billions * 1e9 > _LARGEST_CPU_TRANSFORMER and not explicit_cpu:
            raise MachineError(
                f"{what} and needs a CUDA GPU with about {_gib(sum(gpu_bytes.values()))} for its "
                "weights, but this machine has none; run it on one, or leave --model out to use "
                "the embedded model"
            )
        need, have = sum(weight_bytes(sizes, dtype).values()), machine_memory()
        if need > 0.9 * have:
            raise MachineError(
                f"{what}, whose weights take {_gib(need)} in {str(dtype).removeprefix('torch.')}, "
                f"and this machine has {_gib(have)} of memory; leave --model out to use the "
                "embedded model"
            )
        return
    total = torch.cuda.get_device_properties(device).total_memory
    need = max(gpu_bytes.values(), default=0) if offload else sum(gpu_bytes.values())
    if need > 0.95 * total:
        hint = "use a larger GPU" if offload else "add --offload, or use a larger GPU"
        raise MachineError(
            f"{what}, which take {_gib(need)}, and the GPU has {_gib(total)}; {hint}"
        )


def _gib(size: float) -> str:
    return f"{size / GIB:.0f} GiB" if size >= 10 * GIB else f"{size / GIB:.1f} GiB"


def machine_memory() -> int:
    """Return the bytes of memory of this machine."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 16 * GIB  # no portable way to ask


def _assemble(folder: Path, sizes: dict[str, int], dtype: torch.dtype, progress: Progress) -> Any:
    from diffusers import DiffusionPipeline

    parts = _components(folder)
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
        raise ModelUnavailableError(f"cannot load {folder}: {_first_line(error)}") from error


def defaults_for(name: str, pipe: Any) -> Defaults:
    """Return what a model generates when nothing else is said.

    Args:
        name: "embedded" for the embedded model.
        pipe: the pipeline; its class decides for the others.
    """
    known = {
        "WanPipeline": Defaults(),
        "HunyuanVideoPipeline": Defaults(guidance=6.0, height=720, width=1280, frames=129, fps=24),
        "CogVideoXPipeline": Defaults(guidance=6.0, height=480, width=720, frames=49, fps=8),
        "CosmosTextToWorldPipeline": Defaults(
            steps=36, guidance=7.0, height=704, width=1280, frames=121, fps=30
        ),
    }
    defaults = known.get(type(pipe).__name__, Defaults())
    if name != "embedded":
        return defaults
    from svg_models.embedded.evaluate import GUIDANCE, SHEET_PROMPTS, STEPS

    return Defaults(
        prompt=SHEET_PROMPTS[0],
        steps=STEPS,
        guidance=GUIDANCE,
        height=128,
        width=128,
        frames=49,
    )
