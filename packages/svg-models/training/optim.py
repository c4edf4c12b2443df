"""Optimisers of the training script: Muon for the matrices of the blocks, AdamW for the rest."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def orthogonalise(matrices: Tensor, *, iterations: int = 5) -> Tensor:
    """Bring the singular values of `[..., M, N]` near 1 by a quintic Newton-Schulz iteration.

    Runs in bf16 on CUDA and in fp32 elsewhere.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix update is orthogonalised, all matrices of one shape at a time.

    The update is scaled by `0.2 sqrt(max(M, N))`, so that one learning rate serves Adam too.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        """Group the parameters (all must be matrices) by shape."""
        super().__init__(
            list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[param.shape].append(param)
            for shape, params in by_shape.items():
                self._step_shape(group, shape, params)

    def _step_shape(self, group: dict, shape: torch.Size, params: list[nn.Parameter]) -> None:
        grads = [param.grad for param in params if param.grad is not None]
        values: list[Tensor] = [param.detach() for param in params]
        for param in params:
            if "momentum" not in self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(param)
        momenta = [self.state[param]["momentum"] for param in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
        update = orthogonalise(torch.stack(list(nesterov)))
        if group["weight_decay"]:
            torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        scale = 0.2 * math.sqrt(max(shape))
        torch._foreach_add_(values, list(update.unbind(0)), alpha=-group["lr"] * scale)


def learning_rate(
    step: int, steps: float, *, peak: float, warmup: int, floor: float = 0.01
) -> float:
    """Warm up linearly, then follow half a cosine down to `floor * peak`."""
    ramp = min(1.0, (step + 1) / max(1, warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
    return peak * ramp * (floor + (1 - floor) * cosine)


def make_optimisers(model: nn.Module, *, lr: float, fused: bool) -> list[torch.optim.Optimizer]:
    """Split what is trained: 2D weights inside `blocks` to Muon, everything else to AdamW."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        inside = "blocks." in name and param.ndim == 2
        (matrices if inside else others).append(param)
    optimisers: list[torch.optim.Optimizer] = []
    if matrices:
        optimisers.append(Muon(matrices, lr=lr, weight_decay=0.01))
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
    return [*optimisers, adam]


class Average:
    """Exponential moving average of a model's parameters."""

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        """Start from the model as it is."""
        self.decay = decay
        self.values = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model; faster in the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in model.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averages into a model of the same form."""
        for param, value in zip(model.parameters(), self.values, strict=True):
            param.copy_(value)
