"""Dealing the sequence of a transformer out to ranks: hooks, and attention over all of them."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from svg_attention import Arrivals
from svg_models import attention_op
from svg_models.families import Family
from svg_models.families.base import parameter_names, plain_path
from svg_models.families.processors import SparseProcessor, StandIn, put_processor
from svg_models.families.sharing import Axis, Sharing
from svg_models.parallel.ring import dense_in_ring
from svg_models.parallel.share import Share
from svg_models.parallel.ulysses import attend_over_ranks, begin_over_ranks, context_config

__all__ = ["SharedTransformer", "is_shared", "share_of"]


_STATES: Axis = {3: 1}
_NUMBER: Axis = {0: 0}


class SharedTransformer:
    """A transformer whose ranks each compute a share of the video tokens.

    Its attentions get processors that exchange heads and compute densely, by the same steps and the
    same kernel as the model's own; a sparse run has its own processors in front of them.

    Args:
        transformer: the transformer, held weakly.
        family: its family.
        sharing: where its tokens are dealt out.
        share: the ranks, of a sequence of any number of tokens.

    Attributes:
        share: what this rank has of the sequence of the running forward pass. Between two of them
            it may be given another one.
    """

    def __init__(
        self, transformer: nn.Module, family: Family, sharing: Sharing, share: Share
    ) -> None:
        self.share = share
        self._family, self._sharing = family, sharing
        self._text_counts: tuple[int, ...] | None = None
        self._undo: list[Callable[[], None]] = []
        self._processors: list[SparseProcessor] = []
        number = attention_op.register(self)
        try:
            self._place_hooks(transformer)
            for slot, (_, module) in enumerate(family.find_attentions(transformer)):
                self._place_processor(module, attention_op.make_handle(number, slot))
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Leave the transformer as it was found."""
        while self._undo:
            self._undo.pop()()

    def tell(self, message: str) -> None:
        """Say nothing: the model's own processors compute what it is about, on whole sequences."""

    def begin(self, slot: int, query: Tensor, key: Tensor) -> None:
        """Send queries and keys of a call on their way, `[B, S, H, D]`."""
        position = self._family.text_position
        begin_over_ranks(self.share.of_heads, query, key, text_position=position)

    def attend(self, slot: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute dense attention over what all ranks hold, `[B, S, H, D]`."""
        backend = getattr(self._processors[slot].original, "_attention_backend", None)
        counts, share = self._text_counts, self.share
        lengths = None if counts is None else tuple(share.tokens + count for count in counts)
        position = self._family.text_position

        def dense(q: Tensor, k: Tensor, v: Tensor, arrivals: Arrivals) -> Tensor:
            arrivals.wait()
            if share.ring is not None:
                return dense_in_ring(share, q, k, v, text_position=position, text_counts=counts)
            return self._family.dense(q, k, v, backend=backend, key_lengths=lengths)

        return attend_over_ranks(share.of_heads, query, key, value, dense, text_position=position)

    def _place_processor(self, module: Any, handle: Tensor) -> None:
        """Put a processor in front of the model's own, behind that of a sparse run."""
        front = module.processor if isinstance(module.processor, SparseProcessor) else None
        stock = module.processor if front is None else front.original
        ours = self._family.processor(_OnWhole(stock, self), handle)
        self._processors.append(ours)
        reference = weakref.ref(module)

        def undo() -> None:
            module = reference()
            if module is None:
                return
            if module.processor is ours:
                put_processor(module, stock)
            elif getattr(module.processor, "original", None) is ours:
                module.processor.original = stock

        self._undo.append(undo)
        if front is None:
            put_processor(module, ours)
        else:
            front.original = ours

    def _place_hooks(self, transformer: nn.Module) -> None:
        sharing, modules = self._sharing, dict(_plain_modules(transformer))
        # First of all: others, too, may count by what this one has read.
        self._before(transformer, _RootHook(self._begin_forward, type(transformer)))
        for path, module in modules.items():
            names = parameter_names(type(module))
            for axes in _matching(sharing.inputs, path):
                self._before(module, _InputHook(self._deal, axes, names))
            for arguments in _matching(sharing.whole, path):
                axes = dict.fromkeys(arguments, _STATES)
                self._before(module, _InputHook(self._gather, axes, names))
            for arguments in _matching(sharing.counts, path):
                axes = dict.fromkeys(arguments, _NUMBER)
                self._before(module, _InputHook(self._count, axes, names))
            for places in _matching(sharing.outputs, path):
                self._after(module, _OutputHook(self._deal, places))
        last = [modules[path] for path in modules if re.fullmatch(sharing.gathered, path)][-1]
        self._after(last, _OutputHook(self._gather, {0: _STATES}))

    def _before(self, module: nn.Module, hook: _Hook) -> None:
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _after(self, module: nn.Module, hook: _Hook) -> None:
        self._undo.append(module.register_forward_hook(hook).remove)

    def _begin_forward(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """Count the tokens; return the latents of the first rank, which all have to denoise."""
        family, latents = self._family, arguments["hidden_states"]
        if self._sharing.tokens is not None:
            tokens = self._sharing.tokens(transformer, arguments)
        else:
            frames, rows, columns = family.grid(transformer, arguments)
            tokens = frames * rows * columns + family.condition_tokens(transformer, arguments)
        if tokens < 2 * self.share.ranks:  # of a single token no rank could tell the memory layout
            raise ValueError(
                f"{self.share.ranks} ranks cannot share {tokens} video tokens; they need two each"
            )
        self.share = replace(self.share, tokens=tokens)
        lengths = family.text_lengths(transformer, arguments)
        self._text_counts = None if lengths is None else tuple(lengths.tolist())
        if self.share.ranks > 1:
            latents = latents.clone(memory_format=torch.contiguous_format)
            dist.broadcast(latents, group=self.share.group, group_src=0)
        return latents

    def _deal(self, x: Any, axis: Axis) -> Any:
        """Return this rank's part of what has as many tokens as the sequence."""
        place = axis.get(x.dim())
        if place is None or x.shape[place] != self.share.tokens:
            return x
        return self.share.part(x, place)

    def _gather(self, x: Any, axis: Axis) -> Any:
        """Return the whole of what has as many tokens as this rank's part."""
        place = axis.get(x.dim())
        if place is None or x.shape[place] != self.share.sizes[self.share.rank]:
            return x
        return self.share.whole(x, place)

    def _count(self, count: int, _: Axis) -> int:
        """Return how many of the first tokens of the sequence this rank has."""
        place = self.share.place
        return min(max(count - place.start, 0), place.stop - place.start)

    def on_whole(self, processor: Any, attn: Any, arguments: tuple[Any, ...], named: Any) -> Any:
        """Have a processor compute a call of attention over the whole sequence, on every rank.

        Args:
            processor: one of the model's own, which knows nothing of shares.
            attn: the attention module.
            arguments: what it takes after that, first the share of the video tokens.
            named: what it takes by name.
        """
        states, *others = arguments
        rotation = self._sharing.rotation
        others = [_mapped(self._gather, x, rotation) for x in others]
        named = {name: _mapped(self._gather, x, rotation) for name, x in named.items()}
        out = processor(attn, self.share.whole(states, 1), *others, **named)
        if isinstance(out, Tensor):
            return self.share.part(out, 1)
        return self.share.part(out[0], 1), *out[1:]


class _OnWhole(StandIn):
    """The processor of a model, which computes attention over whole sequences only.

    Args:
        original: the processor.
        shared: the transformer that it is of.
    """

    def __init__(self, original: Any, shared: SharedTransformer) -> None:
        super().__init__(original)
        self._shared = shared

    def __call__(self, attn: Any, *arguments: Any, **named: Any) -> Any:
        return self._shared.on_whole(self.original, attn, arguments, named)


class _Hook:
    """A hook of a shared transformer; mute in a copy, whose sequence is whole."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        return None


class _RootHook(_Hook):
    def __init__(self, begin: Callable[[nn.Module, Mapping[str, Any]], Tensor], kind: type) -> None:
        self._begin, self._names = begin, parameter_names(kind)

    @torch.compiler.disable
    def __call__(self, module: nn.Module, *given: Any) -> Any:
        args, kwargs = given
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        latents = self._begin(module, arguments)
        return _replaced(self._names, args, kwargs, {"hidden_states": latents})


class _InputHook(_Hook):
    def __init__(
        self, change: Callable[[Any, Axis], Any], axes: Mapping[str, Axis], names: list[str]
    ) -> None:
        self._change, self._axes, self._names = change, axes, names

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        args, kwargs = given
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        changed = {
            name: _mapped(self._change, arguments[name], axis)
            for name, axis in self._axes.items()
            if name in arguments
        }
        return _replaced(self._names, args, kwargs, changed)


class _OutputHook(_Hook):
    def __init__(self, change: Callable[[Any, Axis], Any], places: Mapping[int, Axis]) -> None:
        self._change, self._places = change, places

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        out = given[-1]
        if isinstance(out, Tensor):
            return self._change(out, self._places[0])
        return tuple(
            self._change(x, self._places[n]) if n in self._places else x for n, x in enumerate(out)
        )


def share_of(processor: Any, tokens: int) -> Share | None:
    """Return the share of the sequence that calls of a model's attention are made for.

    Args:
        processor: the one of the model, or that which `parallelize` has put in its place.
        tokens: of the calls.

    Returns:
        None if they have the whole sequence.
    """
    if isinstance(processor, SparseProcessor):
        owner = attention_op.owner(int(processor.handle[0]))
        return owner.share if isinstance(owner, SharedTransformer) else None
    config = context_config(processor)
    if config is None:
        return None
    group = config._ulysses_mesh.get_group()
    return Share.of(group, tokens * dist.get_world_size(group))  # diffusers deals out equal parts


def is_shared(processor: Any) -> bool:
    """Return whether a processor is one that `parallelize` has put there."""
    if not isinstance(processor, SparseProcessor):
        return False
    return isinstance(attention_op.owner(int(processor.handle[0])), SharedTransformer)


def _plain_modules(transformer: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(plain_path(path), module) for path, module in transformer.named_modules()]


def _matching(patterns: Mapping[str, Any], path: str) -> list[Any]:
    return [found for pattern, found in patterns.items() if re.fullmatch(pattern, path)]


def _mapped(change: Callable[[Any, Axis], Any], value: Any, axis: Axis) -> Any:
    """Change each tensor and number in nested tuples."""
    if isinstance(value, tuple | list):
        return tuple(_mapped(change, one, axis) for one in value)
    if isinstance(value, Tensor) or (isinstance(value, int) and 0 in axis):
        return change(value, axis)
    return value


def _replaced(
    names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any], changed: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with some in place of others, each given as it was, by place or by name."""
    by_place = [changed.get(name, x) for name, x in zip(names, args, strict=False)]
    by_name = {name: changed.get(name, x) for name, x in kwargs.items()}
    return (*by_place, *args[len(by_place) :]), by_name
