"""Linear layers in fp8 while a run asks for it; the layers themselves stay what they are.

A layer's weight is quantised row by row at each denoising step, its input at each call, and the
product is torch's. The module keeps its own weight, which computes the steps that stay as they
were, and is all that is saved, loaded, moved or adapted (LoRA calls the layer below it).

Inputs differ from step to step, so that the errors of rounding them average out over a video. A
weight rounded once is wrong in the same way at every step, and that adds up: it is most of what
fp8 products cost. So each step rounds the weights by another grid (`largest_at`), and the error of
the weights averages out as well, for one pass over them a step.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from svg_attention import UnsupportedError
from svg_models.families import fused
from svg_models.families.fp8_rows import Fp8Rows
from svg_models.families.instance_forward import InstanceForward

__all__ = ["Fp8Linear", "Fp8Linears", "refuse_device"]

# A product of fewer rows is bound by reading the weight; its conversion costs more than it saves.
LEAST_ROWS = 1024
LARGEST_E4M3 = 448.0
# Multiples of it, without their whole parts, lie evenly between 0 and 1, however many they are.
GOLDEN_RATIO = (5**0.5 - 1) / 2
Activation = Literal["none", "gelu", "gelu_tanh"]


def refuse_device(device: torch.device) -> None:
    """Refuse a device without fp8 products.

    Raises:
        UnsupportedError: if it is not a CUDA device of compute capability 8.9 or newer.
    """
    if device.type != "cuda":
        reason = f"linears='fp8' needs a CUDA device, the transformer is on {device.type!r}"
    elif torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        reason = (
            f"linears='fp8' needs compute capability 8.9 or newer, this GPU has {major}.{minor}"
        )
    else:
        return
    raise UnsupportedError({"linears": reason})


def largest_at(step: int) -> float:
    """Return what the largest value of a row of weights becomes in e4m3 at a denoising step.

    Between 317 and 448, half an octave. e4m3 has eight values in each octave, so a weight moves by
    four to eight times the distance of two of them, over errors of both signs. More distance has
    long videos no better on average, and short ones worse.
    """
    return float(LARGEST_E4M3 * 2 ** -(step * GOLDEN_RATIO % 1 / 2))


class Inputs(threading.local):
    """The input that a thread quantised last: query, key and value are made from one tensor."""

    def __init__(self) -> None:
        self._source: weakref.ref[Tensor] | None = None
        self._version = 0
        self._quantised: tuple[Tensor, Tensor] | None = None

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of `x` `[..., C]` in e4m3 and their scales, fp32 `[..., 1]`."""
        if x.is_inference():  # counts no changes
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


def quantise_rows(
    x: Tensor, activation: Activation = "none", largest: float = LARGEST_E4M3
) -> tuple[Tensor, Tensor]:
    """Return `x` `[..., C]`, activated, in e4m3 and the fp32 scale `[..., 1]` of each row.

    The largest value of a row becomes `largest`. By one kernel where svg-kernels serves; a compiler
    joins the same formula, in plain torch, with what stands before it.
    """
    if fused.serves_tensor(x) and not torch.compiler.is_compiling():
        import svg_kernels

        return svg_kernels.quantize_rows(x, activation=activation, largest=largest)
    rows = x.float()
    if activation != "none":
        rows = F.gelu(rows, approximate="tanh" if activation == "gelu_tanh" else "none")
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / largest
    return (rows / scale).to(torch.float8_e4m3fn), scale


class Fp8Forward(InstanceForward):
    """A `forward` that asks a switch whether products are in fp8 at this moment.

    Args:
        module: the module, held weakly.
        switch: what it asks; None computes what the class does.
    """

    def __init__(self, module: nn.Module, switch: Fp8Linears | None) -> None:
        super().__init__(module, switch)
        self.switch = switch

    def stands_aside(self, states: Tensor) -> bool:
        """Return whether `states` are computed as the class does."""
        return self.switch is None or not self.switch.serves(states)

    def switch_on(self, settings: Fp8Linears) -> None:
        """Ask a switch from now on."""
        self.switch = settings

    def switch_off(self) -> None:
        """Compute what the class does from now on."""
        self.switch = None


class Fp8Linear(Fp8Forward):
    """The `forward` of one linear layer while a run is on.

    Args:
        module: the layer, held weakly.
        switch: says whether products are in fp8 at this moment.
    """

    def __init__(self, module: nn.Linear, switch: Fp8Linears | None) -> None:
        super().__init__(module, switch)
        # Weight, scales and grid in one: another thread may exchange them at any moment.
        self._converted: tuple[Tensor, Tensor, float] | None = None
        self.is_needed = True  # until a pass in fp8 has shown that its rows are too few

    def convert(self) -> tuple[Tensor, Tensor, float]:
        """Convert the layer's weight for this thread's step; the layer keeps its own.

        Returns:
            The weight, its scales, and what the largest value of a row became.
        """
        module, switch = self._module(), self.switch
        if module is None or switch is None:
            raise RuntimeError("an fp8 layer was called after its run had ended")
        weight: Tensor = module.weight.detach()  # type: ignore[union-attr, operator, assignment]
        largest = switch.largest
        quantised, scales = quantise_rows(weight, largest=largest)
        converted = self._converted = quantised.t(), scales.t(), largest
        self.is_needed = True
        return converted

    def _for_this_step(self, switch: Fp8Linears) -> tuple[Tensor, Tensor]:
        """Return the converted weight and its scales, by the grid of this thread's step."""
        converted = self._converted or self.convert()
        # Another thread's video may be at another step. A compiler would make a graph a grid.
        if not torch.compiler.is_compiling() and converted[2] != switch.largest:
            converted = self.convert()
        return converted[0], converted[1]

    def release(self) -> None:
        """Let the converted weight go; the next call in fp8 converts it again."""
        self._converted = None

    def takes_fp8_rows(self, states: Tensor) -> bool:
        """Return whether the product with `states` is in fp8 at this moment."""
        return not self.stands_aside(states)

    def __call__(self, x: Tensor | Fp8Rows) -> Tensor:
        """Compute the layer; takes and returns what `nn.Linear.forward` does, or rows in fp8."""
        if isinstance(x, Fp8Rows):
            return self.product(x.values, x.scales, x.dtype)
        switch = self.switch
        if switch is None or self.stands_aside(x):
            if switch is not None and switch.on and not torch.compiler.is_compiling():
                self.is_needed, self._converted = False, None
            return self._plain(self._module(), x)  # type: ignore[arg-type]
        # A compiler makes one graph of a block and finds the common input itself.
        compiling = torch.compiler.is_compiling()
        quantised = quantise_rows(x) if compiling else switch.inputs.quantise(x)
        return self.product(*quantised, x.dtype)

    def product(self, quantised: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute the layer from an input `[..., C]` in e4m3 with a scale `[..., 1]` a row."""
        module, switch = self._module(), self.switch
        if module is None or switch is None:
            raise RuntimeError("an fp8 layer was called after its run had ended")
        weight, weight_scale = self._for_this_step(switch)
        # torch adds a bias only in the dtype of the output.
        within = module.bias is not None and module.bias.dtype == dtype
        out = torch._scaled_mm(
            quantised.flatten(0, -2),
            weight,
            scale_a=scale.flatten(0, -2),
            scale_b=weight_scale,
            bias=module.bias if within else None,
            out_dtype=dtype,
            use_fast_accum=switch.fast,
        ).unflatten(0, quantised.shape[:-1])
        return out if within or module.bias is None else out + module.bias.to(dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return Fp8Linear, (self._module(), None)

    def switch_off(self) -> None:
        """Compute the layer as its class does, and let the converted weight go."""
        self.switch = self._converted = None


class Fp8FeedForward(Fp8Forward):
    """The `forward` of a GELU and a linear layer while a run is on: the GELU writes fp8 at once."""

    def __call__(self, hidden_states: Tensor | Fp8Rows, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the feed-forward; takes what its class's `forward` does, or rows in fp8."""
        module, switch = self._module(), self.switch
        if module is None:
            raise RuntimeError("a feed-forward was called after it was deleted")
        if switch is None or torch.compiler.is_compiling():
            return self._plain(module, hidden_states, *args, **kwargs)
        activation, _, last = module.net
        product = Fp8Linear.at(last)
        if (
            (not isinstance(hidden_states, Fp8Rows) and self.stands_aside(hidden_states))
            or product is None
            or product.switch is not switch
            or not fused.is_untouched(activation)
            or fused.is_hooked(last)
        ):
            return self._plain(module, hidden_states, *args, **kwargs)
        hidden = activation.proj(hidden_states)
        kind: Activation = "gelu_tanh" if activation.approximate == "tanh" else "gelu"
        return product.product(*quantise_rows(hidden, kind), hidden.dtype)


class Fp8Linears:
    """The linear layers of a transformer's blocks, and whether they are in fp8 at this moment.

    The first and the last block stay as they are, and so do layers that something else has put
    itself over, that hold no plain bf16 or fp16 weight (quantised ones), or whose sizes the tensor
    cores do not take.

    Args:
        blocks: of one transformer, in order.
        fast: let the tensor cores add in their own, shorter precision.

    `begin_forward` comes before each forward pass. Weights are converted where the first pass in
    fp8 of a step needs them, and converted again after `release`.
    """

    def __init__(self, blocks: Iterable[nn.Module], *, fast: bool = True) -> None:
        self._here = threading.local()
        self._latest = False
        self._step: int | None = None  # for which weights are converted, if any are
        self.fast = fast
        self._latest_largest = LARGEST_E4M3
        self.inputs = Inputs()
        self._forwards: list[Fp8Linear | Fp8FeedForward] = []
        try:
            for block in list(blocks)[1:-1]:
                for path, module in block.named_modules():
                    if is_plain_linear(path, module):
                        self._install(module, Fp8Linear)
                    elif is_plain_feed_forward(module):
                        self._install(module, Fp8FeedForward)
        except BaseException:
            self.remove()
            raise

    def _install(self, module: Any, kind: type[Fp8Linear | Fp8FeedForward]) -> None:
        forward = kind.of(module, self)
        forward.put()
        self._forwards.append(forward)

    @property
    def on(self) -> bool:
        """Whether this thread's products are in fp8: two pipelines may share a transformer."""
        if torch.compiler.is_compiling():  # no compiler follows what belongs to a thread
            return self._latest
        return getattr(self._here, "on", False)

    @property
    def largest(self) -> float:
        """What the largest value of a row of weights becomes in e4m3 at this thread's step."""
        if torch.compiler.is_compiling():
            return self._latest_largest
        return getattr(self._here, "largest", self._latest_largest)

    def begin_forward(self, *, fp8: bool, step: int | None = None) -> None:
        """Choose the precision of this thread's products until the next forward pass.

        Args:
            fp8: whether products are in fp8.
            step: the denoising step; both branches of guidance have the same weights. Where it is
                not known, nobody says that weights have changed, and they are converted each time.
        """
        self._here.on = self._latest = fp8
        if fp8:
            self._here.largest = self._latest_largest = largest_at(step or 0)
            if step is None or step != self._step:
                self._convert(step or 0)

    def _convert(self, step: int) -> None:
        """Convert every weight for a step, outside of what is compiled.

        Those in host memory are on their way to the GPU, where their layers convert them.
        """
        self._step = step
        for forward in self._linears():
            forward.release()  # before its successor is there, so that no layer is held twice
            module = forward._module() if forward.is_needed else None
            if module is not None and (module.weight.is_cuda or not torch.cuda.is_available()):
                forward.convert()

    def release(self) -> None:
        """Let all converted weights go until a pass in fp8 needs them again."""
        if self._step is not None:
            self._step = None
            for forward in self._linears():
                forward.release()

    def _linears(self) -> list[Fp8Linear]:
        return [forward for forward in self._forwards if isinstance(forward, Fp8Linear)]

    @property
    def layers(self) -> int:
        """Number of linear layers that were taken over."""
        return len(self._linears())

    def serves(self, x: Tensor) -> bool:
        """Return whether a product with `x` is in fp8 at this moment."""
        return self.on and x.numel() // x.shape[-1] >= LEAST_ROWS

    def remove(self) -> None:
        """Give every layer its own `forward` back."""
        forwards, self._forwards = self._forwards, []
        for forward in forwards:
            forward.remove()


def is_plain_linear(path: str, module: nn.Module) -> bool:
    """Return whether a module of a block is a layer that fp8 may compute.

    The layers of modulations, whose path names the norm they belong to, take one row a clip.
    """
    return (
        type(module) is nn.Linear
        and "norm" not in path
        and _is_free(module)
        and type(module.weight) is nn.Parameter
        and module.weight.dtype in (torch.bfloat16, torch.float16)
        and module.in_features % 16 == 0
        and module.out_features % 16 == 0
    )


def is_plain_feed_forward(module: nn.Module) -> bool:
    """Return whether a module is diffusers' feed-forward of a GELU, a dropout and a layer."""
    return (
        type(module) is FeedForward
        and _is_free(module)
        and [type(part) for _, part in module.net.named_children()]  # type: ignore[union-attr]
        == [GELU, nn.Dropout, nn.Linear]
    )


def _is_free(module: nn.Module) -> bool:
    """Return whether nothing has put itself over a module; a run that has ended does not count."""
    own = Fp8Forward.at(module)
    if own is not None and own.switch is None:
        del module.forward
    return fused.is_untouched(module)
