"""Find out what this machine can run, and why not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from svg_attention import backend_status
from svg_models.loading.memory import GIB, machine_memory
from svg_models.needs import measured_models, needs_of

_PACKAGES = (
    "svg-models",
    "svg-attention",
    "svg-kernels",
    "svg-flash-kmeans",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "apache-tvm-ffi",
    "flash-attn",
    "flash-attn-4",
    "flashinfer-python",
)
OPTIONAL = ("flash-attn", "flash-attn-4", "flashinfer-python", "flashinfer", "flash_attn", "nvcc")
"""What is another way to do what this project does itself, or needed to build it only."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the diagnosis.

    Attributes:
        part: what it is about, such as a package or "sparse attention".
        name: what was checked.
        works: whether it can run here; None where there is nothing to run, only to know.
        detail: a version, a size, or the reason why not.
        matters: whether this machine would gain if it could run; what needs a GPU that is not
            there, or is optional beside something as fast, is no fault of a machine.
    """

    part: str
    name: str
    works: bool | None
    detail: str
    matters: bool = True


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """What follows from a diagnosis.

    Attributes:
        sentence: what this machine is good for.
        command: what would make it faster; empty if nothing on it would.
    """

    sentence: str
    command: str = ""


def diagnose(device: str | None = None, model: str | None = None) -> list[Check]:
    """Check everything this project can use.

    Asking about a GPU loads the compiled kernels, or builds them where nvcc is found.

    Args:
        device: the GPU if there is one, else the CPU, by default.
        model: a hub id, to say how it fits as well, or that this was not measured.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    checks = [
        *_machine(),
        *_software(),
        *_sparse_attention(place),
        *_kmeans(place),
        *_fused_kernels(place),
        *_models(place),
        *([] if model is None else _needs(model, place)),
    ]
    return [replace(c, matters=c.matters and _matters(c, place)) for c in checks]


def _matters(check: Check, device: str) -> bool:
    """Return whether a machine like this one would gain if what cannot run could."""
    if check.name in OPTIONAL:
        return False
    if device == "cpu":
        if check.name == "GPU":
            return _has_driver()
        return check.name in ("svg-models", "svg-attention", "svg-flash-kmeans", "embedded")
    return True


def conclude(checks: list[Check], device: str) -> Conclusion:
    """Return what a machine is good for, and the one command that would make it faster.

    Args:
        checks: what `diagnose` returned.
        device: that they are about.
    """
    works = {(check.part, check.name): bool(check.works) for check in checks}
    if device == "cpu":
        return _conclude_cpu()
    if not works["software", "svg-kernels"]:
        return Conclusion(
            sentence="Sparse attention runs here, but without the compiled kernels.",
            command='pip install "svg-models[kernels]"',
        )
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    if hopper and not works["sparse attention", "cuda"]:
        return Conclusion(
            sentence="svg-kernels is installed, but its compiled library is missing.",
            command="pip install --force-reinstall --no-deps svg-kernels",
        )
    if not works["software", "triton"]:
        return Conclusion(
            sentence="Without Triton, planning runs in plain torch and costs most of the gain.",
            command="pip install triton",
        )
    best = next(c.name for c in checks if c.part == "sparse attention" and c.works)
    return Conclusion(
        sentence=f"Sparse attention runs on backend {best}, the fastest for this GPU."
    )


def _conclude_cpu() -> Conclusion:
    if torch.cuda.is_available():
        return Conclusion(sentence="This report is about the CPU; omit --device for the GPU.")
    if _has_driver():
        return Conclusion(
            sentence="There is an NVIDIA GPU, but this torch cannot use it.",
            command="pip install --upgrade --force-reinstall torch",
        )
    sentence = (
        "This machine has no usable GPU. The embedded model, svg compare and all tests run on its "
        "CPU; models with billions of parameters need an NVIDIA GPU."
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS") and threads < (cores or 1):
        return Conclusion(
            sentence=f"{sentence} OMP_NUM_THREADS limits torch to {threads} of {cores} cores.",
            command="unset OMP_NUM_THREADS",
        )
    return Conclusion(sentence=sentence)


def to_dict(checks: list[Check], device: str) -> dict[str, Any]:
    """Return plain values for JSON."""
    return {
        "checks": [asdict(check) for check in checks],
        "conclusion": asdict(conclude(checks, device)),
    }


def _machine() -> list[Check]:
    checks = [
        Check(
            part="machine",
            name="system",
            works=None,
            detail=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        ),
        Check(
            part="machine",
            name="CPU",
            works=True,
            detail=f"{_threads()}, {machine_memory() / GIB:.0f} GiB of memory",
        ),
    ]
    if not torch.cuda.is_available():
        return [*checks, Check(part="machine", name="GPU", works=False, detail=_why_no_gpu())]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        detail = (
            f"{facts.name}, compute capability {facts.major}.{facts.minor}, "
            f"{free / GIB:.0f} of {total / GIB:.0f} GiB free, CUDA {torch.version.cuda}"
        )
        checks.append(Check(part="machine", name=f"GPU {index}", works=True, detail=detail))
    return checks


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"


def _has_driver() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def _why_no_gpu() -> str:
    if not _has_driver():
        return "no NVIDIA driver on this machine"
    if torch.version.cuda is None:
        return "this torch was built without CUDA; install a CUDA build of torch to use the GPU"
    return "a driver is there but torch sees no GPU; is it older than this torch needs?"


def _software() -> list[Check]:
    checks = []
    for name in _PACKAGES:
        try:
            version, works = importlib.metadata.version(name), True
        except importlib.metadata.PackageNotFoundError:
            version, works = "not installed", False
        checks.append(Check(part="software", name=name, works=works, detail=version))
    nvcc = shutil.which("nvcc")
    detail = _nvcc_version(nvcc) if nvcc else "not on the PATH; only needed to build svg-kernels"
    return [*checks, Check(part="software", name="nvcc", works=nvcc is not None, detail=detail)]


def _nvcc_version(nvcc: str) -> str:
    try:
        answer = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{nvcc} does not answer ({error})"
    release = [word for word in answer.replace(",", " ").split() if word.startswith("V")]
    return f"{release[0] if release else 'unknown version'} at {nvcc}"


def _sparse_attention(device: str) -> list[Check]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    runs = f"runs on {device} in {str(dtype).removeprefix('torch.')}"
    return [
        Check(
            part="sparse attention",
            name=status.name,
            works=status.available,
            detail=status.reason or runs + (", and is chosen" if status.chosen else ""),
        )
        for status in backend_status(device, dtype)
    ]


def _kmeans(device: str) -> list[Check]:
    from flash_kmeans.backend import triton_obstacle

    points = torch.zeros(2, 16, device=device)
    reason = triton_obstacle(points)
    return [
        Check(part="k-means", name="triton", works=reason is None, detail=reason or "runs"),
        Check(part="k-means", name="reference", works=True, detail="runs everywhere"),
    ]


def _fused_kernels(device: str) -> list[Check]:
    if importlib.util.find_spec("svg_kernels") is None:
        reason = "svg-kernels is not installed; pip install svg-kernels"
        return [Check(part="fused kernels", name="all", works=False, detail=reason)]
    import svg_kernels

    state = svg_kernels.status(device)
    backends = [
        Check(
            part="fused kernels",
            name=backend.name,
            works=backend.available,
            detail=backend.note
            or ("runs, and is chosen" if backend.name == state.auto else "runs"),
        )
        for backend in state.backends
    ]
    if state.auto == "reference":
        works, who = None, "diffusers; the reference backend would be no faster"
    else:
        works, who = True, f"the {state.auto} backend"
    detail = f"normalised and rotated by {who}"
    heads = Check(part="fused kernels", name="queries and keys", works=works, detail=detail)
    return [*backends, heads]


def _needs(model: str, device: str) -> list[Check]:
    """Return how a model fits, way by way, or that this was not measured."""
    checks = []
    have = None
    if device != "cpu":
        have = torch.cuda.get_device_properties(device).total_memory
    for need in needs_of(model):
        if need.steps == "diffusers":
            continue
        options = f"--offload {need.offload}"
        options += " --linears fp8" if "fp8" in need.steps else ""
        stored = ", weights stored in fp8" if need.weights == "fp8" else ""
        cards = "no card of 80 GB" if need.card is None else f"cards from {need.card} GB on"
        checks.append(
            Check(
                part=f"memory of {model}",
                name=f"{options}{stored}",
                works=None if have is None else need.fits(have),
                detail=f"{need.clip}: {need.bytes / GIB:.1f} GiB, {cards}",
                matters=False,
            )
        )
    if not checks:
        known = ", ".join(measured_models())
        detail = f"nobody has measured a model of this name; measured are {known}"
        part, name = f"memory of {model}", "not measured"
        checks.append(Check(part=part, name=name, works=None, detail=detail, matters=False))
    return checks


def _models(device: str) -> list[Check]:
    from svg_models.embedded import embedded_path

    try:
        checks = [Check(part="models", name="embedded", works=True, detail=f"at {embedded_path()}")]
    except FileNotFoundError as error:
        checks = [Check(part="models", name="embedded", works=False, detail=str(error))]
    sizes = {"Wan 2.1 1.3B": 14, "Wan 2.1 14B": 39}  # GiB of bf16 weights, text encoder included
    for name, need in sizes.items():
        if device == "cpu":
            works, detail = False, f"needs a CUDA GPU with about {need} GiB for its weights"
        else:
            have = torch.cuda.get_device_properties(device).total_memory / GIB
            works = have > need * 1.15
            detail = f"weights take about {need} GiB of {have:.0f} GiB"
            detail += "" if works else "; try --offload model"
        checks.append(Check(part="models", name=name, works=works, detail=detail))
    return checks
