"""Modes of torch that somebody put around attention."""

from __future__ import annotations

import torch
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["foreign_mode"]


def foreign_mode() -> str:
    """Return the class name of a mode that may change or watch torch's attention; empty if none.

    Guidance by perturbed attention is one: diffusers replaces `scaled_dot_product_attention` by a
    `TorchFunctionMode` for the time of a forward pass. A sparse call goes past that function, so a
    processor has to ask. A default device is no such mode, nor are those of the compiler, which
    follows this function through its trace.
    """
    for index in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(index)
        if not isinstance(mode, DeviceContext):
            return type(mode).__name__
    if torch.compiler.is_compiling():
        return ""
    for watcher in _get_current_dispatch_mode_stack():
        if not watcher.is_infra_mode():
            return type(watcher).__name__
    return ""
