"""Fixtures and the one tolerance rule that the tests of every package share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same inputs in every run of the tests; `nox --session fuzz` draws others.
settings.register_profile("quick", max_examples=30, deadline=None, derandomize=True, database=None)
settings.register_profile(
    "fuzz", max_examples=300, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("quick")

if not torch.cuda.is_available():
    # Read by triton when a kernel is decorated, so it has to be set before a package is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function that fills what `make` leaves uninitialised on the CPU.

    Floating-point elements become NaN, integers the lowest of their type, so that a test fails
    where memory is read before it was written.
    """

    @functools.wraps(make)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = make(*args, **kwargs)
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not x.is_quantized:
            dtype = x.dtype
            with torch.no_grad():
                if dtype.is_floating_point or dtype.is_complex:
                    x.fill_(torch.nan)
                elif dtype != torch.bool:
                    x.fill_(torch.iinfo(dtype).min)
        return x

    return call


# torch notes at its first use which functions `with torch.device(...)` speaks for: it has to see
# the functions themselves, which those here go on to call.
with torch.device("meta"):
    torch.empty(0)
UNINITIALISED = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)
for holder, name in UNINITIALISED:
    setattr(holder, name, poisoned(getattr(holder, name)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` on a machine without a CUDA device; draw the same in every run.

    Torch starts a process with a random seed: what a test draws without a generator, or leaves to
    the code under test to draw, would be other data in each run, and a limit that holds for nearly
    all of it would fail once in a hundred.
    """
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the CUDA device in tests marked `gpu`, the CPU everywhere else."""
    return torch.device("cuda" if request.node.get_closest_marker("gpu") else "cpu")


@pytest.fixture
def generator(device: torch.device) -> torch.Generator:
    """Return a generator on the test's device that starts from the same seed in every test."""
    return torch.Generator(device=device).manual_seed(20240)


@pytest.fixture
def untouched_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave uninitialised memory as it is: poison touches what would only be reserved."""
    for holder, name in UNINITIALISED:
        monkeypatch.setattr(holder, name, getattr(holder, name).__wrapped__)


@pytest.fixture
def triton_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run Triton kernels on the CPU, refusing bf16.

    The interpreter computes in NumPy, which has no bf16: it returns wrong values without a word.
    A kernel launched with a bf16 tensor, also inside a tuple or a descriptor, raises TypeError.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here; TRITON_INTERPRET=1 runs them interpreted")
    launch = interpreter.GridExecutor.__call__

    def checked(executor: Any, *args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            refuse_bfloat16(argument)
        return launch(executor, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", checked)


@pytest.fixture
def interpreted(triton_interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run Triton kernels on the CPU, loops with run-time bounds included.

    The interpreter keeps scalars as arrays of one element, which NumPy 2.4 no longer turns into
    an int.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_index)


def refuse_bfloat16(argument: Any) -> None:
    """Raise TypeError if a kernel's argument holds a bf16 tensor."""
    if isinstance(argument, (tuple, list)):
        for part in argument:
            refuse_bfloat16(part)
        return
    tensor = getattr(argument, "base", argument)
    if getattr(tensor, "dtype", None) == torch.bfloat16:
        raise TypeError("the Triton interpreter is silently wrong in bf16; use fp16 or fp32")


def check_accuracy(
    actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, *, factor: float = 2.0
) -> None:
    """Fail unless `actual` is at most `factor` times as far from `exact` as `plain` is.

    Both the largest and the root mean square error are held to the rule. The least error that
    counts is that of rounding `exact` itself to the dtype of `actual`: no kernel can be asked for
    more. Values that are infinite in `exact` (an empty row's log-sum-exp) must be equal.

    Args:
        actual: what the kernel returned.
        plain: the same formula in plain torch, on the same inputs at the same dtype.
        exact: the same formula in fp64, on the same inputs widened.
        factor: how many times worse than plain torch the kernel may be.
    """
    assert actual.shape == plain.shape == exact.shape, (
        f"shapes differ: {tuple(actual.shape)}, {tuple(plain.shape)}, {tuple(exact.shape)}"
    )
    assert exact.dtype == torch.float64, f"the reference must be fp64, got {exact.dtype}"
    if exact.numel() == 0:
        return
    rounded = exact.to(actual.dtype)
    actual, plain, rounded, exact = (
        t.detach().double().cpu() for t in (actual, plain, rounded, exact)
    )
    infinite = exact.isinf()
    assert torch.equal(actual[infinite], exact[infinite]), "infinite values differ"
    finite = ~infinite
    errors = {
        name: (values - exact)[finite].abs()
        for name, values in (("actual", actual), ("plain", plain), ("rounded", rounded))
    }
    if not finite.any():
        return
    measures: dict[str, Callable[[torch.Tensor], float]] = {
        "largest": lambda e: e.max().item(),
        "root mean square": lambda e: e.square().mean().sqrt().item(),
    }
    for name, measure in measures.items():
        found, base, least = (measure(errors[key]) for key in ("actual", "plain", "rounded"))
        limit = factor * max(base, least)
        assert found <= limit, (
            f"{name} error {found:.3e} exceeds {limit:.3e} = {factor:g} x "
            f"max(plain torch {base:.3e}, rounding {least:.3e})"
        )


@pytest.fixture
def assert_accurate() -> Callable[..., None]:
    """Return `check_accuracy(actual, plain, exact, factor=2.0)`."""
    return check_accuracy
