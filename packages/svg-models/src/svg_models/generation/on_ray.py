"""Clips of a batch on the machines of a Ray cluster.

Ray places the workers, starts them again and tries their tasks again.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any

from svg_models.errors import MachineError, SettingError, SvgModelsError, first_line
from svg_models.generation.batch import BatchClip
from svg_models.generation.makers import Reports, concerns_all
from svg_models.generation.ranks import clip_maker, places_of
from svg_models.generation.request import GenerateRequest
from svg_models.launch import Group, Rank

if TYPE_CHECKING:
    from svg_models.generation.clip import Clip

__all__ = ["make_on_ray", "ray_cluster"]


class ClipWorker:
    """A process of the cluster that loads the model once and makes clips.

    Args:
        per_clip: how many GPUs it has; each is used by a process of its own if there are several.
    """

    def __init__(self, per_clip: int) -> None:
        self._per_clip = per_clip
        self._group: Group | None = None
        rank = Rank(number=0, size=1, store_port=0, send=lambda kind, value: None, terminal=2)
        self._alone = clip_maker(rank)

    def make(self, request: GenerateRequest) -> Clip | SvgModelsError | None:
        """Return a clip, or why it could not be made."""
        try:
            if self._per_clip == 1:
                return self._alone(request)
            shared = request.replace(gpus=self._per_clip)
            self._group = self._group or Group(places_of(shared), clip_maker)
            clip: Clip = self._group.run(shared, lambda *_: None)
            return clip
        except SvgModelsError as error:
            return error


@contextmanager
def ray_cluster(address: str, request: GenerateRequest, per_clip: int = 1) -> Iterator[Any]:
    """Connect with a Ray cluster, and disconnect at the end.

    Args:
        address: "auto" for the one that runs on this machine, HOST:PORT, or "local" to start one
            that ends with the block.
        request: says how many GPUs, or CPUs, are wanted.
        per_clip: how many of them have to be on one machine.

    Yields:
        The module `ray`.

    Raises:
        SettingError: if Ray is not installed.
        MachineError: if the cluster cannot be reached, or is too small.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise SettingError(
            '--ray needs the package ray; pip install "svg-models[ray]", or leave it out'
        ) from error
    started: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    # Ray says on the standard output what happens to its workers, and results go there.
    with _own_signals(), redirect_stdout(sys.stderr):
        try:
            ray.init(
                address,
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
                **started,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise MachineError(
                f"there is no Ray cluster at {address} ({first_line(error)}); start one by ray "
                "start --head, or use --ray local"
            ) from error
    try:
        with redirect_stdout(sys.stderr):
            _check_room(ray.nodes(), request, per_clip)
            yield ray
    finally:
        ray.shutdown()


def _check_room(machines: Sequence[Any], request: GenerateRequest, per_clip: int) -> None:
    """Refuse what would wait for ever: Ray takes it that machines may be added.

    Raises:
        MachineError: says what there is.
    """
    kind = "CPU" if request.device == "cpu" else "GPU"
    have = [int(one["Resources"].get(kind, 0)) for one in machines if one["Alive"]]
    room = sum(number // per_clip for number in have)
    if room * per_clip < request.gpus:
        groups = f" in groups of {per_clip}" if per_clip > 1 else ""
        raise MachineError(
            f"{request.gpus} {kind}s{groups} were asked for, and the Ray cluster has "
            f"{room * per_clip}{groups}; lower --gpus, or add machines to it"
        )


def make_on_ray(
    ray: Any,
    clips: Sequence[BatchClip],
    request: GenerateRequest,
    per_clip: int,
    reports: Reports,
) -> Iterator[tuple[BatchClip, Clip | SvgModelsError]]:
    """Make clips on a cluster, see `batch.Makers`; models and files are read on its machines.

    Args:
        ray: the module, connected.
        clips: to make.
        request: says how many GPUs there are for all, and whether it is CPUs.
        per_clip: how many make one clip together.
        reports: who hears of a clip, by the number of its worker.

    Raises:
        ModelUnavailableError, MachineError: if the first clip finds no model, or one that is too
            large.
    """
    cpus, gpus = (per_clip, 0) if request.device == "cpu" else (1, per_clip)
    kind = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=1)(ClipWorker)
    workers = [kind.remote(per_clip) for _ in range(request.gpus // per_clip)]
    waiting, running, proven = deque(clips), {}, False

    def feed(number: int) -> None:
        if waiting:
            clip = waiting.popleft()
            reports(clip, number)("making", 0, 0)
            wanted = clip.request.replace(progress=None)
            running[workers[number].make.remote(wanted)] = number, clip

    for number in range(len(workers)):
        feed(number)
    while running:
        (done,), _ = ray.wait(list(running))
        number, clip = running.pop(done)
        found: Clip | SvgModelsError
        try:
            found = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            found = MachineError(f"{type(error.cause).__name__}: {first_line(error.cause)}")
        except ray.exceptions.RayError as error:
            found = MachineError(f"its worker was lost twice ({first_line(error)})")
        feed(number)
        if not proven and concerns_all(found):
            raise found
        proven = proven or not isinstance(found, SvgModelsError)
        yield clip, found


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers of signals that Ray would replace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            with suppress(TypeError):  # one that was not set from Python
                signal.signal(number, handler)
