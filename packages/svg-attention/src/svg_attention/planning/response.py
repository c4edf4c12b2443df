"""The metric in which distance between rows means change of the attention's scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from svg_attention.planning.clustering import zero_where_not_finite

# Rows of a head that its second moment is taken from, and rounds of the square root: enough for
# eigenvalues that differ by a factor of 10^5, beyond which `RIDGE` levels them.
SAMPLED_ROWS = 4096
ROUNDS = 20
RIDGE = 1e-4
# Mean square below which a row counts as none.
LEAST_SQUARE = 1e-12


def response_root(x: Tensor, groups: int) -> Tensor:
    """Return the square root of the second moment of rows, scaled to a mean eigenvalue near 1.

    With `M = X'X / n` over the rows `X` that keys are multiplied with, `|(k - l) M^(1/2)|^2` is the
    mean square of the change of a score where `l` takes the place of `k`. The root is found by
    coupled Newton-Schulz rounds, matrix products alone, without waiting for the device, in fp64:
    products of TF32, which a caller may have allowed, would not converge. What is not finite counts
    as 0.

    Args:
        x: `[B, H, N, D]`, N at least 1.
        groups: heads of the result, a divisor of H; consecutive heads share one.

    Returns:
        fp32 `[B, groups, D, D]`, symmetric.

    Source: response metric of SparsePR, arXiv:2608.18484, 4.3; Higham 2008, Functions of Matrices,
    6.3 (product form of the coupled iteration).
    """
    sampled = zero_where_not_finite(x[:, :, :: -(-x.shape[2] // SAMPLED_ROWS)].float())
    # Rows of any magnitude, even those whose squares overflow.
    sampled = sampled.unflatten(1, (groups, -1)).flatten(2, 3)
    largest = sampled.abs().amax(dim=(2, 3), keepdim=True)
    sampled = sampled / largest.clamp(min=torch.finfo(torch.float32).tiny)
    moment = (sampled.transpose(-1, -2) @ sampled).double()
    identity = torch.eye(x.shape[3], dtype=torch.float64, device=x.device)
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    moment = moment / mean.clamp(min=torch.finfo(torch.float32).tiny) + RIDGE * identity
    norm = torch.linalg.matrix_norm(moment)[..., None, None]
    root, inverse = moment / norm, identity.expand_as(moment)
    for _ in range(ROUNDS):
        step = 1.5 * identity - 0.5 * inverse @ root
        root, inverse = root @ step, step @ inverse
    return (root * norm.sqrt()).float()


def respond(x: Tensor, root: Tensor, *, unit: bool = False) -> Tensor:
    """Return rows in the metric of a root, typed as `x`.

    Args:
        x: `[B, H, N, D]`.
        root: `[B, H, D, D]` from `response_root`.
        unit: scale each row to unit root mean square: directions are compared, not lengths.
    """
    rows = x @ root.to(x.dtype)
    return F.rms_norm(rows, rows.shape[-1:], eps=LEAST_SQUARE) if unit else rows
