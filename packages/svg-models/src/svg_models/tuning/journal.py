"""What a search has measured, in a file that is always whole, so that it can go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svg_models.errors import SettingError, first_line
from svg_models.files import atomic_path, regular_file
from svg_models.tuning.fit import FITTED, is_only
from svg_models.tuning.space import AXES, Point

__all__ = ["Journal", "Trial", "key_of"]

_FORMAT = "svg-tune/1"
_MOST_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point on one prompt, or dense attention by another kernel.

    Attributes:
        point: what ran; None for the other kernel, whose PSNR is the noise floor.
        prompt: number of the prompt from 0.
        psnr: mean dB against the dense clip; None if it was identical.
        ssim: mean structural similarity.
        flip: mean perceived difference.
        flicker: mean difference of the changes from frame to frame, levels of 255.
        work: query-key pairs over all calls, probes included, as a share of dense.
        seconds: of the denoising loop.
        dense_seconds: of the same loop dense; None if no time can be claimed.
        doubt: why no time can be claimed; empty if one can, or none was asked for.
        share: of a dense step that is attention; None if it was not timed.
        computed: attention calls as a share of those without a cache, which are also the blocks.
    """

    point: Point | None
    prompt: int
    psnr: float | None
    ssim: float
    flip: float
    flicker: float
    work: float
    seconds: float | None = None
    dense_seconds: float | None = None
    doubt: str = ""
    share: float | None = None
    computed: float = 1.0

    @property
    def cost(self) -> float:
        """Return the seconds as a share of dense, where they can be claimed.

        Where they cannot, what attention's share of a step and the counted work say; where
        nothing was timed, the counted work alone.
        """
        if self.seconds is not None and self.dense_seconds:
            return self.seconds / self.dense_seconds
        if self.share is None:
            return self.work
        return self.computed * (1 - self.share) + self.share * self.work

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        point = None if self.point is None else self.point.to_dict()
        return dataclasses.asdict(self) | {"point": point}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trial:
        """Build a trial from what `to_dict` returned.

        Raises:
            TypeError, ValueError, KeyError: if the values are not one.
        """
        point = values["point"]
        trial = cls(**{**values, "point": None if point is None else Point(**point)})
        numbers = (
            *(trial.ssim, trial.flip, trial.flicker, trial.work, trial.prompt, trial.computed),
        )
        optional = (trial.psnr, trial.seconds, trial.dense_seconds, trial.share)
        if not all(isinstance(x, int | float) for x in numbers) or not all(
            isinstance(x, int | float | None) for x in optional
        ):
            raise ValueError("a number is none")
        if trial.point is not None:
            for name, known in {**AXES, "schedule": (*AXES["schedule"], *FITTED)}.items():
                if getattr(trial.point, name) not in known:
                    raise ValueError(f"unknown {name}")
            if trial.point.only and not is_only(trial.point.only):
                raise ValueError("unknown steps or layers")
        return trial


def key_of(conditions: Mapping[str, Any], point: Point | None) -> str:
    """Return what tells a trial from all others.

    Args:
        conditions: everything beside the point that its outcome depends on.
        point: what ran.
    """
    whole = {"conditions": conditions, "point": None if point is None else point.to_dict()}
    text = json.dumps(whole, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


class Journal:
    """Trials by their key, in memory and in a file.

    Args:
        path: the file; None keeps them in memory alone.

    Raises:
        SettingError: if there is a file of this name that is no journal.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self._trials: dict[str, Trial] = {}
        if self.path is not None and self.path.exists():
            self._trials = _read(self.path)

    def __len__(self) -> int:
        return len(self._trials)

    def get(self, key: str) -> Trial | None:
        """Return a trial, or None if it was not made yet."""
        return self._trials.get(key)

    def add(self, key: str, trial: Trial) -> None:
        """Keep a trial; the file on the disk holds either all of it or nothing.

        Raises:
            OutputError: if it cannot be written.
        """
        self._trials[key] = trial
        if self.path is None:
            return
        values = {name: one.to_dict() for name, one in self._trials.items()}
        with atomic_path(self.path) as temporary:
            text = json.dumps({"format": _FORMAT, "trials": values}, indent=1)
            temporary.write_text(text, encoding="utf-8")


def _read(path: Path) -> dict[str, Trial]:
    file = regular_file(path, "as the journal of a search")
    if file.stat().st_size > _MOST_BYTES:
        raise SettingError(f"cannot read {path} as the journal of a search (too large)")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["format"] != _FORMAT:
            raise ValueError(f"the format must be {_FORMAT}")
        return {str(key): Trial.from_dict(one) for key, one in document["trials"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SettingError(
            f"cannot read {path} as the journal of a search ({first_line(error)}); remove it, or "
            "choose another output"
        ) from error
