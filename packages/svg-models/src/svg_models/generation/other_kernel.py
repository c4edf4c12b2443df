"""Dense attention by another kernel: what the clips of two right kernels differ by is noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg_models.families import transformers_of

__all__ = ["other_dense_kernel"]


@contextmanager
def other_dense_kernel(pipe: Any) -> Iterator[None]:
    """Have transformers use another of torch's dense kernels than they would take by themselves.

    Args:
        pipe: a diffusers pipeline or transformer. It must run its own dense attention, so make it
            sparse with `exact_dense=True`, if at all.
    """
    with ExitStack() as undo:
        for transformer in transformers_of(pipe).values():
            running: list[ExitStack] = []

            def before(module: torch.nn.Module, *_: Any, inside: Any = running) -> None:
                on_gpu = next(module.parameters()).is_cuda
                kernel = SDPBackend.EFFICIENT_ATTENTION if on_gpu else SDPBackend.MATH
                inside.append(ExitStack())
                inside[-1].enter_context(sdpa_kernel(kernel))

            def after(*_: Any, inside: Any = running) -> None:
                inside.pop().close()

            undo.callback(transformer.register_forward_pre_hook(before).remove)
            hook = transformer.register_forward_hook(after, always_call=True)
            undo.callback(hook.remove)
        yield
