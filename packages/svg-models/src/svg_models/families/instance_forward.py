"""A `forward` that one module instance has for the length of a run, in place of its class's."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from svg_models.families import fused

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["InstanceForward", "has_known_forward"]

# By module what stood in it for the run that ended last.
_ended: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take and return what the class's `forward` does."""
        raise NotImplementedError

    @classmethod
    def of(cls, module: Any, settings: Any) -> Self:
        """Return the one that a run before had for a module, switched on again, or a new one.

        A compiler makes a graph for one object, and gives up after eight of them.

        Args:
            module: the module.
            settings: what the subclass computes by.
        """
        known = _ended.pop(module, None)
        if type(known) is not cls:
            return cls(module, settings)
        known.switch_on(settings)
        return known

    @classmethod
    def at(cls, module: Any) -> Self | None:
        """Return the one of this class that is the `forward` of a module, None if none is."""
        own = module.__dict__.get("forward")
        found = getattr(own, "__self__", None)
        return found if isinstance(found, cls) and own == found.__call__ else None

    def put(self) -> None:
        """Become the `forward` of the module.

        As a method: a compiler asks whether it meets the very object that it has seen, if that is
        called itself, but only whether it is of a class, if a method of it is. It would make a
        graph of every block of a model.
        """
        module: Any = self._module()
        module.forward = self.__call__

    def __deepcopy__(self, memo: dict[int, Any]) -> InstanceForward:
        return type(self)(memo[id(self._module())], None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._module(), None)

    def stands_aside(self, states: Tensor) -> bool:
        """Return whether `states` are computed as the class does."""
        return False

    def takes_fp8_rows(self, states: Tensor) -> bool:
        """Return whether `Fp8Rows` may stand for `states` in a call."""
        return False

    def switch_on(self, settings: Any) -> None:
        """Compute by settings from now on."""
        raise NotImplementedError

    def switch_off(self) -> None:
        """Compute what the class does from now on."""
        raise NotImplementedError

    def remove(self) -> None:
        """Switch off, also where a hook still calls this, and leave the module's attributes."""
        self.switch_off()
        module: nn.Module | None = self._module()
        if module is not None and type(self).at(module) is self:
            del module.forward
            _ended[module] = self


def has_known_forward(module: nn.Module) -> bool:
    """Return whether the `forward` of a module is its class's or one of a run."""
    return not fused.has_own_forward(module) or InstanceForward.at(module) is not None
