"""What every method is: a configuration that plans calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svg_attention.config import settings
from svg_attention.layout import TokenLayout
from svg_attention.memory import LayerMemory
from svg_attention.methods.call import AttentionCall, HeadShare
from svg_attention.plan import SparsePlan

if TYPE_CHECKING:
    from typing_extensions import Self


class Method(ABC):
    """Choose, for one self-attention call, which keys each query reads.

    A method is its own configuration: a frozen keyword-only dataclass (`repr=False`) with a JSON
    round trip. A new one derives from this class and says in `build` what it reads.
    """

    def plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: TokenLayout,
        memory: LayerMemory | None = None,
        leader: LayerMemory | None = None,
        text_lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
        scale: float | None = None,
        head_share: HeadShare | None = None,
    ) -> SparsePlan:
        """Return the plan of one call, built on the device without a host synchronisation.

        Args:
            query: `[B, H, S, D]`.
            key: `[B, H_kv, S, D]`, `H` a multiple of `H_kv`.
            value: `[B, H_kv, S, D_v]`.
            layout: where the video and text tokens are.
            memory: what this method left at the previous step of this layer; it is updated. None
                starts afresh, as a single call does.
            leader: memory of another guidance branch of the same layer that planned this step
                before, for methods that let branches read alike.
            text_lengths: integers `[B]` on the device, valid text tokens; None for all.
            generator: source of all random draws; torch's own when None.
            scale: factor of the logits, `D ** -0.5` when None.
            head_share: which of the layer's heads these are; None for all.

        Raises:
            ValueError: if the tensors are not one self-attention call over the layout, or the
                method's settings do not suit it.
        """
        call = AttentionCall(
            query=query,
            key=key,
            value=value,
            layout=layout,
            memory=LayerMemory() if memory is None else memory,
            leader=leader,
            text_lengths=text_lengths,
            generator=generator,
            scale=scale or 0.0,
            head_share=head_share,
        )
        return self.plan_call(call)

    def plan_call(self, call: AttentionCall) -> SparsePlan:
        """Return the plan of a call."""
        if self.is_full:
            return call.full_plan()
        if not self.waits:
            call.wait()
        return self.build(call)

    @property
    def waits(self) -> bool:
        """Whether `build` itself waits for keys and values, by `AttentionCall.wait`."""
        return False

    @property
    def is_full(self) -> bool:
        """Whether these settings have every query read every key."""
        return False

    @property
    def heads_differ(self) -> bool:
        """Whether heads cost what they need, so that devices have more or less to compute.

        What is remembered of a head is then in the centroids of a `LayerMemory` alone.
        """
        return False

    def probe_density(self, layout: TokenLayout) -> float:
        """Return what this method reads of every key to choose, counted as in `SparsePlan`."""
        return 0.0

    @abstractmethod
    def build(self, call: AttentionCall) -> SparsePlan:
        """Return the plan of a call that does not read every key, `ready` for its device."""

    def __repr__(self) -> str:
        """Return the call that makes this method, settings at their defaults left out."""
        given = (
            f"{entry.name}={getattr(self, entry.name)!r}"
            for entry in fields(self)  # type: ignore[arg-type]
            if getattr(self, entry.name) != entry.default
        )
        return f"{type(self).__name__}({', '.join(given)})"

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the fields as plain JSON values."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}  # type: ignore[arg-type]
        return {"name": type(self).__name__, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a method from what `to_dict` returned.

        Raises:
            TypeError: if a setting is of the wrong type.
            ValueError: if `values` names another method, a setting that this one does not have, or
                one that is out of range.
        """
        given = dict(values)
        name = given.pop("name", cls.__name__)
        if name != cls.__name__:
            raise ValueError(f"these are the settings of {name!r}, not of {cls.__name__!r}")
        return cls(**settings(cls, given))
