"""Refuse what cannot run, when it is asked for and not minutes later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from svg_attention import Schedule, UnsupportedError, backend_status
from svg_models.errors import SettingError
from svg_models.numeric import as_whole, written
from svg_models.spelling import did_you_mean

__all__ = [
    "check_backend",
    "check_choice",
    "check_flag",
    "check_schedule",
    "check_seed",
    "device_and_dtype",
    "why_not",
]


def check_backend(
    backend: str, device: str, dtype: torch.dtype, *, head_dim: int | None = None
) -> None:
    """Refuse a backend that cannot run here, before minutes of dense steps have passed.

    Args:
        backend: "auto" or a name.
        device: where it will run. A pipeline in CPU memory may still be moved, so where there is a
            GPU a backend that runs there is let pass.
        dtype: of query, key and value.
        head_dim: of each head; 128 while it is not known.

    Raises:
        SettingError: if there is no such backend.
        UnsupportedError: if it cannot run; it lists every backend's reason.
    """
    if backend == "auto":
        return
    reasons = _reasons(device, dtype, head_dim, backend)
    if not isinstance(backend, str) or backend not in reasons:
        known = ["auto", *reasons]
        raise SettingError(
            f"backend must be one of {', '.join(known)}, got {backend!r}"
            f"{did_you_mean(str(backend), known)}"
        )
    if reasons[backend]:
        raise UnsupportedError({name: why or "can run" for name, why in reasons.items()})


def why_not(backend: str, device: str, dtype: torch.dtype, *, head_dim: int | None = None) -> str:
    """Return why a backend cannot run; empty if it can. Takes what `check_backend` does."""
    return _reasons(device, dtype, head_dim, backend)[backend]


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Refuse a word that is none of those known.

    Raises:
        SettingError: it names the nearest.
    """
    if value not in known:
        raise SettingError(
            f"{name} must be one of {', '.join(known)}, got {value!r}"
            f"{did_you_mean(str(value), known)}"
        )


def check_seed(seed: Any) -> int:
    """Return a seed as a number of Python's, since its digits are what is drawn from.

    Raises:
        SettingError: if it is no whole number from 0 to 2^64 - 1.
    """
    number = as_whole("seed", seed)
    if not 0 <= number < 2**64:
        raise SettingError(f"seed must be from 0 to 2^64 - 1, got {written(number)}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Return True or False as it is.

    Raises:
        SettingError: if it is neither.
    """
    if not isinstance(value, bool):
        raise SettingError(f"{name} must be True or False, got {written(value)}")
    return value


def _reasons(device: str, dtype: torch.dtype, head_dim: int | None, backend: str) -> dict[str, str]:
    """Return why each backend cannot run: of those in CPU memory, on the GPU if `backend` can."""

    def ask(device: str, dtype: torch.dtype) -> dict[str, str]:
        found = backend_status(device, dtype, head_dim or 128)
        return {status.name: status.reason for status in found}

    reasons = ask(device, dtype)
    may_move = torch.device(device).type == "cpu" and torch.cuda.is_available()
    if may_move and isinstance(backend, str) and reasons.get(backend):
        reasons = ask("cuda", torch.bfloat16 if dtype == torch.float32 else dtype)
    return reasons


def check_schedule(schedule: Any) -> None:
    """Refuse what is no schedule.

    Raises:
        TypeError: it says how to make one.
    """
    if schedule is None or isinstance(schedule, Schedule):
        return
    if isinstance(schedule, type):
        raise TypeError(f"schedule is the class {schedule.__name__}; give one: Schedule()")
    hint = f"Schedule(dense_steps={schedule})" if isinstance(schedule, float) else "Schedule()"
    raise TypeError(
        f"schedule must be a Schedule such as {hint}, got {type(schedule).__name__} {schedule!r}"
    )


def device_and_dtype(pipe: Any, transformer: Any) -> tuple[str, torch.dtype]:
    """Return where a transformer of a pipeline will run, and in which floating type."""
    dtype = getattr(transformer, "dtype", torch.float32)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        dtype = torch.bfloat16  # quantised or stored in fp8: it computes in something wider
    try:
        device = torch.device(pipe._execution_device)  # with offloading, not where weights lie
    except AttributeError:
        device = next((p.device for p in transformer.parameters()), torch.device("cpu"))
    if device.type == "meta":
        device = torch.device("cpu")
    return str(device), dtype
