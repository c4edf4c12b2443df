"""What `tune` takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from svg_models.errors import SettingError
from svg_models.generation.request import Request
from svg_models.generation.settings import option
from svg_models.spelling import did_you_mean

__all__ = ["BUDGET", "TIME_BY", "TuneRequest"]

BUDGET = "Budget"
TIME_BY = ("seconds", "density")


@dataclass(frozen=True, kw_only=True)
class TuneRequest(Request):
    """What `tune` takes: a model, prompts, and a budget of quality or of time.

    Raises:
        SettingError: if there is no budget or more than one, or a value is out of range.
    """

    prompts: Sequence[str] = option(
        (),
        "Prompt to measure on; can be repeated. [dim]Default: three prompts of the model.[/]",
        "--prompt",
        repeats=True,
    )
    psnr: float | None = option(
        None,
        "PSNR against dense to reach, in dB, in the least time.",
        "--psnr",
        kind=float,
        above=0,
        most=90,
        panel=BUDGET,
    )
    speedup: float | None = option(
        None,
        "Speed-up over dense to reach, at the best quality.",
        "--speedup",
        kind=float,
        above=1,
        most=100,
        panel=BUDGET,
    )
    time_by: str = option(
        "seconds",
        "seconds: each trial is timed, interleaved with dense. density: the cost is the share of "
        "query-key pairs computed, for a machine that is busy or is not the target.",
        "--time-by",
        panel=BUDGET,
    )
    budget_minutes: float | None = option(
        None,
        "Stop after this many minutes, with the best recipe so far.",
        "--budget-minutes",
        kind=float,
        above=0,
        most=1e6,
        panel=BUDGET,
    )
    fit: bool = option(
        False,
        "First measure what each step and layer costs, and search schedules fitted to that, too. "
        "Takes up to 18 clips more, most of whose attention is dense.",
        "--fit",
        panel=BUDGET,
    )
    journal: str | os.PathLike[str] | None = None
    tell: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.prompts, str):
            raise SettingError(f"prompts must be a list, such as ['{self.prompts}']")
        for prompt in self.prompts:
            if not isinstance(prompt, str) or not prompt.strip():
                raise SettingError(f"each prompt must be a text, got {prompt!r}")
        if len(set(self.prompts)) < len(self.prompts):
            raise SettingError("each prompt is measured once, and one stands there twice")
        if self.prompt is not None and self.prompts:
            raise SettingError("prompt and prompts were given; give all as prompts")
        if (self.psnr is None) == (self.speedup is None):
            many = "not both" if self.psnr is not None else "as in --psnr 32 or --speedup 2.5"
            raise SettingError(f"a budget is a PSNR to reach or a speed-up, {many}")
        if self.time_by not in TIME_BY:
            raise SettingError(
                f"time-by must be one of {', '.join(TIME_BY)}, got '{self.time_by}'"
                f"{did_you_mean(self.time_by, TIME_BY)}"
            )

    def say(self, sentence: str) -> None:
        """Call `tell`, if there is one."""
        if self.tell is not None:
            self.tell(sentence)
