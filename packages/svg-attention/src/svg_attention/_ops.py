"""Register an operation with torch, so that `torch.compile` keeps a graph that calls it whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def define_op(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define `svg_attention::name`; return a function that calls it.

    Where nobody listens to torch's dispatcher (plain tensors, no gradients, nothing compiling or
    tracing) the function calls `run` itself, which saves some microseconds a call.

    Args:
        name: name of the operation.
        schema: its arguments and results, in torch's words; the first argument is a tensor.
        run: computes it.
        fake: allocates results of the right shapes and dtypes.
    """
    qualified = f"svg_attention::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "default", run)
    torch.library.register_fake(qualified, fake)
    operator: Callable[..., Any] = getattr(torch.ops.svg_attention, name).default

    def call(*args: Any) -> Any:
        listened = torch.is_grad_enabled() or is_dynamo_compiling() or is_in_torch_dispatch_mode()
        if listened or type(args[0]) is not torch.Tensor:
            return operator(*args)
        return run(*args)

    return call
