"""One of four processes that make videos together; started by `test_parallel.py`."""

from __future__ import annotations

import copy
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed as dist
from composition.player import Player
from processes import join_ranks

from sharing.checks import METHODS, Seen, compare, play
from sharing.others import CHECKS
from sharing.subjects import SUBJECTS
from svg_models import parallelize

RANKS = (2, 4)


def check(player: Player, teams: dict[int, Any]) -> dict[str, str]:
    """Return what came of each way to make a video; nothing where all is right."""
    rank, heads = dist.get_rank(), player.transformer.config.num_attention_heads
    ways = {"dense": None} | METHODS
    alone = {way: play(player, method) for way, method in ways.items()} if rank == 0 else {}
    said = dict.fromkeys(ways, "")
    for ranks in RANKS:
        if rank >= ranks or ranks > heads:
            continue
        team = teams[ranks]
        shared = copy.deepcopy(player)
        # Heads stay in the order of their numbers, in which their plans are compared.
        with parallelize(shared, group=team, guidance=1, balance=False) as run:
            assert run.ranks == ranks
            for way, method in ways.items():
                seen: list[Seen | None] = [None] * ranks
                dist.gather_object(play(shared, method), seen if rank == 0 else None, group=team)
                if rank == 0:
                    said[way] += outcome(alone[way], seen, ranks)
    return said


def outcome(alone: Seen, team: list[Any], ranks: int) -> str:
    """Say what is wrong with a team's video."""
    try:
        compare(alone, team)
    except AssertionError as error:
        return f"{ranks} ranks: {error}\n"
    return ""


def check_others(name: str, player: Player, team: Any) -> Iterator[tuple[str, str]]:
    """Yield what else came of a subject, by the name of the check."""
    for label, (run, subject) in CHECKS.items():
        if subject != name or dist.get_rank() >= RANKS[0]:
            continue
        sentence = ""
        try:
            run(copy.deepcopy(player), team)
        except Exception:  # noqa: BLE001 - whatever it is, the test says it
            sentence = traceback.format_exc()
        said = [""] * RANKS[0]
        dist.all_gather_object(said, sentence, group=team)
        yield label, "\n".join(filter(None, said))


def main() -> None:
    """Check all subjects."""
    join_ranks(seconds=300)
    teams = {ranks: dist.new_group(list(range(ranks))) for ranks in RANKS}
    wanted = sys.argv[1:]
    for name, subject in SUBJECTS.items():
        if wanted and name not in wanted:
            continue
        began = time.perf_counter()
        box = [subject.player() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box)
        ways = check(copy.deepcopy(box[0]), teams)
        said = {f"{name}: {way}": sentence for way, sentence in ways.items()}
        said |= check_others(name, box[0], teams[RANKS[0]])
        if dist.get_rank() == 0:
            for label, sentence in said.items():
                print(json.dumps([label, sentence]), flush=True)
        if dist.get_rank() == 0:
            print(f"{name} {time.perf_counter() - began:.1f} s", file=sys.stderr)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
