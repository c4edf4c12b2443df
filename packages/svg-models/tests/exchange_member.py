"""One of the processes that exchange heads, started by `test_ulysses.py`.

With "cpu", "cuda", "one cuda" for processes that see one GPU each, or "captured cuda" for a graph
of the exchange. On the CPU ranks write into files that all have mapped, where GPUs have memory of
each other.
"""

from __future__ import annotations

import itertools
import os
import sys
import time

if sys.argv[1] == "one cuda":  # before anybody counts them
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = seen[int(os.environ["RANK"])]

from dataclasses import replace

import torch
import torch.distributed as dist
from mapped import MappedFiles
from processes import join_ranks
from torch import Tensor

from svg_attention import Arrivals
from svg_models.parallel.direct import Direct
from svg_models.parallel.share import Share, part_sizes
from svg_models.parallel.ulysses import attend_over_ranks, begin_over_ranks

WIDTH = 16


def whole_sequence(batch: int, tokens: int, heads: int, device: str, seed: int) -> list[Tensor]:
    """Return queries, keys and values `[B, S, H, D]`, the same on every rank."""
    source = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, heads, WIDTH)
    return [torch.randn(shape, generator=source).to(device) for _ in range(3)]


def laid_out(x: Tensor, *, by_head: bool) -> Tensor:
    """Return a copy that lies head by head in memory, or token by token."""
    if not by_head:
        return x.contiguous()
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def check(
    device: str, direct: Direct | None, case: tuple[int, int, int, str, bool], seed: int
) -> None:
    """Each rank gets its heads of the whole sequence, and its tokens of all heads back."""
    batch, video, heads, text, dealt = case
    share = replace(Share.of(None, video), direct=direct)
    words = 0 if text == "none" else 5
    tokens = whole_sequence(batch, video + words, heads, device, seed)
    order = torch.arange(heads, device=device).flip(0) if dealt else None
    sizes = part_sizes(heads, share.ranks)
    first = sum(sizes[: share.rank])
    numbers = torch.arange(heads, device=device) if order is None else order
    here = numbers[first : first + sizes[share.rank]]
    front = words if text == "first" else 0

    def mine(x: Tensor) -> Tensor:
        clip = x[:, front : front + video]
        rest = (x[:, :front], x[:, front + video :])
        return torch.cat((rest[0], share.part(clip, 1), rest[1]), dim=1)

    def attend(query: Tensor, key: Tensor, value: Tensor, arrivals: Arrivals) -> Tensor:
        expected = [x[:, :, here] for x in tokens]
        assert torch.equal(query, expected[0])
        arrivals.wait("key")
        assert torch.equal(key, expected[1])
        arrivals.wait()
        assert torch.equal(value, expected[2])
        return (query + 2 * key - 3 * value).contiguous()

    query, key, value = (mine(x) for x in tokens)
    given = (laid_out(query, by_head=True), laid_out(key, by_head=True), value.contiguous())
    position = None if text == "none" else "first" if text == "first" else "last"
    found = attend_over_ranks(share, *given, attend, text_position=position, order=order)
    assert found.is_contiguous()
    assert torch.equal(found, query + 2 * key - 3 * value)

    def fails(*_: object) -> Tensor:
        raise ZeroDivisionError

    try:  # nothing is under way afterwards
        attend_over_ranks(share, *given, fails, text_position=position)
    except ZeroDivisionError:
        return
    raise AssertionError("an error in attention was lost")


def check_reuse(device: str, direct: Direct) -> None:
    """No rank meets what another one writes for the next call, however slow it is."""
    share, kept = replace(Share.of(None, 600), direct=direct), []
    for number in range(20):

        def attend(
            query: Tensor, key: Tensor, value: Tensor, arrivals: Arrivals, number: int = number
        ) -> Tensor:
            if number % share.ranks == share.rank:
                pause(device)
            arrivals.wait()
            out = (query + 2 * key - 3 * value).contiguous()
            if number % 2:  # as soon as it is there, or what is not the output in the end
                arrivals.give((-out if number % 4 == 3 else out).transpose(1, 2))
            pause(device)
            assert torch.equal(out, query + 2 * key - 3 * value)
            return out

        query, key, value = (share.part(x, 1) for x in whole_sequence(1, 600, 6, device, number))
        if number % 4 == 1:  # of a call that does not come
            begin_over_ranks(share, value, key)
        if number % 4:
            begin_over_ranks(share, query, key)
            pause(device)
        found = attend_over_ranks(share, query, key, value, attend)
        kept.append((found, query + 2 * key - 3 * value))
    for found, expected in kept:  # what was returned is nobody else's
        assert torch.equal(found, expected)


def check_capture(direct: Direct) -> None:
    """What a graph has captured exchanges what is there when it is replayed."""
    share = replace(Share.of(None, 600), direct=direct)
    given = [share.part(x, 1).contiguous() for x in whole_sequence(1, 600, 6, "cuda", 0)]

    def attend(query: Tensor, key: Tensor, value: Tensor, arrivals: Arrivals) -> Tensor:
        arrivals.wait()
        return query + 2 * key - 3 * value

    attend_over_ranks(share, *given, attend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = attend_over_ranks(share, *given, attend)
    for number in range(3):
        for x, y in zip(given, whole_sequence(1, 600, 6, "cuda", number), strict=True):
            x.copy_(share.part(y, 1))
        graph.replay()
        assert torch.equal(found, given[0] + 2 * given[1] - 3 * given[2])


def pause(device: str) -> None:
    """Have this rank, or what its GPU runs next, wait a little."""
    if device == "cuda":
        torch.cuda._sleep(4_000_000)
    else:
        time.sleep(4e-3)


def main() -> None:
    kind, device = sys.argv[1].rpartition(" ")[::2]
    group, memory = "gloo", {"allocate": MappedFiles}
    if device == "cuda":
        group, memory = "nccl", {}
        torch.cuda.set_device(0 if kind == "one" else int(os.environ["RANK"]))
    join_ranks(group, seconds=60)
    direct = Direct(None, required=True, **memory)
    if kind == "captured":
        check_capture(direct)
        end()
        return
    cases = itertools.product((1, 2), (12, 4001), (4, 5), ("none", "first", "last"), (False, True))
    for seed, case in enumerate(cases):
        check(device, None, case, seed)
        check(device, direct, case, seed)
    assert direct.size > 0
    check_reuse(device, direct)
    end()


def end() -> None:
    """Say that all is right."""
    if dist.get_rank() == 0:
        print("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
