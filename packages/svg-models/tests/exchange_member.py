"""One of the processes that exchange heads; started by `test_ulysses.py` with "cpu" or "cuda"."""

from __future__ import annotations

import datetime
import itertools
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from svg_attention import Arrivals
from svg_models.parallel.share import Share, part_sizes
from svg_models.parallel.ulysses import attend_over_ranks

WIDTH = 16


def whole_sequence(batch: int, tokens: int, heads: int, device: str) -> list[Tensor]:
    """Return queries, keys and values `[B, S, H, D]`, the same on every rank."""
    source = torch.Generator().manual_seed(tokens)
    shape = (batch, tokens, heads, WIDTH)
    return [torch.randn(shape, generator=source).to(device) for _ in range(3)]


def laid_out(x: Tensor, *, by_head: bool) -> Tensor:
    """Return a copy that lies head by head in memory, or token by token."""
    if not by_head:
        return x.contiguous()
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def check(device: str, batch: int, video: int, heads: int, text: str, *, dealt: bool) -> None:
    """Each rank gets its heads of the whole sequence, and its tokens of all heads back."""
    share, words = Share.of(None, video), 0 if text == "none" else 5
    tokens = whole_sequence(batch, video + words, heads, device)
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


def main() -> None:
    device = sys.argv[1]
    torch.set_num_threads(1)
    group = "gloo"
    if device == "cuda":
        group = "nccl"
        torch.cuda.set_device(int(os.environ["RANK"]))
    dist.init_process_group(group, timeout=datetime.timedelta(seconds=60))
    cases = itertools.product((1, 2), (12, 4001), (4, 5), ("none", "first", "last"), (False, True))
    for batch, video, heads, text, dealt in cases:
        check(device, batch, video, heads, text, dealt=dealt)
    if dist.get_rank() == 0:
        print("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
