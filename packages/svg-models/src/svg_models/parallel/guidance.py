"""Guidance in parallel: of two branches each is computed by one of two teams of ranks.

Pipelines ask for one branch, then for the other, and use both only afterwards. So when the first
is asked for, the second team computes the second: with the inputs that this had in the evaluation
before, but for what both have in common, such as the latents. When the second is asked for, its
inputs are compared, and the result is there. Where a pipeline has both branches in one batch, each
team computes half of it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from svg_models import attention_op
from svg_models.families.base import parameter_names
from svg_models.families.processors import SparseProcessor

__all__ = ["SplitGuidance", "pass_in_evaluation"]

# Vectors of one number for each item of a batch, by part of their name; other vectors as long as a
# batch are none.
_PER_ITEM = ("timestep", "sigma", "guidance")

_place: ContextVar[int | None] = ContextVar("svg_models.pass_in_evaluation", default=None)
_splits: weakref.WeakKeyDictionary[nn.Module, SplitGuidance] = weakref.WeakKeyDictionary()


def pass_in_evaluation() -> int | None:
    """Return which pass of its evaluation the running forward pass is, where a rank skips some.

    Returns:
        Counted from 0; None where every rank computes every pass, so that they can be counted.
    """
    return _place.get()


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """A forward pass that was asked for.

    Attributes:
        values: what it was given, by name.
        versions: of the tensors among them, which others may change in place.
        announced: name and details of the pipeline's cache context, or None.
    """

    values: Mapping[str, Any]
    versions: Mapping[str, int]
    announced: tuple[str, Mapping[str, Any]] | None

    @classmethod
    def of(cls, values: Mapping[str, Any], announced: Any) -> _Pass:
        versions = {name: _version(x) for name, x in values.items() if isinstance(x, Tensor)}
        return cls(values=values, versions=versions, announced=announced)

    @property
    def step_index(self) -> int | None:
        """Return the denoising step, if the pipeline has announced it."""
        return None if self.announced is None else self.announced[1].get("step_index")

    def has(self, name: str, value: Any) -> bool:
        """Return whether a value is the one that was given, as it was then."""
        given = self.values[name]
        if isinstance(given, Tensor) and _version(given) != self.versions[name]:
            return False  # what it was cannot be told any more
        return _same(given, value)


@dataclass
class _Evaluation:
    """The passes of one evaluation of the transformer, so far.

    Attributes:
        passes: in the order in which they were asked for.
        foretold: the second pass as it was computed beside the first, and what came out.
    """

    passes: list[_Pass] = field(default_factory=list)
    foretold: tuple[_Pass, Any] | None = None

    def continues_with(self, asked: _Pass) -> bool:
        """Return whether a pass belongs to this evaluation."""
        if not self.passes:
            return True
        steps = [one.step_index for one in (self.passes[0], asked)]
        if None not in steps:
            return steps[0] == steps[1]
        first, values = self.passes[0].values, asked.values
        if values.get("timestep") is first.get("timestep") is not None:
            return True
        names = ("timestep", "hidden_states")
        return all(_same(first.get(name), values.get(name)) for name in names)


class SplitGuidance:
    """Has two teams of ranks compute the guidance branches of a pipeline side by side.

    Every rank runs the pipeline and gets the output of both branches. The first evaluation of a
    generation only teaches what the inputs of the second branch are. A pass of which nothing is
    foretold is computed by all ranks together; by each team for itself where a sparse run would
    otherwise have to forget what it knows of its heads.

    Args:
        pipe: the pipeline, held weakly; its transformers may be the same for several.
        transformers: what it calls.
        pair: this rank and the one with its place in the other team, that of the first team first.
        team: 0 or 1.
        gather: makes all ranks share the sequence (True), or those of each team (False); None if
            they cannot.

    Raises:
        ValueError: if a transformer's guidance is split already.
    """

    def __init__(
        self,
        pipe: Any,
        transformers: Mapping[str, nn.Module],
        *,
        pair: dist.ProcessGroup,
        team: int,
        gather: Callable[[bool], None] | None = None,
    ) -> None:
        self._pair, self.team, self._gather = pair, team, gather
        self._pipe = None if isinstance(pipe, nn.Module) else weakref.ref(pipe)
        self._evaluation, self._last = _Evaluation(), _Evaluation()
        self._announced: tuple[str, Mapping[str, Any]] | None = None
        self._taken: list[tuple[weakref.ref[nn.Module], type]] = []
        for transformer in transformers.values():
            if transformer in _splits:
                self.restore()
                raise ValueError(f"guidance of {type(transformer).__name__} is split already")
            plain = type(transformer)
            self._taken.append((weakref.ref(transformer), plain))
            # Not by the module's own way of setting attributes, which wrappers pass on.
            object.__setattr__(transformer, "__class__", _split_class(plain))
            _splits[transformer] = self

    def restore(self) -> None:
        """Leave the transformers as they were found."""
        while self._taken:
            reference, plain = self._taken.pop()
            transformer = reference()
            if transformer is not None:
                _splits.pop(transformer, None)
                object.__setattr__(transformer, "__class__", plain)
        self._evaluation, self._last = _Evaluation(), _Evaluation()

    @contextlib.contextmanager
    def announcing(self, name: str, details: Mapping[str, Any]) -> Iterator[None]:
        """Take note of a cache context while it lasts."""
        self._announced = (name, details)
        try:
            yield
        finally:
            self._announced = None

    def forward(self, call: _Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what a forward pass of a transformer gives.

        Args:
            call: calls the transformer as it would be without this.
            args: as the pipeline gave them.
            kwargs: as the pipeline gave them.
        """
        asked = call.named(args, kwargs, self._announced)
        if not self._evaluation.continues_with(asked):
            self._last, self._evaluation = self._evaluation, _Evaluation()
        evaluation = self._evaluation
        place = len(evaluation.passes)
        evaluation.passes.append(asked)
        foretold, evaluation.foretold = evaluation.foretold, None
        if foretold is not None and _alike(foretold[0], asked):
            return foretold[1]
        batch = _batch(asked)
        if batch and batch % 2 == 0:
            return self._half_of_batch(call, asked, place, batch)
        other = None if place else self._foretell(call, asked)
        if other is None:
            return self._alone(call, asked, place)
        outputs = self._both(call, asked, other)
        evaluation.foretold = other, outputs[1]
        return outputs[0]

    def _foretell(self, call: _Call, asked: _Pass) -> _Pass | None:
        """Return the pass that will follow the first one of an evaluation; None if unknown."""
        if len(self._last.passes) < 2 or _shares_branches(call.module):
            return None
        first, second = self._last.passes[:2]
        if not asked.values.keys() == first.values.keys() == second.values.keys():
            return None
        values = {}
        for name, value in asked.values.items():
            before, after = first.values[name], second.values[name]
            if before is after:
                values[name] = value  # both branches have it in common
            elif first.has(name, value):
                values[name] = after  # of each branch, the same in every evaluation
            elif _same(before, after):
                values[name] = value
            else:
                return None
        details = {} if asked.announced is None else asked.announced[1]
        announced = None if second.announced is None else (second.announced[0], details)
        return _Pass.of(values, announced)

    def _both(self, call: _Call, asked: _Pass, other: _Pass) -> list[Any]:
        """Return the outputs of two passes, one of which is computed here."""
        self._use(together=False)
        mine = (asked, other)[self.team]
        out = call(self._as_first(mine.values), self.team, mine.announced if self.team else None)
        return self._exchanged(out)

    def _half_of_batch(self, call: _Call, asked: _Pass, place: int, batch: int) -> Any:
        """Return the output of a pass, of which half of the batch is computed here."""
        self._use(together=False)
        part = slice(self.team * batch // 2, (self.team + 1) * batch // 2)
        values = {
            name: x[part] if _is_per_item(name, x, batch) else x
            for name, x in self._as_first(asked.values).items()
        }
        halves = self._exchanged(call(values, place, None))
        return pytree.tree_map(_joined(batch // 2), *halves)

    def _alone(self, call: _Call, asked: _Pass, place: int) -> Any:
        """Return the output of a pass that all ranks compute."""
        together = self._gather is not None and self._may_gather(call.module, place)
        self._use(together=together)
        out = call(self._as_first(asked.values), place, None)
        # Both teams computed it, but one of them has followed the branch so far.
        return out if together else self._exchanged(out)[min(place, 1)]

    def _may_gather(self, module: nn.Module, place: int) -> bool:
        """Return whether no sparse run would meet other heads than in the pass before."""
        if place > 1 or _shares_branches(module) or not _is_sparse(module):
            return True
        pipe = None if self._pipe is None else self._pipe()
        if getattr(pipe, "do_classifier_free_guidance", None) is False:
            return True
        return place == 0 and len(self._last.passes) == 1

    def _use(self, *, together: bool) -> None:
        if self._gather is not None:
            self._gather(together)

    def _as_first(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return inputs with the latents of the first team, which may differ without a seed."""
        latents = values["hidden_states"].clone(memory_format=torch.contiguous_format)
        dist.broadcast(latents, group=self._pair, group_src=0)
        return {**values, "hidden_states": latents}

    def _exchanged(self, out: Any) -> list[Any]:
        """Return what both teams have."""
        leaves, shape = pytree.tree_flatten(out)
        both: list[list[Any]] = [[], []]
        for leaf in leaves:
            parts = [leaf, leaf]
            if isinstance(leaf, Tensor):
                parts = [
                    torch.empty_like(leaf, memory_format=torch.contiguous_format) for _ in both
                ]
                dist.all_gather(parts, leaf.contiguous(), group=self._pair)
            for found, part in zip(both, parts, strict=True):
                found.append(part)
        return [pytree.tree_unflatten(found, shape) for found in both]


class _Call:
    """Calls a transformer whose guidance is split as it is without.

    Args:
        module: the transformer.
        plain: its class.
        names: what its forward takes by position.
    """

    def __init__(self, module: nn.Module, plain: Any, names: list[str]) -> None:
        self.module, self._plain, self._names = module, plain, names
        self._by_place: list[str] = []

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], announced: Any) -> _Pass:
        """Return the pass that is asked for by these arguments."""
        self._by_place = self._names[: len(args)]
        return _Pass.of({**dict(zip(self._names, args, strict=False)), **kwargs}, announced)

    def __call__(self, values: Mapping[str, Any], place: int, announced: Any) -> Any:
        """Call with values, by place where they came by place.

        Args:
            values: by name.
            place: of the pass in its evaluation.
            announced: of another pass than the pipeline asked for; None if it is that one.
        """
        args = [values[name] for name in self._by_place]
        rest = {name: x for name, x in values.items() if name not in self._by_place}
        context: Any = contextlib.nullcontext()
        if announced is not None:
            context = self._plain.cache_context(self.module, announced[0], **announced[1])
        before = _place.set(place)
        try:
            with context:
                return self._plain.__call__(self.module, *args, **rest)
        finally:
            _place.reset(before)


def _split_class(plain: Any) -> type:
    """Return the class of a transformer whose guidance is split; a copy of it is a plain one."""
    names = parameter_names(plain)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        split = _splits.get(self)
        if split is None:
            return plain.__call__(self, *args, **kwargs)
        return split.forward(_Call(self, plain, names), args, kwargs)

    @contextlib.contextmanager
    def cache_context(self: Any, name: str, **details: Any) -> Iterator[None]:
        split = _splits.get(self)
        heard: Any = contextlib.nullcontext() if split is None else split.announcing(name, details)
        with heard, plain.cache_context(self, name, **details):
            yield

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        _, (_, *arguments), *rest = plain.__reduce_ex__(self, protocol)
        return _new, (plain, *arguments), *rest

    members: dict[str, Any] = {"__call__": __call__, "__reduce_ex__": __reduce_ex__}
    if hasattr(plain, "cache_context"):
        members["cache_context"] = cache_context
    members |= {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    made: type = type(plain)(plain.__name__, (plain,), members)
    return made


def _new(kind: type, *arguments: Any) -> Any:
    return kind.__new__(kind, *arguments)


def _alike(foretold: _Pass, asked: _Pass) -> bool:
    """Return whether a pass that was computed ahead is the one that is asked for."""
    if foretold.values.keys() != asked.values.keys():
        return False
    names = [None if one.announced is None else one.announced[0] for one in (foretold, asked)]
    return names[0] == names[1] and all(foretold.has(n, x) for n, x in asked.values.items())


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are equal; where they are not one object, this may wait."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return False
        like = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        return like and torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _batch(asked: _Pass) -> int:
    """Return the items of a pass; 0 if it does not say."""
    latents = asked.values.get("hidden_states")
    return latents.shape[0] if isinstance(latents, Tensor) else 0


def _is_per_item(name: str, x: Any, batch: int) -> bool:
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != batch:
        return False
    return x.dim() > 1 or any(part in name for part in _PER_ITEM)


def _joined(items: int) -> Callable[[Any, Any], Any]:
    """Return what joins the outputs of two halves of a batch, of so many items each."""

    def join(one: Any, other: Any) -> Any:
        if isinstance(one, Tensor) and one.dim() and one.shape[0] == items:
            return torch.cat([one, other])
        return one

    return join


def _runs(module: nn.Module) -> Iterator[Any]:
    """Yield the sparse run of each attention of a transformer that has one."""
    for part in module.modules():
        processor = getattr(part, "processor", None)
        if isinstance(processor, SparseProcessor):
            owner = attention_op.owner(int(processor.handle[0]))
            if hasattr(owner, "recipe"):  # and is no sharing of the sequence
                yield owner


def _is_sparse(module: nn.Module) -> bool:
    return next(_runs(module), None) is not None


def _shares_branches(module: nn.Module) -> bool:
    """Return whether one branch reads what the other has chosen, so that it has to wait for it."""
    run = next(_runs(module), None)
    method = getattr(getattr(run, "recipe", None), "method", None)
    return bool(getattr(method, "share_branches", False))
