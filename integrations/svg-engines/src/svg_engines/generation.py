"""What engines have in common: the memory of one generation, and reasons that are said once."""

from __future__ import annotations

import logging
import math
from collections import Counter

from torch import Tensor

from svg_attention import Call, CallRecord, Method, Schedule, Session, TokenLayout
from svg_engines.settings import Settings


class Reasons:
    """Log each sentence once.

    Args:
        engine: name of the engine, which stands before each sentence.
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._logger = logging.getLogger(f"svg_engines.{engine}")
        self.said: list[str] = []

    def __call__(self, sentence: str) -> None:
        """Log a sentence unless it was logged before."""
        if sentence not in self.said:
            self.said.append(sentence)
            self._logger.warning("Sparse VideoGen in %s: %s", self._engine, sentence)

    def forget(self) -> None:
        """Say everything again from now on."""
        self.said.clear()


class Generation:
    """Make the self-attention calls of one generation sparse, or say why they stay dense.

    The engine keeps one for each generation it runs and drops it at the end; there is no other
    memory. Method and schedule are chosen at the first call, when steps and tokens are known.

    Args:
        settings: what was asked for.
        reasons: where it is said why calls stay dense.
    """

    def __init__(self, settings: Settings, reasons: Reasons) -> None:
        self.settings = settings
        self.reasons = reasons
        self._sessions: dict[int | None, tuple[Session, Schedule] | None] = {}
        self._levels: list[float] = []
        self._calls: Counter[tuple[int | float | None, str, int]] = Counter()

    def step_of(self, level: float) -> int:
        """Return which step a noise level is, for engines that number none.

        Levels fall from step to step; one that was there before is that step.
        """
        if level not in self._levels:
            self._levels.append(level)
        return self._levels.index(level)

    def branch(self, step: int | float | None, transformer: str, layer: int) -> str:
        """Return the guidance branch of a call, for engines that do not name it.

        Branches are called one after the other in each step, so the number of the call is the name.
        A branch that an engine's cache skips takes the centroids of the other one as a start: a
        start decides how fast k-means settles, not what is right.
        """
        place = (step, transformer, layer)
        self._calls[place] += 1
        return f"branch {self._calls[place] - 1}"

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: TokenLayout,
        step: int | None,
        num_steps: int | None,
        layer: int,
        branch: str = "cond",
        transformer: str = "transformer",
        progress: float | None = None,
        text_lengths: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor | None:
        """Compute one self-attention call sparsely, or return None for the engine to do it.

        Args:
            query: `[B, H, S, D]`.
            key: `[B, H, S, D]`.
            value: `[B, H, S, D]`.
            layout: where the video and text tokens are.
            step: denoising step from 0; None when unknown.
            num_steps: denoising steps; None when unknown.
            layer: self-attention layer from 0.
            branch: guidance branch.
            transformer: which transformer, where there are two.
            progress: share of the sampling that is done, in place of `step / num_steps`.
            text_lengths: integers `[B]` on the device, valid text tokens; None for all.
            scale: factor of the logits, `D ** -0.5` when None.

        Returns:
            Tensor shaped and typed as `query`; None where the call stays dense. Unless a schedule
            says so, the reason was logged.
        """
        reason = self._unsuited(query, key, value, layout, step)
        chosen = None
        if reason is None:
            chosen = self._session(num_steps)
            if chosen is None:
                reason = (
                    f"{num_steps} steps are few; name a preset or a density to run them sparsely"
                )
        if reason is not None or chosen is None or step is None:
            self.reasons(f"{reason}; such calls stay dense")
            return None
        session, schedule = chosen
        dense = self._scheduled(schedule, step, num_steps, progress)
        if dense is None:
            self.reasons(
                "the engine does not say how many steps there are; set start_step, the first step "
                "that is sparse; until then calls stay dense"
            )
            return None
        if dense or layer in self.settings.dense_layers:
            return None
        call = Call(
            step=step,
            num_steps=num_steps,
            layer=layer,
            num_layers=layer + 1,
            branch=branch,
            transformer=transformer,
        )
        return session.attend(
            query, key, value, call=call, layout=layout, text_lengths=text_lengths, scale=scale
        )

    def records(self) -> list[CallRecord]:
        """Return one record per sparse call; waits for the device."""
        return [
            record
            for chosen in self._sessions.values()
            if chosen is not None
            for record in chosen[0].records()
        ]

    def _unsuited(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, step: int | None
    ) -> str | None:
        """Return why a call cannot be sparse at all, or None."""
        if not query.shape == key.shape == value.shape:
            return (
                f"queries {tuple(query.shape)}, keys {tuple(key.shape)} and values "
                f"{tuple(value.shape)} differ in shape"
            )
        tokens = query.shape[2]
        if tokens != layout.tokens:
            return (
                f"{tokens} tokens are not the {layout.tokens} of a video of {layout.grid} with "
                f"{layout.text_tokens} of text"
            )
        if tokens < self.settings.min_tokens:
            return f"{tokens} tokens are fewer than min_tokens={self.settings.min_tokens}"
        if not query.is_floating_point() or query.element_size() not in (2, 4):
            return f"attention in {query.dtype} is not supported"
        if query.dtype != key.dtype or query.dtype != value.dtype:
            return f"dtypes {query.dtype}, {key.dtype} and {value.dtype} differ"
        return "the engine does not say which step this is" if step is None else None

    def _session(self, num_steps: int | None) -> tuple[Session, Schedule] | None:
        """Return the session for so many steps, and which of them are dense."""
        if num_steps not in self._sessions:
            chosen = self.settings.choose(num_steps=num_steps)
            self._sessions[num_steps] = None if chosen is None else self._start(*chosen)
        return self._sessions[num_steps]

    def _start(self, method: Method, schedule: Schedule) -> tuple[Session, Schedule]:
        if schedule.layer_factors is not None:
            self.reasons(
                "the engine does not say how many layers there are, so all have one density, where "
                "the schedule asks for factors by layer"
            )
        never = Schedule(dense_steps=0.0, dense_layers=0.0, density=schedule.density)
        session = Session(method, never, backend=self.settings.backend, seed=self.settings.seed)
        return session, schedule

    def _scheduled(
        self, schedule: Schedule, step: int, num_steps: int | None, progress: float | None
    ) -> bool | None:
        """Return whether a step stays dense; None if that cannot be said."""
        asked = self.settings
        share = schedule.dense_steps if asked.dense_steps is None else asked.dense_steps
        if asked.end_steps and (num_steps is None or step >= num_steps - asked.end_steps):
            return None if num_steps is None else True
        if asked.start_step is not None:
            return step < asked.start_step
        if progress is not None:
            return progress < share or progress > asked.end
        if num_steps is None:
            return None if share > 0.0 else False
        return step < math.floor(share * num_steps) or step > asked.end * num_steps
