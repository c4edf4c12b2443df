"""The GPU kernels of `svg_kernels`, behind one backend each."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor

from svg_attention.plan import SparsePlan
from svg_attention.planning.order import long_tiles_first
from svg_attention.tiles import COPY_ROWS, head_groups, match_heads

# Bytes that permuted keys and values may take; a call that needs more is run by groups of heads.
SCRATCH = 2**30


class KernelsBackend:
    """Permute keys and values, then attend run by run; needs `svg_kernels`.

    Queries are gathered and outputs scattered inside the kernel. Nothing waits for the device.
    Long sequences are computed by groups of heads, so that the permuted copies stay small.

    Attributes:
        name: "cuda" for the kernel written for compute capability 9.0, "triton" for the one that
            runs from 8.0 on.
    """

    name: str

    def __init__(self, name: Literal["cuda", "triton"]) -> None:
        self.name = name
        self._kernel: str = name

    def unsupported(
        self, query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan
    ) -> str | None:
        """Return one sentence saying why this call cannot run here, or None if it can."""
        if query.device.type != "cuda":
            return f"needs tensors on a CUDA device, these are on {query.device.type!r}"
        if importlib.util.find_spec("svg_kernels") is None:
            return "svg-kernels is not installed; pip install 'svg-attention[kernels]'"
        return self._unsupported_tensors(query, key, value, plan)

    def _unsupported_tensors(
        self, query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan
    ) -> str | None:
        """Return why the kernel cannot take such tensors, or None."""
        from svg_kernels.attention import TILE_ROWS

        if plan.tile_rows != TILE_ROWS:
            return f"tiles must have {TILE_ROWS} query rows, this plan's have {plan.tile_rows}"
        if value.shape[-1] != key.shape[-1]:
            return (
                "values must have the head_dim of the keys, "
                f"got {value.shape[-1]} and {key.shape[-1]}"
            )
        return self._unsupported(query)

    def _unsupported(self, query: Tensor) -> str | None:
        """Return why the kernel cannot take such queries, or None."""
        from svg_kernels.attention import unsupported

        return unsupported(self.name, query.device, query.dtype, query.shape[-1])

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
        """Fill `out` as `plan` says; see `Backend.attend`."""
        lse = query.new_empty(query.shape[:3], dtype=torch.float32) if return_lse else None
        batch_size, key_heads_in_all = key.shape[:2]
        for batch, heads, key_heads in head_groups(
            batch_size,
            query.shape[1],
            key_heads_in_all,
            self._copied_bytes(key, value, plan),
            SCRATCH,
        ):
            part = plan.part(batch, heads, key_heads, key.shape[1])
            part_lse = self._attend(
                query[batch, heads],
                key[batch, key_heads],
                value[batch, key_heads],
                part,
                out[batch, heads],
                scale=scale,
                return_lse=return_lse,
            )
            if lse is not None and part_lse is not None:
                lse[batch, heads] = part_lse
        return lse

    def _copied_bytes(self, key: Tensor, value: Tensor, plan: SparsePlan) -> int:
        """Return the bytes that the copies of a head's keys and values take."""
        if plan.key_order is None:
            return 0
        widths = key.shape[2] * key.shape[3] + value.shape[2] * value.shape[3]
        return widths * key.itemsize

    def _attend(
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
        """Fill `out`; return the log-sum-exp if asked for."""
        summary = None
        if plan.summary is not None:
            summary = (plan.summary.keys, plan.summary.values, plan.summary.log_weights)
        elif self._kernel == "cuda" and not plan.is_full and plan.run_multiple % COPY_ROWS:
            plan = plan.rounded(COPY_ROWS)  # Not made by a method: those are ready.
        tile_order = plan.tile_order
        if tile_order is None and not plan.is_full:
            tile_order = long_tiles_first(plan.run_lengths)
        # The kernels fill rows wherever they lie, but not channels.
        target = out if out.stride(-1) == 1 else None
        result = self._attend_to_runs(
            query,
            key,
            value,
            plan,
            query_order=plan.query_order,
            summary=summary,
            tile_order=None if tile_order is None else tile_order.flatten(),
            scale=scale,
            return_lse=return_lse,
            out=target,
        )
        found, lse = (result, None) if isinstance(result, Tensor) else result
        if target is None:
            out.copy_(found)
        return lse

    def _attend_to_runs(
        self, query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan, **keywords: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Permute keys and values and launch the kernel."""
        import svg_kernels

        if plan.key_order is not None:
            key, value = svg_kernels.permute_rows((key, value), plan.key_order)
        found: Tensor | tuple[Tensor, Tensor] = svg_kernels.block_sparse_attention(
            query, key, value, plan.run_starts, plan.run_lengths, backend=self.name, **keywords
        )
        return found


class Fp8KernelsBackend(KernelsBackend):
    """Round keys and values to e4m3 as they are permuted, then attend in e4m3 run by run.

    Twice the rate of the tensor cores for errors of some 5 % of an output row, where bf16 has
    0.3 %; taken by name only. Heads of fewer channels than the kernel's 128 are padded, which costs
    what 128 channels cost. A summary stays in 16 bits.

    Attributes:
        name: "cuda_fp8" for the kernel written for compute capability 9.0, "reference_fp8" for
            plain torch on any device, which rounds keys and values alike and computes in fp32.
    """

    def __init__(self, name: Literal["cuda_fp8", "reference_fp8"]) -> None:
        self.name = name
        self._kernel = name.removesuffix("_fp8")

    def unsupported(
        self, query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan
    ) -> str | None:
        """Return one sentence saying why this call cannot run here, or None if it can."""
        if self.name == "cuda_fp8":
            return super().unsupported(query, key, value, plan)
        if importlib.util.find_spec("svg_kernels") is None:
            return "svg-kernels is not installed; pip install 'svg-attention[kernels]'"
        return self._unsupported_tensors(query, key, value, plan)

    def _unsupported(self, query: Tensor) -> str | None:
        from svg_kernels.attention_fp8 import unsupported
        from svg_kernels.key_value_fp8.rows import HEAD_DIM

        width = query.shape[-1]
        if width > HEAD_DIM:
            return f"heads must have at most {HEAD_DIM} channels in e4m3, got {width}"
        return unsupported(self._kernel, query.device, query.dtype, HEAD_DIM)

    def _copied_bytes(self, key: Tensor, value: Tensor, plan: SparsePlan) -> int:
        """Return the bytes of a head's keys and values in e4m3, whatever their order."""
        from svg_kernels.key_value_fp8.rows import HEAD_DIM

        rows = key.shape[2] if plan.key_order is None else plan.key_order.shape[-1]
        return 2 * rows * HEAD_DIM

    def _attend_to_runs(
        self, query: Tensor, key: Tensor, value: Tensor, plan: SparsePlan, **keywords: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Quantise keys and values and launch the kernel."""
        import svg_kernels
        from svg_kernels.key_value_fp8.rows import HEAD_DIM

        order = plan.key_order
        if order is not None:
            order = match_heads(order, key.shape[1])
        width, out = query.shape[-1], keywords["out"]
        if width < HEAD_DIM:
            query, key, value = (_widened(x, HEAD_DIM) for x in (query, key, value))
            if keywords["summary"] is not None:
                keys, values, weights = keywords["summary"]
                summary = _widened(keys, HEAD_DIM), _widened(values, HEAD_DIM), weights
                keywords["summary"] = summary
            keywords["out"] = None
        rows = svg_kernels.quantize_key_value(
            key, value, order, backend="auto" if self._kernel == "cuda" else self._kernel
        )
        result: Tensor | tuple[Tensor, Tensor] = svg_kernels.block_sparse_attention_fp8(
            query, rows, plan.run_starts, plan.run_lengths, backend=self._kernel, **keywords
        )
        if width == HEAD_DIM:
            return result
        found, lse = (result, None) if isinstance(result, Tensor) else result
        found = found[..., :width]
        found = found if out is None else out.copy_(found)
        return found if lse is None else (found, lse)


def _widened(x: Tensor, width: int) -> Tensor:
    """Return rows with channels of zeros behind their own, which no product sees."""
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))
