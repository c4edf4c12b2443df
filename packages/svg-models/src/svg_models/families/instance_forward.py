"""A `forward` that one module instance has for the length of a run, in place of its class's."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

__all__ = ["InstanceForward"]


class InstanceForward:
    """Base of what stands as `forward` in a module's own attributes, as hooks of others do.

    It holds the module weakly, so that it makes no circle. A copy of the module, deep or pickled,
    gets one that is switched off and computes what the class does.

    Args:
        module: the module.
        settings: what the subclass computes by; None is switched off.
    """

    def __init__(self, module: Any, settings: Any) -> None:
        self._module = weakref.ref(module)
        self._plain = type(module).forward  # asked here: not all classes let a compiler look it up

    def __deepcopy__(self, memo: dict[int, Any]) -> InstanceForward:
        return type(self)(memo[id(self._module())], None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._module(), None)

    def stands_aside(self, states: Tensor) -> bool:
        """Return whether `states` are computed as the class does."""
        return False

    def switch_off(self) -> None:
        """Compute what the class does from now on."""
        raise NotImplementedError

    def remove(self) -> None:
        """Switch off, also where a hook still calls this, and leave the module's attributes."""
        self.switch_off()
        module: nn.Module | None = self._module()
        if module is not None and module.__dict__.get("forward") is self:
            del module.forward
