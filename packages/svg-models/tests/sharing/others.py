"""What else a shared transformer has to bear, in a team of two."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from composition.player import Player
from mapped import MappedFiles
from torch import Tensor
from torch.overrides import TorchFunctionMode

import svg_kernels
from sharing.checks import EVERYWHERE, METHODS
from sharing.subjects import SUBJECTS
from svg_attention import Dense, UnsupportedError
from svg_models import parallelize, restore, sparsify
from svg_models.families import family_of, fused
from svg_models.parallel import pipeline
from svg_models.parallel.direct import Direct

SPARSE = METHODS["SVG2"]
KERNELS = ("gate_residual", "gate_residual_norm", "gelu", "layer_norm_modulate", "qk_norm_rope",
           "rms_norm", "rope")  # fmt: skip


class Doubled(TorchFunctionMode):
    """Doubles what torch's attention returns, as some kinds of guidance do something to it."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is torch.nn.functional.scaled_dot_product_attention else out


@contextmanager
def launches() -> Iterator[list[str]]:
    """Say that kernels serve the CPU; collect the names of those that are launched."""
    names: list[str] = []
    real = {name: getattr(svg_kernels, name) for name in KERNELS}

    def named(name: str) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            names.append(name)
            return real[name](*args, **options)

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "serves", lambda device: True)
        for name in KERNELS:
            patch.setattr(svg_kernels, name, named(name))
        yield names


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0.0, atol=1e-5)


def either_order(player: Player, team: Any) -> None:
    """Sparsify first or last, restore first or last: what is left is what is said."""
    plain = player.play()
    with sparsify(player, SPARSE, EVERYWHERE):
        sparse = player.play()
    first = parallelize(player, group=team, guidance=1)
    second = sparsify(player, SPARSE, EVERYWHERE)
    close(player.play(), sparse)
    first.restore()
    assert torch.equal(player.play(), sparse)  # on one rank each
    first = parallelize(player, group=team, guidance=1)  # after sparsify
    close(player.play(), sparse)
    second.restore()
    close(player.play(), plain)
    with sparsify(player, Dense(), EVERYWHERE) as run:
        close(player.play(), plain)
        assert run.messages == ()
    restore(player)  # of sparsify; the share stays
    first.restore()
    assert torch.equal(player.play(), plain)


def copies(player: Player, team: Any) -> None:
    """A copy of a shared transformer has the whole sequence."""
    plain = player.play()
    with parallelize(player, group=team, guidance=1):
        for copied in (copy.deepcopy(player), pickle.loads(pickle.dumps(player))):
            if dist.get_rank() == 0:  # it asks no other rank
                assert torch.equal(copied.play(), plain)


def watched(player: Player, team: Any) -> None:
    """Under a mode of torch the model's own processor computes the whole sequence."""
    with Doubled():
        doubled = player.play()
    assert not torch.allclose(doubled, player.play(), atol=1e-3)
    with parallelize(player, group=team, guidance=1):
        with Doubled():
            close(player.play(), doubled)
            with sparsify(player, SPARSE, EVERYWHERE):
                close(player.play(), doubled)


def fused_blocks(player: Player, team: Any) -> None:
    """Blocks take shares by the kernels that compute them alone, here by their reference."""
    with sparsify(player, SPARSE, EVERYWHERE), launches() as names:
        alone = player.play()
    assert names or not family_of(player.transformer).find_blocks(player.transformer)
    with parallelize(player, group=team, guidance=1), sparsify(player, SPARSE, EVERYWHERE):
        with launches() as shared:
            close(player.play(), alone)
    assert shared == names, "other kernels than alone"


def compiled(player: Player, team: Any) -> None:
    """Compiled blocks exchange heads inside the operator, so that their graphs stay whole."""
    with sparsify(player, SPARSE, EVERYWHERE):
        alone = player.play()
    with parallelize(player, group=team, guidance=1), sparsify(player, SPARSE, EVERYWHERE):
        player.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        close(player.play(), alone)


def own_latents(player: Player, team: Any) -> None:
    """Whatever the latents of other ranks, those of the first are denoised."""
    plain = player.play()
    if dist.get_rank() != 0:
        for call in player.calls:
            call["hidden_states"] = torch.randn_like(call["hidden_states"])
    with parallelize(player, group=team, guidance=1):
        close(player.play(), plain)


def kept(play: Callable[[], Any]) -> int:
    """Return how many tensors of the size of queries a video leaves, before cycles are found."""

    def count() -> int:
        found = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
        return sum(x.numel() > 2000 for x in found)

    gc.collect()
    gc.disable()
    try:
        before = count()
        play()
        return count() - before
    finally:
        gc.enable()


def exchanges(player: Player, team: Any) -> None:
    """Heads that are written into the memory of peers make the same video to the last bit."""

    def plays(exchange: str) -> tuple[Tensor, Tensor, str]:
        with parallelize(player, group=team, guidance=1, exchange=exchange) as run:
            dense = player.play()
            with sparsify(player, SPARSE, EVERYWHERE):
                sparse = player.play()
                if exchange == "direct":
                    counts.append(kept(player.play))
                return dense, sparse, run.exchange

    counts: list[int] = []
    expected, chosen = plays("collective"), plays("auto")
    assert (expected[2], chosen[2]) == (
        "collective",
        "collective, since the tensors are on cpu, not on a GPU",
    )
    with pytest.raises(UnsupportedError, match="the tensors are on cpu"):
        plays("direct")
    with mock.patch.object(pipeline, "Direct", partial(Direct, allocate=MappedFiles)):
        direct = plays("direct")
    assert direct[2].startswith("direct, ")
    assert counts[0] < 4  # threads of gloo may still hold one; a call has three and its output
    for found in (chosen, direct):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def refusals(player: Player, team: Any) -> None:
    """What cannot be shared is refused before anything is changed."""
    with (
        parallelize(player, group=team, guidance=1),
        pytest.raises(ValueError, match="shared already"),
    ):
        parallelize(player, group=team, guidance=1)
    with pytest.raises(ValueError, match="2 ranks are no multiple"):
        parallelize(player, ulysses=3, group=team)
    for _, module in player.transformer.named_modules():
        if hasattr(module, "heads"):
            module.heads = 1
    with pytest.raises(UnsupportedError, match="2 ranks cannot share the 1 heads"):
        parallelize(player, group=team, guidance=1)


CHECKS: dict[str, tuple[Callable[[Player, Any], None], str]] = {
    f"{name}: {check.__name__}": (check, name)
    for check, names in {
        either_order: ("wan t2v", "hunyuan_video t2v"),
        copies: ("wan t2v", "cogvideox 1.5 i2v"),
        watched: ("wan t2v", "hunyuan_video t2v", "allegro t2v", "ltx2 t2v"),
        fused_blocks: tuple(SUBJECTS),
        compiled: ("wan t2v", "hunyuan_video t2v"),
        own_latents: ("wan t2v",),
        exchanges: ("wan t2v", "hunyuan_video t2v"),
        refusals: ("wan t2v",),
    }.items()
    for name in names
}
