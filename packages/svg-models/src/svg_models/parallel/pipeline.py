"""Running the transformers of a pipeline on several ranks."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import nn

from svg_attention import UnsupportedError
from svg_models.families import Family, family_of, transformers_of
from svg_models.parallel.sharing import SharedTransformer, is_shared
from svg_models.parallel.ulysses import context_config

__all__ = ["SharedRun", "parallelize"]


def parallelize(pipe: Any, *, ulysses: int | None = None, group: Any = None) -> SharedRun:
    """Have several ranks make each video together, each computing a share of its tokens.

    Every rank runs the same script with the same arguments, and gets the same video. Before each
    attention ranks exchange their shares for whole sequences of some heads (Ulysses), so it may be
    dense or, with `sparsify` before or after this, sparse, with the plan of one GPU.

    ```python
    torch.distributed.init_process_group("nccl")            # torchrun --nproc-per-node 4 clip.py
    torch.cuda.set_device(torch.distributed.get_rank())
    pipe = WanPipeline.from_pretrained(..., torch_dtype=torch.bfloat16).to("cuda")
    svg_models.parallelize(pipe)
    with svg_models.sparsify(pipe):
        frames = pipe(prompt).frames[0]
    ```

    Neither the tokens nor the heads need to be a multiple of the ranks. Latents are those of the
    first rank, so that a missing seed does no harm there.

    Args:
        pipe: a diffusers pipeline, or its transformer, the same on every rank.
        ulysses: how many ranks share a video; all of the group by default. With more ranks in all
            each so many in a row make a video of their own.
        group: the ranks; by default all.

    Returns:
        What undoes it, by `restore()` or as a context.

    Raises:
        TypeError: if `pipe` has no transformer.
        ValueError: if no family covers it, it is shared already, by this function or by diffusers,
            or the ranks are no multiple of `ulysses`.
        UnsupportedError: if there is no group of ranks, or there are more than heads.
    """
    found = [(name, model, family_of(model)) for name, model in transformers_of(pipe).items()]
    for _, transformer, family in found:
        _refuse_shared(transformer, family)
    group, ranks = _group(ulysses, group)
    run = SharedRun(ranks)
    if ranks == 1:
        return run
    try:
        for _, transformer, family in found:
            _refuse_few_heads(transformer, family, ranks)
            run.share(transformer, family, group)
    except BaseException:
        run.restore()
        raise
    return run


class SharedRun:
    """A pipeline whose videos several ranks make together; made by `parallelize`.

    Attributes:
        ranks: how many share a video.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._shared: list[SharedTransformer] = []

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
        state = f"{self.ranks} ranks" if self._shared else "restored"
        return f"SharedRun({state})"

    def share(self, transformer: nn.Module, family: Family, group: Any) -> None:
        """Share one transformer more.

        Args:
            transformer: the transformer.
            family: its family.
            group: the ranks.
        """
        if family.sharing is None:
            raise ValueError(
                f"family {family.name!r} does not say how ranks share the sequence of its "
                "transformers; give it a sharing"
            )
        self._shared.append(SharedTransformer(transformer, family, family.sharing, group))

    def restore(self) -> None:
        """Have each rank compute whole sequences again; calling it twice does no harm."""
        while self._shared:
            self._shared.pop().restore()


def _group(ulysses: int | None, group: Any) -> tuple[Any, int]:
    """Return the ranks that share with this one, and their number."""
    if not (dist.is_available() and dist.is_initialized()):
        if ulysses == 1:
            return None, 1
        raise UnsupportedError(
            {
                "ulysses": "there is no group of processes; start one for each GPU, for example by "
                "torchrun, and call torch.distributed.init_process_group first"
            }
        )
    ranks = dist.get_world_size(group)
    if ulysses is None or ulysses == ranks:
        return group, ranks
    if ulysses < 1 or ranks % ulysses:
        raise ValueError(
            f"ulysses must divide the {ranks} ranks, so that each makes part of a video; "
            f"got {ulysses}"
        )
    everyone = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
    teams = [everyone[n : n + ulysses] for n in range(0, ranks, ulysses)]
    own, _ = dist.new_subgroups_by_enumeration(teams)
    return own, ulysses


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


def _refuse_few_heads(transformer: Any, family: Family, ranks: int) -> None:
    for path, module in family.find_attentions(transformer):
        if module.heads < ranks:
            raise UnsupportedError(
                {"ulysses": f"{ranks} ranks cannot share the {module.heads} heads of {path}"}
            )
