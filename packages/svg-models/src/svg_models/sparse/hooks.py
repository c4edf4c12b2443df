"""Putting a sparse run's processors and hooks into a transformer, and taking them out again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from svg_models import attention_op
from svg_models.families import Family
from svg_models.families.base import parameter_names, unwrap
from svg_models.families.processors import SparseProcessor, put_processor
from svg_models.parallel import is_shared, refuse_parallel
from svg_models.sparse.context import ForwardContext, Moment
from svg_models.sparse.probe import ContextProbe, place_probe

__all__ = ["Installation", "Slot", "owner_of"]


class Host(Protocol):
    """What an installation needs of the run that it belongs to."""

    number: int

    def tick(
        self,
        name: str,
        transformer: nn.Module,
        *,
        announced: Any,
        timestep: Any,
        latents: Any,
        grid: tuple[int, int, int],
    ) -> Moment:
        """Return where the generation stands at the start of a forward pass."""
        ...

    def finish(self, transformer: nn.Module) -> None:
        """Record the end of a generation."""
        ...

    def begin_forward(self, transformer: str, context: ForwardContext) -> None:
        """Begin a forward pass."""
        ...

    def tell(self, message: str) -> None:
        """Warn the user once."""
        ...


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One self-attention that a run has taken over.

    Attributes:
        transformer: component name in the pipeline.
        family: the transformer's family.
        path: module path in the transformer.
        layer: position among the transformer's video self-attentions.
        num_layers: how many there are.
        module: the attention module, held weakly.
        processor: the processor put there.
    """

    transformer: str
    family: Family
    path: str
    layer: int
    num_layers: int
    module: weakref.ref[Any]
    processor: SparseProcessor

    @property
    def in_place(self) -> bool:
        """Return whether the module still uses our processor (True once the module is gone)."""
        module = self.module()
        return module is None or module.processor is self.processor


class _RootHook:
    """Forward pre-hook of a transformer; mute in a copy, which belongs to no run.

    It keeps its run alive for as long as the transformer lives.
    """

    def __init__(self, read: Callable[..., None] | None = None) -> None:
        self._read = read

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._read is not None:
            self._read(module, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _RootHook:
        return _RootHook()

    def __reduce__(self) -> tuple[type[_RootHook], tuple[()]]:
        return _RootHook, ()


class Installation:
    """A run's hold on one transformer.

    Args:
        run: the run; its `number` goes into the handles.
        name: component name of the transformer in the pipeline.
        transformer: the transformer.
        family: its family.
        first_slot: position of this transformer's first attention among the slots of the run.

    Raises:
        ValueError: if the transformer is sparse already or has processors nobody knows.
        UnsupportedError: if the transformer is split over devices in a way that cannot be sparse.
    """

    def __init__(
        self, run: Host, name: str, transformer: nn.Module, family: Family, first_slot: int
    ) -> None:
        self.name, self.family, self._run = name, family, run
        self._transformer = weakref.ref(transformer)
        _refuse_second(transformer)
        refuse_parallel(transformer, family)
        attentions = family.find_attentions(transformer)
        self.slots = tuple(
            Slot(
                transformer=name,
                family=family,
                path=path,
                layer=layer,
                num_layers=len(attentions),
                module=weakref.ref(module),
                processor=family.processor(
                    module.processor, attention_op.make_handle(run.number, first_slot + layer)
                ),
            )
            for layer, (path, module) in enumerate(attentions)
        )
        self._parameters = parameter_names(type(transformer))
        self._undo: list[Callable[[], None]] = []
        try:
            self._probe = ContextProbe(self._finished)
            probe_name = f"svg_models.{run.number}"
            self._undo.append(place_probe(transformer, self._probe, probe_name))
            # First: where ranks share the sequence, later hooks leave this rank's part of it.
            hook = transformer.register_forward_pre_hook(
                _RootHook(self._before_forward), with_kwargs=True, prepend=True
            )
            self._undo.append(hook.remove)
            for slot, (_, module) in zip(self.slots, attentions, strict=True):
                put_processor(module, slot.processor)
        except BaseException:  # an interrupt, too, leaves nothing behind
            self.remove()
            raise

    @property
    def transformer(self) -> nn.Module | None:
        """Return the transformer, or None if it is gone."""
        return self._transformer()

    def still_in(self, pipe: Any) -> bool:
        """Return whether the transformer is still that of the pipeline."""
        part = getattr(pipe, self.name, None)
        return isinstance(part, nn.Module) and unwrap(part) is self.transformer

    def _finished(self) -> None:
        if self.transformer is not None:
            self._run.finish(self.transformer)

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        run = self._run
        refuse_parallel(module, self.family)
        lost = [slot.path for slot in self.slots if not slot.in_place]
        if lost:
            run.tell(
                f"{len(lost)} of {len(self.slots)} attention processors of {self.name} were "
                f"replaced after sparsify, first at {lost[0]}: these layers run without sparsity; "
                "call restore(), make the change, then sparsify again"
            )
        arguments = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        grid = self.family.grid(module, arguments)
        moment = run.tick(
            self.name,
            module,
            announced=self._probe.announced,
            timestep=arguments.get("timestep"),
            latents=arguments.get("hidden_states"),
            grid=grid,
        )
        lengths = self.family.text_lengths(module, arguments)
        context = ForwardContext(
            moment=moment,
            grid=grid,
            text_lengths=lengths,
            # Waits for the accelerator, but once per forward pass: dense kernels without a mask
            # need to know on the host where the padding starts.
            text_counts=None if lengths is None else tuple(lengths.tolist()),
            before=self.family.condition_tokens(module, arguments),
        )
        run.begin_forward(self.name, context)

    def remove(self) -> list[str]:
        """Undo everything.

        Returns:
            Paths of attentions whose processor somebody else replaced; these are left alone.
        """
        left_alone = []
        for slot in self.slots:
            module = slot.module()
            if module is None:
                continue
            if slot.in_place:
                put_processor(module, slot.processor.original)
            elif module.processor is not slot.processor.original:
                left_alone.append(slot.path)
        while self._undo:
            self._undo.pop()()
        return left_alone


def owner_of(transformer: nn.Module) -> int | None:
    """Return the number of the run that has made a transformer sparse, or None."""
    for module in transformer.modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, SparseProcessor) and not is_shared(processor):
            return int(processor.handle[0])
    return None


def _refuse_second(transformer: nn.Module) -> None:
    for path, module in transformer.named_modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, SparseProcessor) and not is_shared(processor):
            raise ValueError(
                f"{type(transformer).__name__} is sparse already (at {path}); call "
                "svg_models.restore(pipe) before calling sparsify again"
            )
