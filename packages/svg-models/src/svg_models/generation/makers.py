"""Who makes the clips of a batch: this process, or processes on several GPUs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeGuard

from svg_models.errors import (
    LostRankError,
    MachineError,
    ModelUnavailableError,
    SettingError,
    SvgModelsError,
    first_line,
)
from svg_models.generation.batch import BatchClip
from svg_models.generation.ranks import clip_maker, places_of
from svg_models.generation.request import GenerateRequest
from svg_models.launch import Finished, Group, finished

if TYPE_CHECKING:
    from svg_models.generation.clip import Clip
    from svg_models.loading import Progress

__all__ = ["Reports", "check_groups", "concerns_all", "groups_of", "make_here", "make_on_groups"]

Reports = Callable[[BatchClip, int], "Progress"]
"""Returns what hears how far a clip is, given who makes it, from 0."""


def make_here(
    clips: Sequence[BatchClip], reports: Reports
) -> Iterator[tuple[BatchClip, Clip | SvgModelsError]]:
    """Make clips one after the other, with a model that is loaded once; see `batch.Makers`.

    Raises:
        SvgModelsError: if the model cannot be loaded.
    """
    from svg_models.generation.generate import generate
    from svg_models.generation.sample import prepare

    first = clips[0].request.replace(progress=reports(clips[0], 0))
    loaded, _, _ = prepare(first, first.spec)
    for clip in clips:
        wanted = clip.request.with_model(loaded).replace(progress=reports(clip, 0))
        found: Clip | SvgModelsError
        try:
            found = generate(**vars(wanted))
        except SvgModelsError as error:
            found = error
        yield clip, found


def check_groups(gpus: int, per_clip: int) -> None:
    """Refuse GPUs that cannot be dealt in groups.

    Raises:
        SettingError: says so.
    """
    if gpus % per_clip:
        raise SettingError(
            f"{gpus} GPUs cannot be dealt in groups of {per_clip}; make --gpus a multiple of "
            "--gpus-per-clip"
        )


def groups_of(request: GenerateRequest, per_clip: int) -> list[Group]:
    """Return the groups of processes that make clips side by side, none of them started.

    Args:
        request: says how many GPUs there are for all.
        per_clip: how many make one clip together; divides them.

    Raises:
        MachineError: if there are fewer GPUs than were asked for.
    """
    places = places_of(request)
    return [
        Group(places[first : first + per_clip], clip_maker)
        for first in range(0, len(places), per_clip)
    ]


def make_on_groups(
    clips: Sequence[BatchClip], groups: Sequence[Group], reports: Reports
) -> Iterator[tuple[BatchClip, Clip | SvgModelsError]]:
    """Make clips side by side, each group with a model that it loads once; see `batch.Makers`.

    The clip of a group that loses a process is made by another one, once. A group that fails again
    before it has made a clip gets no more.

    Args:
        clips: to make.
        groups: of processes that run `ranks.clip_maker`; the caller closes them.
        reports: who hears of a clip, by the number of its group.

    Raises:
        ModelUnavailableError, MachineError: if the first clip finds no model, or one that is too
            large.
    """
    return _SideBySide(clips, groups, reports).run()


class _SideBySide:
    def __init__(
        self, clips: Sequence[BatchClip], groups: Sequence[Group], reports: Reports
    ) -> None:
        self._waiting, self._groups, self._reports = deque(clips), list(groups), reports
        self._running: dict[int, BatchClip] = {}
        self._lost_by: dict[str, int] = {}  # name of a clip -> number of the group
        self._doubtful: set[int] = set()  # lost a process, and have made no clip since
        self._retired: set[int] = set()

    def run(self) -> Iterator[tuple[BatchClip, Clip | SvgModelsError]]:
        proven = False
        self._feed()
        for group, result in finished(self._groups):
            number = self._groups.index(group)
            clip = self._running.pop(number)
            again = self._judge(number, clip, result)
            self._feed()  # before the clip is written, which takes seconds
            if again:
                continue
            if not proven and concerns_all(result.error):
                raise result.error
            proven = proven or result.error is None
            yield clip, _worded(result)
        for clip in self._waiting:
            yield clip, MachineError("no GPU is left whose process does not end by itself")

    def _judge(self, number: int, clip: BatchClip, result: Finished) -> bool:
        """Draw conclusions from a result; return whether the clip is to be made again."""
        if result.error is None:
            self._doubtful.discard(number)
            return False
        if not isinstance(result.error, SvgModelsError):
            self._groups[number].close()  # who knows what the next clip would find there
        suspect = number in self._doubtful
        lost = isinstance(result.error, LostRankError)
        if suspect:
            self._retired.add(number)
            self._groups[number].close()
        elif lost:
            self._doubtful.add(number)
        if not (lost or suspect) or clip.name in self._lost_by:
            return False
        self._lost_by[clip.name] = number
        self._waiting.appendleft(clip)
        return True

    def _feed(self) -> None:
        """Give each group that is free a clip, if possible one that it has not lost."""
        for number, group in enumerate(self._groups):
            if group.busy or number in self._retired:
                continue
            alone = len(self._groups) - len(self._retired) == 1
            for clip in self._waiting:
                if alone or self._lost_by.get(clip.name) != number:
                    self._waiting.remove(clip)
                    self._running[number] = clip
                    group.send(clip.request.replace(progress=None), self._reports(clip, number))
                    break


def concerns_all(found: object) -> TypeGuard[SvgModelsError]:
    """Return whether what became of the first clip will become of all."""
    kinds = (ModelUnavailableError, MachineError)
    return isinstance(found, kinds) and not isinstance(found, LostRankError)


def _worded(result: Finished) -> Clip | SvgModelsError:
    error = result.error
    if error is None:
        clip: Clip = result.value
        return clip
    if isinstance(error, SvgModelsError):
        return error
    if reasons := getattr(error, "reasons", None):  # UnsupportedError of svg_attention
        return MachineError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    return MachineError(f"{type(error).__name__}: {first_line(error)}")
