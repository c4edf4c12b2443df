"""Time a forward pass of real transformers on 1, 2 and 4 GPUs: as diffusers has them, and sparse.

    python benchmarks/bench_gpus.py run --gpus 4 --output benchmarks/results/h100/gpus.json
    python benchmarks/bench_gpus.py table --gpu h100
    python benchmarks/bench_gpus.py run --gpus 2 --ways svg2 --output two.json    # ring on two, too
    python benchmarks/bench_gpus.py run --gpus 2 --ways '^svg2$' 'svg2, exch' --output how.json
    python benchmarks/bench_gpus.py run --gpus 2 --tiny --output tiny.json    # two processes, a CPU

It starts a process for each GPU. Models, inputs and settings are those of `bench_models.py`. Each
way is first checked against the same way on one GPU, then all are timed in turns; a time is that of
the slowest rank. A guided step is two forward passes, of both branches. What was found is stored
after each way. Heads of the skewed rows differ in cost, as their queries are scaled by
`SKEW`, most of it first.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from _harness import (
    RESULTS,
    ROOT,
    at_least,
    conditions,
    environment,
    load,
    named,
    replace_between,
    store,
    summary,
    table,
)
from _model_subjects import SUBJECTS, TINY, Subject
from bench_models import DENSITY, EVERY_STEP, build, forwards, make_inputs
from torch import Tensor, nn

from svg_attention import SVG2, Arrivals, Dense
from svg_models import attention_op, copies, parallelize, sparsify
from svg_models.parallel import SharedRun, direct, ulysses
from svg_models.parallel.share import Share

PAGE = ROOT / "docs" / "guide" / "several-gpus.md"
STOCK = "diffusers' attention"
SPARSE, GUIDED, SKEWED = "SVG2", "SVG2, guided", "SVG2 by top_p, skewed heads as numbered"
# Factors of the queries of the first head and of the last: dealt by their numbers, a rank of two
# has about 1.3 times the mean.
SKEW = (1.0, 12.0)
# Whose exchanges are timed in a row, so that the GPU need not wait for the host.
LAYERS = 10
LAYER_COUNTS = ("num_layers", "num_single_layers")
# Stored runs that the page shows, the oldest first.
RUNS = ("gpus", "gpus_four", "gpus_whole", "gpus_guided", "gpus_hunyuan")
# Of GPUs that are timed, as far as there are so many.
NUMBERS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to compute a forward pass on several GPUs.

    Attributes:
        name: for people.
        method: of `sparsify`, given the subject; None leaves the model's own attention.
        share: makes a model share its forward pass with the ranks of a group for a while; gives the
            model to call, if it is another.
        one: the way on one GPU that its result and its time are held against.
        suits: whether it is for a model and a number of GPUs.
        guided: whether it is timed by guided steps.
        close: how far it may be from one GPU.
        skewed: whether heads cost differently.
    """

    name: str
    method: Callable[[Subject], Any]
    share: Callable[[Any, Any], AbstractContextManager[Any]]
    one: str
    suits: Callable[[Any, int], bool] = lambda model, gpus: True
    guided: bool = False
    close: float = 5e-2
    skewed: bool = False


def shared(model: Any, team: Any, **settings: Any) -> AbstractContextManager[Any]:
    """Share the sequence by `parallelize`; on one GPU it stays whole."""
    if team is None:
        return nullcontext()
    return parallelize(model, group=team, **{"exchange": "auto"} | settings)


def ring(model: Any, team: Any) -> AbstractContextManager[Any]:
    """Have keys and values travel by `parallelize`; no heads are exchanged."""
    return parallelize(model, ring=dist.get_world_size(team), ulysses=1, guidance=1, group=team)


class AtOnce(Arrivals):
    """Tensors on their way, which are waited for before anything else begins."""

    def __init__(self, give: Callable[[Tensor], None], /, **pending: Callable[[], None]) -> None:
        super().__init__(give, **pending)
        self.wait()


@contextmanager
def shared_at_once(model: Any, team: Any, **settings: Any) -> Iterator[Any]:
    """Share by `parallelize`, and wait for keys and values before anything else begins."""
    with mock.patch.object(ulysses, "Arrivals", AtOnce), shared(model, team, **settings) as run:
        yield run


@contextmanager
def shared_without_engines(model: Any, team: Any) -> Iterator[Any]:
    """Share by `parallelize`, and write to other GPUs by a kernel alone."""

    # No Mock: it would keep the tensors of every call.
    def refuse(target: Tensor, source: Tensor) -> bool:
        return False

    with mock.patch.object(copies, "copy_by_engine", refuse), shared(model, team) as run:
        yield run


@contextmanager
def shared_with_values(model: Any, team: Any) -> Iterator[Any]:
    """Share by `parallelize`, and send nothing before values are computed, too."""

    def begin(query: Tensor, key: Tensor, handle: Tensor) -> None:
        return None

    with mock.patch.object(attention_op, "begin", begin), shared(model, team) as run:
        yield run


@contextmanager
def shared_by_diffusers(model: Any, team: Any) -> Iterator[Any]:
    """Give a copy that diffusers itself shares, which it cannot undo."""
    from diffusers import ContextParallelConfig

    copied = copy.deepcopy(model)
    config = ContextParallelConfig(ulysses_degree=dist.get_world_size(team))
    copied.enable_parallelism(config=config)
    yield copied


def diffusers_shares(model: Any, gpus: int) -> bool:
    """Return whether diffusers has a plan for a model."""
    planned = type(model)._cp_plan is not None and torch.cuda.is_available()
    return planned and everyone(gpus)


def everyone(gpus: int) -> bool:
    """Return whether no rank is idle: a way may make groups of ranks, for which torch wants all."""
    return gpus > 1 and gpus == dist.get_world_size()


def several(model: Any, gpus: int) -> bool:
    """Return whether there is more than one GPU, of which a way is a matter."""
    return gpus > 1


def is_guided(model: Any, gpus: int) -> bool:
    """Return whether a model has two branches of guidance; HunyuanVideo is told its scale."""
    return not getattr(model.config, "guidance_embeds", False)


def has_scales_by_head(model: Any, gpus: int) -> bool:
    """Return whether the norm of the queries has a weight for each channel of each head."""
    return "Wan" in type(model).__name__


@contextmanager
def skewed_heads(model: Any) -> Iterator[None]:
    """Scale the queries of each head for a while, so that they read more or less by `top_p`."""
    heads, norms = model.config.num_attention_heads, []
    for block in model.blocks:
        norms.append((block.attn1.norm_q.weight, block.attn1.norm_q.weight.clone()))
    factors = torch.linspace(*SKEW, heads, device=norms[0][0].device)
    for weight, plain in norms:
        weight.copy_((plain.unflatten(0, (heads, -1)) * factors[:, None]).flatten())
    try:
        yield
    finally:
        for weight, plain in norms:
            weight.copy_(plain)


def svg2(subject: Subject) -> SVG2:
    """Return the method of the sparse rows."""
    queries, keys = subject.clusters
    return SVG2(q_clusters=queries, k_clusters=keys, density=DENSITY)


def by_top_p(subject: Subject) -> SVG2:
    """Return a method by which each head reads what it needs."""
    queries, keys = subject.clusters
    return SVG2(q_clusters=queries, k_clusters=keys, top_p=0.9)


# Relative distances in bf16: rounding of sums in another order, and of plans made from them.
WAYS = (
    Way(name=STOCK, method=lambda subject: None, share=shared, one=STOCK, close=2e-2),
    Way(
        name="dense steps",
        method=lambda subject: Dense(),
        share=shared,
        one="dense steps",
        close=2e-2,
    ),
    Way(name=SPARSE, method=svg2, share=shared, one=SPARSE),
    *(
        Way(name=f"SVG2, {how}", method=svg2, share=share, one=SPARSE, suits=several)
        for how, share in (
            ("exchanges waited for at once", shared_at_once),
            ("exchanged by a kernel", shared_without_engines),
            ("exchanged by NCCL", partial(shared, exchange="collective")),
            ("exchanged with the values", shared_with_values),
        )
    ),
    Way(
        name="diffusers' own Ulysses",
        method=lambda subject: None,
        share=shared_by_diffusers,
        one=STOCK,
        suits=diffusers_shares,
        close=2e-2,
    ),
    Way(name=GUIDED, method=svg2, share=shared, one=GUIDED, suits=is_guided, guided=True),
    Way(
        name="SVG2, guided, a team for each branch",
        method=svg2,
        share=partial(shared, guidance=2),
        one=GUIDED,
        suits=lambda model, gpus: everyone(gpus) and is_guided(model, gpus),
        guided=True,
        close=1e-1,
    ),
    Way(
        name="dense steps, ring",
        method=lambda subject: Dense(),
        share=ring,
        one="dense steps",
        suits=lambda model, gpus: everyone(gpus),
        close=2e-2,
    ),
    # Each rank of a ring chooses for its own tiles what they read, so plans are others.
    Way(
        name="SVG2, ring",
        method=svg2,
        share=ring,
        one=SPARSE,
        suits=lambda model, gpus: everyone(gpus),
        close=float("inf"),
    ),
    Way(
        name=SKEWED,
        method=by_top_p,
        share=partial(shared, balance=False),
        one=SKEWED,
        suits=has_scales_by_head,
        close=1e-1,
        skewed=True,
    ),
    Way(
        name="SVG2 by top_p, skewed heads dealt by cost",
        method=by_top_p,
        share=shared,
        one=SKEWED,
        suits=lambda model, gpus: several(model, gpus) and has_scales_by_head(model, gpus),
        close=1e-1,
        skewed=True,
    ),
)


class Member:
    """One of the processes, and what it has of the measurement.

    Args:
        subject: what is timed.
        device: "cuda" or "cpu".
        counts: numbers of GPUs.
        teams: the ranks of each number of GPUs above 1 that this one is among.
        control: a group over gloo, by which ranks wait that have nothing to do.

    Attributes:
        seconds: that its last turn took.
    """

    def __init__(
        self,
        subject: Subject,
        device: str,
        counts: Sequence[int],
        teams: Mapping[int, Any],
        control: Any,
    ) -> None:
        self.subject, self.device, self.counts = subject, device, counts
        self.teams, self.control = teams, control
        self.model = build(subject, device)
        torch.manual_seed(1)
        self.inputs = make_inputs(subject, subject.latents[1:], device)
        self.times: dict[str, dict[int, list[float]]] = {}
        self.distance: dict[str, dict[int, float]] = {}
        self.exchange: dict[str, dict[int, float]] = {}
        self.exchanged: dict[str, dict[int, str]] = {}
        self.density: dict[str, float] = {}
        self.seconds = 0.0
        self.imbalance: dict[str, dict[int, list[float]]] = {}
        self._alone: dict[str, Tensor] = {}

    def take(self, way: Way, gpus: int, *, samples: int, warmup: int) -> None:
        """Time forward passes of one way, and hold the last one before against one GPU.

        Where two ranks are timed, others do the same in pairs of their own.
        """
        dist.barrier(self.control)
        team = self.teams.get(gpus)
        if team is None and dist.get_rank():
            return
        method = way.method(self.subject)
        with ExitStack() as stack:
            if way.skewed:
                stack.enter_context(skewed_heads(self.model))
            given = stack.enter_context(way.share(self.model, team))
            model = given if isinstance(given, nn.Module) else self.model
            if method is not None:
                run = stack.enter_context(sparsify(model, method, EVERY_STEP))
            forward = self._guided(model) if way.guided else forwards(model, self.inputs)
            for _ in range(warmup):
                out = forward()
            self._hold(way, gpus, out)
            times = [self._time(forward, team) for _ in range(samples)]
            if isinstance(given, SharedRun):
                self.exchanged.setdefault(way.name, {})[gpus] = given.exchange
            if method is not None:
                stats = run.stats()
                self.density[way.name] = stats.mean_density_with_dense_calls
                if way.skewed and gpus > 1:
                    by_step = [round(one, 3) for one in stats.imbalance_by_step.values()]
                    self.imbalance.setdefault(way.name, {})[gpus] = by_step
        self.times.setdefault(way.name, {}).setdefault(gpus, []).extend(times)

    def _guided(self, model: Any) -> Callable[[], Tensor]:
        """Return a function that makes both passes of one denoising step after the other."""
        steps = itertools.count()
        other = {"encoder_hidden_states": self.inputs["encoder_hidden_states"].flip(1)}

        def forward() -> Tensor:
            moment = dict(step_index=next(steps), num_inference_steps=1000)
            # A pipeline makes a timestep of its own for each step, and one for both passes.
            inputs = self.inputs | {"timestep": self.inputs["timestep"].clone()}
            made = []
            for branch, given in (("cond", inputs), ("uncond", inputs | other)):
                with torch.no_grad(), model.cache_context(branch, **moment):
                    made.append(model(**given)[0])
            return torch.stack(made)

        return forward

    def _hold(self, way: Way, gpus: int, out: Tensor) -> None:
        """Keep what one GPU makes, and measure how far from it others are."""
        if dist.get_rank():
            return
        if not torch.isfinite(out).all():
            raise RuntimeError(f"{self.subject.name}, {way.name}, {gpus} GPUs: not finite")
        if gpus == 1:
            self._alone.setdefault(way.name, out)
        elif way.one in self._alone:
            one = self._alone[way.one].float()
            found = ((out.float() - one).norm() / one.norm()).item()
            self.distance.setdefault(way.name, {})[gpus] = found
            if not found <= way.close:
                raise RuntimeError(
                    f"{self.subject.name}, {way.name}: {gpus} GPUs are {found:.2e} from one"
                )

    def _time(self, forward: Callable[[], Any], team: Any) -> float:
        """Return milliseconds until the slowest rank has its output."""
        self._meet(team)
        start = time.perf_counter()
        forward()
        self._meet(team)
        return 1e3 * (time.perf_counter() - start)

    def _meet(self, team: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        if team is not None:
            dist.barrier(team)
            if self.device == "cuda":
                torch.cuda.synchronize()

    def time_exchange(self, gpus: int, *, samples: int) -> None:
        """Time what a layer exchanges, without its attention."""
        dist.barrier(self.control)
        if self.teams[gpus] is None:
            return
        config, text = self.model.config, self.subject.text[0] if self.subject.pooled else 0
        team = self.teams[gpus]
        share = Share.of(team, self.subject.tokens)
        local = share.sizes[share.rank] + text
        shape = (1, local, config.num_attention_heads, config.attention_head_dim)
        with torch.device(self.device):
            by_token = torch.randn(shape, dtype=torch.bfloat16)
            by_head = by_token.transpose(1, 2).contiguous().transpose(1, 2)
        position: Any = "last" if text else None

        def values(q: Tensor, k: Tensor, v: Tensor, arrivals: Arrivals) -> Tensor:
            arrivals.wait()
            return v

        for name, written in (("collective", None), ("direct", direct.Direct(team))):
            exchange = partial(
                ulysses.attend_over_ranks,
                replace(share, direct=written),
                *(by_head, by_head, by_token, values),
                text_position=position,
            )

            def several(exchange: Callable[[], Tensor] = exchange) -> None:
                for _ in range(LAYERS):
                    exchange()

            several()
            if written is not None and written.refusal:
                continue
            times = [self._time(several, team) / LAYERS for _ in range(samples)]
            self.exchange.setdefault(name, {})[gpus] = summary(times)["median"]

    def result(self) -> dict[str, Any]:
        """Return what was found so far, as plain data."""
        return {
            "name": self.subject.name,
            "tokens": self.subject.tokens,
            "layers": self.subject.layers,
            "ms_per_forward": {
                name: {str(gpus): summary(times) for gpus, times in found.items()}
                for name, found in self.times.items()
            },
            "samples": {
                name: {str(gpus): len(times) for gpus, times in found.items()}
                for name, found in self.times.items()
            },
            "held_against": {way.name: way.one for way in WAYS},
            "distance_to_one_gpu": self.distance,
            "ms_of_exchange_per_layer": self.exchange.get("collective", {}),
            "ms_of_direct_exchange_per_layer": self.exchange.get("direct", {}),
            "exchanged": self.exchanged,
            "density": self.density,
            "imbalance_by_step": self.imbalance,
        }


def toys(gpus: int) -> list[Subject]:
    """Return toy models with a head for each process."""
    heads = {"num_attention_heads": max(2, gpus)}
    return [replace(toy, config={**toy.config, **heads}) for toy in TINY]


def deeper(subject: Subject, layers: int | None) -> Subject:
    """Return a model with so many layers; what is computed once a forward pass weighs less then."""
    if layers is None:
        return subject
    config = {
        name: count * layers // subject.layers if name in LAYER_COUNTS else count
        for name, count in subject.config.items()
    }
    return replace(subject, config=config, layers=sum(config.get(n, 0) for n in LAYER_COUNTS))


def numbers(args: argparse.Namespace) -> list[int]:
    """Return on how many GPUs is timed.

    Raises:
        SystemExit: if there are too few for a chosen number.
    """
    found = [n for n in NUMBERS if n <= args.gpus]
    if unknown := set(args.on).difference(found):
        raise SystemExit(f"cannot time {min(unknown)} of {args.gpus} GPUs; choose among {found}")
    return [n for n in found if not args.on or n in args.on]


def asked(args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Return the models and the ways that the command line names, see `named`."""
    subjects = toys(args.gpus) if args.tiny else SUBJECTS
    models = named("model", [subject.name for subject in subjects], args.models)
    ways = named("way", [way.name for way in WAYS], args.ways)
    return [s for s in subjects if s.name in models], [way for way in WAYS if way.name in ways]


def measure(args: argparse.Namespace, control: Any, teams: Mapping[int, Any]) -> None:
    """Time all subjects, as far as the seconds last; the first rank stores after each round."""
    began, rank = time.perf_counter(), dist.get_rank()
    device = "cpu" if args.tiny else "cuda"
    counts = numbers(args)
    alone = args.tiny or rank
    result: dict[str, Any] = {} if alone else {"environment": environment(args.commit)}
    result |= {"density": DENSITY, "gpus": args.gpus, "models": []}
    chosen, ways = asked(args)
    subjects = [deeper(subject, args.layers) for subject in chosen]
    members: list[Member] = []

    def say(text: str) -> None:
        if rank == 0:
            print(f"{time.perf_counter() - began:6.1f} s  {text}", flush=True)

    def save() -> None:
        if rank == 0:
            result["models"] = [member.result() for member in members]
            store(args.output, result)

    def turn(member: Member, first: bool) -> None:
        for way in ways:
            for gpus in counts:
                if not way.suits(member.model, gpus):
                    continue
                # Each way starts from nothing: twice, and a forward pass is as all later ones.
                member.take(way, gpus, samples=args.samples, warmup=2)
                if rank == 0:
                    layer = member.times[way.name][gpus][-args.samples :]
                    ms = [round(t / member.subject.layers, 1) for t in layer]
                    how = member.exchanged.get(way.name, {}).get(gpus, "")
                    say(f"{member.subject.name}: {way.name}, on {gpus}: {ms} ms a layer {how}")
            save()
        if first:
            for gpus in teams:
                member.time_exchange(gpus, samples=5)
                alone = {name: found.get(gpus) for name, found in member.exchange.items()}
                say(f"{member.subject.name}: the exchange of a layer alone, on {gpus}: {alone} ms")
            save()

    def is_late(member: Member) -> bool:
        """Return whether another turn would end too late, as the first rank sees it."""
        late = torch.tensor([time.perf_counter() - began + member.seconds > args.seconds])
        dist.broadcast(late, 0, group=control)
        return bool(late)

    # All have their first turn before the first has its second, for which time may not last.
    for number in range(args.rounds):
        for place, subject in enumerate(subjects):
            if number == 0:
                members.append(Member(subject, device, counts, teams, control))
                say(f"{subject.name}: built")
            elif is_late(members[place]):
                say(f"{subject.name}: {number} of {args.rounds} rounds, for lack of time")
                return
            started = time.perf_counter()
            turn(members[place], first=number == 0)
            members[place].seconds = time.perf_counter() - started
    say("done")


def member(rank: int, args: argparse.Namespace, port: int) -> None:
    """Be one of the processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NCCL_NVLS_ENABLE": "0"}
    torch.set_num_threads(1 if args.tiny else torch.get_num_threads())
    if not args.tiny:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if args.tiny else "nccl",
        rank=rank,
        world_size=args.gpus,
        timeout=datetime.timedelta(seconds=180),
    )
    control = dist.new_group(backend="gloo")
    teams = {n: team_of(rank, args.gpus, n) for n in numbers(args) if n > 1}
    try:
        measure(args, control, teams)
    except BaseException:  # noqa: BLE001 - others wait for this rank; who started them ends them
        traceback.print_exc()
        os._exit(1)
    dist.barrier(control)
    dist.destroy_process_group()


def team_of(rank: int, ranks: int, size: int) -> Any:
    """Return the group of a rank among groups of a size, which all have to ask for.

    Every rank is in one, if there are enough. So all make memory for each other equally often,
    without which they could make none together (see `svg_models.parallel.peers`).
    """
    own = None
    for first in range(0, ranks - size + 1, size):
        members = list(range(first, first + size))
        group = dist.new_group(members)
        own = group if rank in members else own
    return own


def run(args: argparse.Namespace) -> None:
    """Start the processes.

    Raises:
        SystemExit: if no model, or no way, has a chosen pattern in its name, or there are too few
            GPUs for a chosen number.
    """
    asked(args)
    numbers(args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(member, (args, port), nprocs=args.gpus)


def rows_of(model: Mapping[str, Any]) -> list[list[str]]:
    """Return the lines of one model: milliseconds a layer, and times faster than one GPU."""
    lines = []
    for name, found in model["ms_per_forward"].items():
        # Ways that were chosen by name may lack the one that they are held against.
        one = model["ms_per_forward"].get(model["held_against"][name], {}).get("1")
        cells = []
        for gpus in map(str, NUMBERS):
            ms = found.get(gpus)
            if ms is None:
                cells.append("")
                continue
            alone = gpus == "1" or one is None
            faster = "" if alone else f" ({one['median'] / ms['median']:.2f}x)"
            cells.append(f"{ms['median'] / model['layers']:.1f}{faster}")
        if any(cells):
            lines.append([model["name"], name, *cells])
    return lines


def exchange_of(model: Mapping[str, Any], way: str) -> str:
    """Return how ranks exchanged heads: "direct" or "NCCL"."""
    told = model.get("exchanged", {}).get(way, {}).values()
    return "direct" if any(how.startswith("direct") for how in told) else "NCCL"


def lines_of(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the lines of runs, the oldest first: a line is that of the newest that has it."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for model in result["models"]:
            for name, way, *cells in rows_of(model):
                far = max(model["distance_to_one_gpu"].get(way, {}).values(), default=None)
                found[name, way] = [
                    name,
                    way,
                    str(model["layers"]),
                    exchange_of(model, way),
                    *cells,
                    "" if far is None else f"{far:.1%}" if far else "0",
                    result["environment"]["commit"],
                ]
    return list(found.values())


def exchanges_of(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the lines of what a layer exchanges without its attention, of the newest run each."""
    found: dict[str, dict[str, list[str]]] = {}
    for result in results:
        for model in result["models"]:
            lines = found.setdefault(model["name"], {})
            for how, key in (("NCCL", "ms_of_exchange"), ("direct", "ms_of_direct_exchange")):
                ms = model.get(f"{key}_per_layer", {})
                if ms:
                    cells = [f"{ms[gpus]:.2f}" if gpus in ms else "" for gpus in map(str, NUMBERS)]
                    commit = result["environment"]["commit"]
                    lines[how] = [model["name"], how, *cells, commit]
    return [line for lines in found.values() for line in lines.values()]


def filled(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table without the columns that no line fills."""
    kept = [n for n in range(len(head)) if any(line[n] for line in lines)]
    return table([head[n] for n in kept], [[line[n] for n in kept] for line in lines])


def written(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables, of runs from the oldest to the newest."""
    numbers = [f"{n} GPU{'s' * (n > 1)}" for n in NUMBERS]
    head = ["model", "attention", "layers", "exchange", *numbers, "off one GPU", "commit"]
    text = "Milliseconds a layer, and how many times faster than the same on one GPU:\n\n"
    text += filled(head, lines_of(results))
    if alone := exchanges_of(results):
        text += "\nThe exchange of a layer alone, milliseconds:\n\n"
        text += filled(["model", "exchange", *numbers, "commit"], alone)
    return text + "".join(map(written_imbalance, results))


def written_imbalance(result: Mapping[str, Any]) -> str:
    """Return the table of how unequal ranks are where heads cost differently."""
    lines = [
        [model["name"], name, gpus, f"{steps[0]:.2f}", f"{max(steps[1:]):.2f}"]
        for model in result["models"]
        for name, found in model["imbalance_by_step"].items()
        for gpus, steps in found.items()
    ]
    if not lines:
        return ""
    head = ["model", "attention", "GPUs", "first step", "later steps, at most"]
    text = "\nPairs computed by the busiest GPU over the mean, of heads that cost differently:\n\n"
    return text + table(head, lines)


def write_table(args: argparse.Namespace) -> None:
    """Write the stored numbers into the page about several GPUs."""
    later = [name for name in RUNS[1:] if (RESULTS / args.gpu / f"{name}.json").exists()]
    results = [load(args.gpu, name) for name in (RUNS[0], *later)]
    machine = conditions(results[-1]["environment"] | {"commit": "of each line as listed"})
    replace_between(PAGE, "gpus", f"{written(results)}\n{machine}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time transformers on several GPUs.")
    commands = parser.add_subparsers(required=True)
    timed = commands.add_parser("run", help="start a process for each GPU and time")
    timed.add_argument("--gpus", type=at_least(1), default=torch.cuda.device_count() or 2)
    timed.add_argument("--on", nargs="*", type=at_least(1), default=[], help="only on so many GPUs")
    timed.add_argument("--output", type=Path, required=True, help="JSON file to write")
    timed.add_argument("--models", nargs="*", default=[], help="patterns of their names")
    timed.add_argument("--ways", nargs="*", default=[], help="patterns of their names")
    # Fewer than two have no quartiles.
    timed.add_argument(
        "--samples", type=at_least(2), default=3, help="forward passes in a turn, 2 or more"
    )
    timed.add_argument("--rounds", type=at_least(1), default=3, help="turns of all ways")
    timed.add_argument("--seconds", type=float, default=120.0, help="that no further turn exceeds")
    timed.add_argument("--layers", type=at_least(1), help="of each model; by default a few")
    timed.add_argument("--commit", help="of the code, where it is no repository")
    timed.add_argument("--tiny", action="store_true", help="toy models, on the CPU")
    timed.set_defaults(do=run)
    shown = commands.add_parser("table", help="write the stored numbers into the documentation")
    shown.add_argument("--gpu", default="h100")
    shown.set_defaults(do=write_table)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
