"""Backends compute a plan; they meet the methods only in the plan.

A backend is an object with `name`, `unsupported(...)` and `attend(...)`. `BACKENDS` lists them from
the fastest to the one that runs everywhere, which "auto" never passes; after it come those that are
taken by name only: ours in fp8, which is less exact, and other people's kernels, which wait for the
device.
"""

from __future__ import annotations

import difflib
from typing import Any, Protocol

from torch import Tensor

from svg_attention.backends.flash_attn import FlashAttentionBackend
from svg_attention.backends.flashinfer import FlashInferBackend
from svg_attention.backends.kernels import Fp8KernelsBackend, KernelsBackend
from svg_attention.backends.reference import ReferenceBackend
from svg_attention.errors import UnsupportedError
from svg_attention.plan import SparsePlan


class Backend(Protocol):
    """Compute attention as a plan says."""

    @property
    def name(self) -> str:
        """Name by which a caller asks for this backend."""
        ...

    def unsupported(
        self, query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan
    ) -> str | None:
        """Return one sentence saying why this call cannot run here, or None if it can."""
        ...

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: SparsePlan,
        out: Tensor,
        *,
        scale: float,
        return_lse: bool,
    ) -> Tensor | None:
        """Fill `out`, `[B, H, Sq, D]` with rows of any stride, with the attention of a plan.

        Returns:
            The log-sum-exp, fp32 `[B, H, Sq]`; None if it was not asked for or is not known.
        """
        ...


_ALL: tuple[Backend, ...] = (
    KernelsBackend("cuda"),
    KernelsBackend("triton"),
    ReferenceBackend(),
    Fp8KernelsBackend("cuda_fp8"),
    Fp8KernelsBackend("reference_fp8"),
    FlashInferBackend(),
    FlashAttentionBackend(),
)
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _ALL}
AUTO_BACKENDS = ("cuda", "triton", "reference")


def check_backend(name: Any) -> str:
    """Return `name` if it is "auto" or that of a backend.

    Raises:
        ValueError: if it is not; it offers the nearest one.
    """
    known = ["auto", *BACKENDS]
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
        raise ValueError(f"unknown backend {name!r}; {hint}")
    return name


def select_backend(
    name: str, query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan
) -> Backend:
    """Return the backend called `name`, or for "auto" the first that can run the call.

    Raises:
        ValueError: if there is no backend of that name.
        UnsupportedError: if the call cannot run; it lists the reason of every backend.
    """
    check_backend(name)
    reasons: dict[str, str] = {}
    for candidate in BACKENDS.values():
        reason = candidate.unsupported(query, key, value, plan)
        if reason is not None:
            reasons[candidate.name] = reason
        elif name in ("auto", candidate.name):
            return candidate
        else:
            reasons[candidate.name] = f"can run, but {name!r} was asked for"
    raise UnsupportedError(reasons)
