"""Merging attention to parts of the keys."""

from __future__ import annotations

import torch
from torch import Tensor


class Merged:
    """Attention to all parts of the keys that were added so far.

    `out = sum_p exp(lse_p - lse) out_p` with `lse = log sum_p exp(lse_p)`, in fp32: exactly the
    softmax over all keys. A query that reads nothing has the log-sum-exp minus infinity and gives
    0.

    Attributes:
        out: fp32 `[B, H, S, D]`.
        lse: fp32 `[B, H, S]`.
    """

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self.out, self.lse = out.float(), lse

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Add a part: its output `[B, H, S, D]` and log-sum-exp `[B, H, S]`."""
        total = torch.logaddexp(self.lse, lse)
        # Of a query that has read nothing yet, minus infinity less itself would be no number.
        share = (lse - total).exp().masked_fill(total == -torch.inf, 0.0)
        self.out, self.lse = torch.lerp(self.out, out.float(), share[..., None]), total
