"""Where ranks write into each other's memory, and where they say why not; see `test_ulysses.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from svg_attention import UnsupportedError
from svg_models.parallel import peers
from svg_models.parallel.direct import Direct
from svg_models.parallel.peers import PeerMemory
from svg_models.parallel.places import Places
from svg_models.parallel.share import Share

CPU = torch.device("cpu")
FINE = ("", "a host", "a card", "/tmp", 0)


def call(ranks: int, *, device: str = "cpu") -> tuple[tuple[torch.Tensor, ...], Places]:
    """Return what the first rank of some has of a layer of Wan 2.1 14B at 720p."""
    share = Share(None, ranks, 0, 75600)
    shape = (1, 40, share.sizes[0], 128)
    x = torch.empty(shape, dtype=torch.bfloat16, device=device).transpose(1, 2)
    return (x, x, x), Places.of(share, x, None, None)


@pytest.mark.parametrize(("ranks", "size"), [(2, 1_354_752_000), (4, 725_760_000)])
def test_direct_memory_is_whole_tensors_of_own_heads_and_outputs_of_others(
    ranks: int, size: int
) -> None:
    asked: list[int] = []

    def refuse(group: Any, size: int, device: torch.device) -> Any:
        asked.append(size)
        raise UnsupportedError({"direct": "none here"})

    direct = Direct(None, allocate=refuse)
    for _ in range(2):
        assert direct.exchange(*call(ranks, device="meta")) is None
    assert asked == [size], "it is known for all later calls"
    assert (direct.size, direct.refusal) == (0, "none here")
    with pytest.raises(UnsupportedError, match="none here"):
        Direct(None, required=True, allocate=refuse).exchange(*call(ranks, device="meta"))


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (("no socket can be made", *FINE[1:]), "no socket can be made"),
        (("", "another host", "another card", "/tmp", 0), "the ranks are on several hosts"),
        (FINE, "several ranks share a GPU"),
        (("", "a host", "another card", "/var/tmp", 0), "the ranks have different folders"),
        (("", "a host", "another card", "/tmp", 1), "in groups without the others"),
    ],
)
def test_peer_memory_is_refused_by_all_ranks_alike(
    other: tuple[str | int, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_gather", lambda group, value: [FINE, other])
    monkeypatch.setattr(peers, "_empty", lambda *_: pytest.fail("nothing is to be allocated"))
    with pytest.raises(UnsupportedError, match=reason):
        PeerMemory("two ranks", 4096, CPU)


@pytest.mark.parametrize("failing", ["_empty", "_rendezvous"])
@pytest.mark.parametrize("here", [False, True])
def test_peer_memory_that_one_rank_cannot_have_none_has(
    failing: str, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[str] = []

    def step(name: str) -> Any:
        def run(*_: Any) -> Any:
            reached.append(name)
            if here and name == failing:
                raise RuntimeError("out of memory\nand more lines")
            return handle

        return run

    class Handle:
        def get_buffer(self, rank: int, shape: tuple[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype)

    def gather(group: Any, value: str) -> list[str]:
        elsewhere = "" if here or reached[-1] != failing else "RuntimeError: out of memory"
        return [value, elsewhere]

    handle = Handle()
    monkeypatch.setattr(peers, "_refuse_groups", lambda *_: None)
    monkeypatch.setattr(peers, "_gather", gather)
    monkeypatch.setattr(peers.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(peers.dist, "get_rank", lambda group: 0)
    for name in ("_empty", "_rendezvous"):
        monkeypatch.setattr(peers, name, step(name))
    with pytest.raises(UnsupportedError, match=r"RuntimeError: out of memory$"):
        PeerMemory("two ranks", 4096, CPU)
    assert reached[-1] == failing, "no rank waits for one that has given up"


@pytest.mark.parametrize("lost", [False, True])
def test_peer_memory_is_checked_before_it_is_used(
    lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories: list[torch.Tensor] = []

    class Handle:
        def get_buffer(self, rank: int, shape: tuple[int], dtype: torch.dtype) -> torch.Tensor:
            memories.append(torch.zeros(shape, dtype=dtype))
            return memories[-1]

        def barrier(self, channel: int, timeout: int) -> None:
            if not lost:  # the other rank writes the same, by its own number
                other = torch.arange(peers._CHECKED) * 4 % 251
                memories[0][-peers._CHECKED :] = other.to(torch.uint8)

    monkeypatch.setattr(peers, "_refuse_groups", lambda *_: None)
    monkeypatch.setattr(peers, "_gather", lambda group, value: [value, value])
    monkeypatch.setattr(peers.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(peers.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(peers, "_empty", lambda *_: None)
    monkeypatch.setattr(peers, "_rendezvous", lambda *_: Handle())
    made = PeerMemory.made
    if lost:
        with pytest.raises(UnsupportedError, match="does not arrive"):
            PeerMemory("two ranks", 4096, CPU)
    else:
        assert PeerMemory("two ranks", 4096, CPU).size == 4096
    assert PeerMemory.made == made + 1, "whatever comes of it"
