"""Linear layers in fp8 while a run asks for it; the layers themselves stay what they are.

A layer's weight is converted once, row by row, by torchao; its input is quantised row by row at
each call, and the product is torch's. The module keeps its own weight, which computes the steps
that stay as they were, and is all that is saved, loaded, moved or adapted (LoRA calls the layer
below it).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from svg_attention import UnsupportedError
from svg_models.families import fused

__all__ = ["Fp8Linear", "Fp8Linears", "refuse_device"]

# A product of fewer rows is bound by reading the weight; its conversion costs more than it saves.
LEAST_ROWS = 1024
LARGEST_E4M3 = 448.0


def refuse_device(device: torch.device) -> None:
    """Refuse a device without fp8 products.

    Raises:
        UnsupportedError: if it is not a CUDA device of compute capability 8.9 or newer, or torchao
            is not installed.
    """
    reasons = {}
    if device.type != "cuda":
        reasons["fp8"] = f"needs a CUDA device, the transformer is on {device.type!r}"
    elif torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        reasons["fp8"] = f"needs compute capability 8.9 or newer, this GPU has {major}.{minor}"
    try:
        import torchao  # noqa: F401
    except ImportError:
        reasons["torchao"] = "is not installed; pip install 'svg-models[fp8]'"
    if reasons:
        raise UnsupportedError(reasons)


class Inputs:
    """The input that was quantised last: query, key and value are projected from one tensor."""

    def __init__(self) -> None:
        self._source: weakref.ref[Tensor] | None = None
        self._version = 0
        self._quantised: tuple[Tensor, Tensor] | None = None

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of `x` `[..., C]` in e4m3 and their scales, fp32 `[..., 1]`."""
        if torch.compiler.is_compiling() or x.is_inference():
            return quantise_rows(x)
        source = None if self._source is None else self._source()
        if source is not x or self._version != x._version or self._quantised is None:
            # Only while its tensor lives, and in one place for the whole transformer.
            self._source = weakref.ref(x, self._forget)
            self._version, self._quantised = x._version, quantise_rows(x)
        return self._quantised

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        if self._source is source:
            self._source = self._quantised = None


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` `[..., C]` in e4m3 and the fp32 scale `[..., 1]` of each row.

    By one kernel where svg-kernels serves; a compiler joins the same formula, in plain torch, with
    what stands before it.
    """
    if fused.serves_tensor(x) and not torch.compiler.is_compiling():
        import svg_kernels

        return svg_kernels.quantize_rows(x)
    rows = x.float()
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / LARGEST_E4M3
    return (rows / scale).to(torch.float8_e4m3fn), scale


class Fp8Linear:
    """The `forward` of one linear layer while a run is on.

    Args:
        module: the layer, held weakly.
        switch: says whether products are in fp8 at this moment.
    """

    def __init__(self, module: nn.Linear, switch: Fp8Linears | None) -> None:
        self._module = weakref.ref(module)
        self._plain = type(module).forward
        self.switch = switch
        self._weight: Tensor | None = None
        self._scale: Tensor | None = None
        if switch is not None:
            self.convert(module)

    def convert(self, module: nn.Linear) -> None:
        """Convert the layer's weight; the layer keeps its own."""
        from torchao.quantization import Float8Tensor, PerRow

        converted = Float8Tensor.from_hp(module.weight.detach(), granularity=PerRow())
        self._weight, self._scale = converted.qdata.t(), converted.scale.float().t()

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the layer; takes and returns what `nn.Linear.forward` does."""
        module, switch = self._module(), self.switch
        rows = x.numel() // x.shape[-1]
        weight, weight_scale = self._weight, self._scale
        if switch is None or weight is None or not switch.on or rows < LEAST_ROWS:
            return self._plain(module, x)  # type: ignore[arg-type]
        quantised, scale = switch.inputs.quantise(x)
        bias = module.bias  # type: ignore[union-attr]
        # torch adds a bias only in the dtype of the output.
        within = bias is not None and bias.dtype == x.dtype
        out = torch._scaled_mm(
            quantised.flatten(0, -2),
            weight,
            scale_a=scale.flatten(0, -2),
            scale_b=weight_scale,  # type: ignore[arg-type]
            bias=bias if within else None,
            out_dtype=x.dtype,
            use_fast_accum=switch.fast,
        ).unflatten(0, x.shape[:-1])
        return out if within or bias is None else out + bias.to(out.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return Fp8Linear, (self._module(), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fp8Linear:
        return Fp8Linear(memo[id(self._module())], None)

    def remove(self) -> None:
        """Compute the layer as its class does from now on, and let the converted weight go."""
        self.switch = self._weight = self._scale = None
        module = self._module()
        if module is not None and module.__dict__.get("forward") is self:
            del module.forward


class Fp8Linears:
    """The linear layers of a transformer's blocks, and whether they are in fp8 at this moment.

    The first and the last block stay as they are, and so do layers that something else has put
    itself over, that hold no plain bf16 or fp16 weight (quantised ones), or whose sizes the tensor
    cores do not take.

    Args:
        blocks: of one transformer, in order.
        fast: let the tensor cores add in their own, shorter precision.

    Attributes:
        on: whether products are in fp8; set before each forward pass.
        layers: how many layers were taken over.
    """

    def __init__(self, blocks: Iterable[nn.Module], *, fast: bool = True) -> None:
        self.on = False
        self.fast = fast
        self.inputs = Inputs()
        self._forwards: list[Fp8Linear] = []
        try:
            for block in list(blocks)[1:-1]:
                for path, module in block.named_modules():
                    if serves(path, module):
                        forward = Fp8Linear(module, self)  # type: ignore[arg-type]
                        module.forward = forward  # type: ignore[assignment]
                        self._forwards.append(forward)
        except BaseException:
            self.remove()
            raise

    @property
    def layers(self) -> int:
        """Number of layers that were taken over."""
        return len(self._forwards)

    def remove(self) -> None:
        """Give every layer its own `forward` back."""
        forwards, self._forwards = self._forwards, []
        for forward in forwards:
            forward.remove()


def serves(path: str, module: nn.Module) -> bool:
    """Return whether a module of a block is a layer that fp8 may compute.

    The layers of modulations, whose path names the norm they belong to, take one row a clip.
    """
    own = module.__dict__.get("forward")
    if isinstance(own, Fp8Linear) and own.switch is None:
        del module.forward  # of a run that has ended
    return (
        type(module) is nn.Linear
        and "norm" not in path
        and fused.is_untouched(module)
        and type(module.weight) is nn.Parameter
        and module.weight.dtype in (torch.bfloat16, torch.float16)
        and module.in_features % 16 == 0
        and module.out_features % 16 == 0
    )
