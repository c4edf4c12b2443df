"""Caches of diffusers, by name: steps whose blocks are not computed, since little would change.

They are diffusers' own, put in place for the length of a run. What they spare multiplies with what
sparse attention spares, and so do their errors: `svg tune` weighs both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from svg_models.errors import SettingError
from svg_models.numeric import written
from svg_models.spelling import did_you_mean

__all__ = ["NO_CACHE", "Cache", "can_cache", "read_cache"]

NO_CACHE = "none"
_WARM_UP = 3  # steps that "taylor" computes at first
_KINDS = {"first-block": (0.0, 1.0), "taylor": (2, 10)}


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A cache and how much it spares.

    Attributes:
        kind: "first-block" computes the first block of each step, and the others if its output
            differs from that of the last step computed by more than `amount` of it; "taylor"
            computes every `amount`-th step and continues the transformer's output in a line.
        amount: see there.
    """

    kind: str
    amount: float

    def config(self) -> Any:
        """Return it as diffusers takes it."""
        import torch
        from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

        if self.kind == "first-block":
            return FirstBlockCacheConfig(threshold=self.amount)
        return TaylorSeerCacheConfig(
            cache_interval=int(self.amount),
            disable_cache_before_step=_WARM_UP,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=True,
        )

    def enable(self, transformer: Any) -> None:
        """Put it in place; `transformer.disable_cache()` takes it away.

        Raises:
            SettingError: if diffusers cannot cache this transformer, or caches it already.
        """
        name, text = type(transformer).__name__, f"{self.kind}@{self.amount:g}"
        if not hasattr(transformer, "enable_cache"):
            raise SettingError(f"cache {text} is not for {name}, which diffusers does not cache")
        if transformer.is_cache_enabled:
            raise SettingError(
                f"cache {text} was asked for, and {name} has one; call its disable_cache() before, "
                "or leave cache out"
            )
        if self.kind == "taylor" and not hasattr(transformer, "proj_out"):
            raise SettingError(
                f"cache {text} continues the output of proj_out, which {name} does not have; take "
                "first-block"
            )
        try:
            transformer.enable_cache(self.config())
        except (AttributeError, IndexError, KeyError, ValueError) as error:
            raise SettingError(f"cache {text} is not for {name}: {error}") from error


def can_cache(transformer: Any) -> bool:
    """Return whether diffusers can cache a transformer, and does not yet."""
    if not hasattr(transformer, "enable_cache") or transformer.is_cache_enabled:
        return False
    if not hasattr(transformer, "proj_out"):
        return False
    try:
        transformer.enable_cache(Cache(kind="first-block", amount=0.1).config())
    except (AttributeError, IndexError, KeyError, ValueError):
        return False
    transformer.disable_cache()
    return True


def read_cache(text: Any) -> Cache | None:
    """Return the cache of a name such as "first-block@0.1" or "taylor@2"; None for "none".

    Raises:
        SettingError: if it is unknown, with the nearest, or its number is out of range.
    """
    if text == NO_CACHE:
        return None
    if not isinstance(text, str):
        raise SettingError(f"cache must be a text such as first-block@0.1, got {written(text)}")
    kind, _, number = text.partition("@")
    if kind not in _KINDS:
        known = (NO_CACHE, *_KINDS)
        raise SettingError(
            f"cache must be one of {', '.join(known)}, with an amount as in first-block@0.1, got "
            f"{written(text)}{did_you_mean(kind, known)}"
        )
    least, most = _KINDS[kind]
    try:
        amount = float(number)
    except ValueError:
        amount = -1.0
    if not least <= amount <= most or amount == 0 or (kind == "taylor" and amount % 1):
        wanted = "a whole number from 2 to 10" if kind == "taylor" else "above 0, at most 1"
        raise SettingError(f"the amount of cache {kind} must be {wanted}, got {written(text)}")
    return Cache(kind=kind, amount=amount)
