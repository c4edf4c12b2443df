"""Running the transformers of a pipeline on several ranks."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import torch.distributed as dist
from torch import nn

from svg_attention import CallRecord, UnsupportedError
from svg_models.families import Family, family_of, transformers_of
from svg_models.parallel.crew import Crew
from svg_models.parallel.direct import Direct
from svg_models.parallel.guidance import SplitGuidance
from svg_models.parallel.share import Share
from svg_models.parallel.sharing import SharedTransformer, is_shared
from svg_models.parallel.ulysses import context_config
from svg_models.stats import RunStats

__all__ = ["SharedRun", "parallelize"]


def parallelize(
    pipe: Any,
    *,
    ulysses: int | None = None,
    ring: int = 1,
    guidance: int | None = None,
    balance: bool = True,
    exchange: Literal["auto", "direct", "collective"] = "auto",
    group: Any = None,
) -> SharedRun:
    """Have several ranks make each video together, each computing a share of its tokens.

    Every rank runs the same script with the same arguments, and gets the same video. Of a guided
    pipeline two teams of ranks compute a branch each. In a team, before each attention, ranks
    exchange their shares for whole sequences of some heads (Ulysses), so it may be dense or, with
    `sparsify` before or after this, sparse, with the plan of one GPU.

    ```python
    torch.distributed.init_process_group("nccl")            # torchrun --nproc-per-node 4 clip.py
    torch.cuda.set_device(torch.distributed.get_rank())
    pipe = WanPipeline.from_pretrained(..., torch_dtype=torch.bfloat16).to("cuda")
    svg_models.parallelize(pipe)
    with svg_models.sparsify(pipe):
        frames = pipe(prompt).frames[0]
    ```

    Neither the tokens nor the heads need to be a multiple of the ranks. Latents are those of the
    first rank, so that a missing seed does no harm there. What is not guided is computed by both
    teams together.

    Args:
        pipe: a diffusers pipeline, or its transformer, the same on every rank.
        ulysses: how many ranks exchange heads; by default as many as there are. With more ranks in
            all than `ulysses * ring * guidance`, each so many in a row make a video of their own.
        ring: how many so large groups of ranks keep their queries and pass keys and values on: for
            more ranks than heads. Sparse attention is then that of SVG2 with top_p or density
            alone, and each rank chooses for its own queries what they read.
        guidance: 2 for two teams, 1 for one; by default 2 for a pipeline and an even number of
            ranks.
        balance: deal the heads of sparse layers to ranks by what they cost in the step before,
            where a method lets them cost what they need (`run.stats()` tells the imbalance).
        exchange: "direct" has ranks write heads into each other's memory, for which they have to
            be GPUs of one host; "collective" has NCCL or gloo send them; "auto" is direct where
            that can be had. `SharedRun.exchange` tells which it is.
        group: the ranks; by default all.

    Returns:
        What undoes it, by `restore()` or as a context.

    Raises:
        TypeError: if `pipe` has no transformer.
        ValueError: if no family covers it, it is shared already, by this function or by diffusers,
            or the ranks are no multiple of those of a video.
        UnsupportedError: if there is no group of ranks, or more of them exchange heads than there
            are; with the first attention, if `exchange="direct"` cannot be had.
    """
    if exchange not in ("auto", "direct", "collective"):
        raise ValueError(f"exchange must be auto, direct or collective, got {exchange!r}")
    found = [(name, model, family_of(model)) for name, model in transformers_of(pipe).items()]
    for _, transformer, family in found:
        _refuse_shared(transformer, family)
    crew = Crew.of(group, ulysses, ring, guidance, whole=isinstance(pipe, nn.Module))
    if crew.ranks == 1:
        return SharedRun(1)
    heads = [
        (module.heads, path)
        for _, transformer, family in found
        for path, module in family.find_attentions(transformer)
    ]
    _refuse_few_heads(heads, crew.ulysses)
    together = crew.together(ulysses, min(heads)[0])
    team = _exchanging(replace(crew.team, balanced=balance), exchange)
    if together is not None:
        together = _exchanging(replace(together, balanced=balance), exchange)
    run = SharedRun(crew.ranks, team, together)
    try:
        if together is not None or crew.team.ranks > 1:
            for _, transformer, family in found:
                run.share(transformer, family, team)
        if crew.pair is not None:
            models = {name: getattr(pipe, name, model) for name, model, _ in found}
            run.split(pipe, models, crew)
    except BaseException:
        run.restore()
        raise
    return run


class SharedRun:
    """A pipeline whose videos several ranks make together; made by `parallelize`.

    Attributes:
        ranks: how many share a video.
    """

    def __init__(
        self, ranks: int, team: Share | None = None, together: Share | None = None
    ) -> None:
        self.ranks = ranks
        self._team, self._together = team, together
        self._shared: list[SharedTransformer] = []
        self._split: SplitGuidance | None = None
        self._pair: Any = None

    def __enter__(self) -> SharedRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        active = self._shared or self._split is not None
        words = [f"{self.ranks} ranks", self.exchange] if active else ["restored"]
        return f"SharedRun({', '.join(filter(None, words))})"

    @property
    def exchange(self) -> str:
        """Return how heads are exchanged; empty if none have to be, or directly but none were yet.

        "direct, 1161 MB", the memory that each GPU has for it; "collective"; or "collective, since
        <why it is not direct>".
        """
        for share in (self._team, self._together):
            if share is None or share.of_heads.ranks == 1:
                continue
            if share.direct is None:
                return "collective"
            if share.direct.refusal:
                return f"collective, since {share.direct.refusal}"
            if share.direct.size:
                return f"direct, {share.direct.size / 1e6:.0f} MB"
        return ""

    def share(self, transformer: nn.Module, family: Family, share: Share) -> None:
        """Share one transformer more.

        Args:
            transformer: the transformer.
            family: its family.
            share: the ranks.
        """
        if family.sharing is None:
            raise ValueError(
                f"family {family.name!r} does not say how ranks share the sequence of its "
                "transformers; give it a sharing"
            )
        self._shared.append(SharedTransformer(transformer, family, family.sharing, share))

    def split(self, pipe: Any, transformers: dict[str, nn.Module], crew: Crew) -> None:
        """Have two teams compute a branch of guidance each.

        Args:
            pipe: the pipeline.
            transformers: its transformers.
            crew: the ranks of a video.
        """
        apart, together = self._team, self._together

        def use(everyone: bool) -> None:
            for shared in self._shared:
                if apart is not None and together is not None:
                    shared.share = together if everyone else apart

        self._pair = crew.pair
        self._split = SplitGuidance(
            pipe,
            transformers,
            pair=crew.pair,
            team=crew.number,
            gather=None if together is None else use,
        )

    def merged(self, stats: RunStats) -> RunStats:
        """Return statistics with the calls of both teams; every rank has to ask for them.

        Without guidance in two teams they are those that were given.

        Args:
            stats: of a sparse run, which knows the calls of this rank.
        """
        if self._pair is None:
            return stats
        teams: list[Any] = [None, None]
        dist.all_gather_object(teams, stats.records, group=self._pair)
        known = {_name(record) for record in teams[0]}
        records = [*teams[0], *(one for one in teams[1] if _name(one) not in known)]
        # A step without a number, of a pipeline that does not say it, stands in front.
        records.sort(key=lambda one: -1 if one.step is None else one.step)
        return replace(stats, records=tuple(records))

    def restore(self) -> None:
        """Have each rank compute whole sequences again; calling it twice does no harm."""
        if self._split is not None:
            self._split.restore()
            self._split = None
        while self._shared:
            self._shared.pop().restore()
        for share in (self._team, self._together):
            if share is not None and share.direct is not None:
                share.direct.release()


def _exchanging(share: Share, exchange: str) -> Share:
    """Return a share whose ranks exchange heads as was asked for."""
    if exchange == "collective" or share.of_heads.ranks == 1:
        return share
    return replace(share, direct=Direct(share.of_heads.group, required=exchange == "direct"))


def _name(record: CallRecord) -> tuple[Any, ...]:
    """Return which call of a generation a record is of."""
    return record.step, record.branch, record.transformer, record.layer


def _refuse_shared(transformer: nn.Module, family: Family) -> None:
    if context_config(transformer) is not None:
        raise ValueError(
            f"{type(transformer).__name__} is shared by diffusers' enable_parallelism already; "
            "use one of both"
        )
    for path, module in transformer.named_modules():
        processor = getattr(module, "processor", None)
        if is_shared(processor) or is_shared(getattr(processor, "original", None)):
            raise ValueError(f"{type(transformer).__name__} is shared already (at {path})")


def _refuse_few_heads(heads: list[tuple[int, str]], ranks: int) -> None:
    for count, path in heads:
        if count < ranks:
            raise UnsupportedError(
                {
                    "ulysses": f"{ranks} ranks cannot share the {count} heads of {path}; let some "
                    "of them pass keys on, by ring"
                }
            )
