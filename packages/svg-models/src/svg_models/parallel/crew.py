"""The ranks that make a video together, and which of them exchange what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from svg_attention import Ring, UnsupportedError
from svg_models.parallel.share import Share

__all__ = ["Crew"]


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The ranks that make a video: one or two teams, each of a ring of ranks that exchange heads.

    Ranks are counted team by team, in a team share by share of the sequence, in a share head by
    head: those that send most to each other stand side by side.

    Attributes:
        group: all of them; None for all ranks there are.
        ranks: how many they are.
        ulysses: how many exchange heads.
        number: of this rank's team.
        team: share of a sequence of this rank in its team.
        pair: this rank and the one at its place in the other team; None if there is one team.
    """

    group: Any
    ranks: int
    ulysses: int
    number: int
    team: Share
    pair: Any

    @classmethod
    def of(
        cls, group: Any, ulysses: int | None, ring: int, guidance: int | None, *, whole: bool
    ) -> Crew:
        """Return the crew of this rank; every rank of the group has to ask for it.

        Args:
            group: ranks; None for all.
            ulysses: how many exchange heads; None for as many as there are.
            ring: how many shares of the sequence they are in.
            guidance: how many teams; None to choose.
            whole: whether a single team is chosen, if it is not said.

        Raises:
            ValueError: if the ranks are no multiple of those of a video.
            UnsupportedError: if there are no ranks.
        """
        if not (dist.is_available() and dist.is_initialized()):
            if (ulysses, ring, guidance or 1) == (1, 1, 1):
                return cls(group=None, ranks=1, ulysses=1, number=0, team=Share.alone(), pair=None)
            raise UnsupportedError(
                {
                    "ulysses": "there is no group of processes; start one for each GPU, for "
                    "example by torchrun, and call torch.distributed.init_process_group first"
                }
            )
        ranks = dist.get_world_size(group)
        for name, value in (("ulysses", ulysses), ("ring", ring), ("guidance", guidance)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if guidance is None:
            # With ulysses given, the ranks it leaves over make videos of their own.
            even = ulysses is None and ranks % (2 * ring) == 0
            guidance = 2 if even and not whole else 1
        if guidance > 2:
            raise ValueError(f"guidance must be 1 or 2, the branches there are, got {guidance}")
        exchanging = ulysses or max(ranks // (ring * guidance), 1)
        size = exchanging * ring
        if ranks % (size * guidance):
            raise ValueError(
                f"{guidance} x {ring} x {exchanging} ranks (guidance x ring x ulysses) make a "
                f"video, and {ranks} ranks are no multiple of that"
            )
        return cls._of(group, ranks, exchanging, ring, guidance)

    @classmethod
    def _of(cls, group: Any, ranks: int, ulysses: int, ring: int, guidance: int) -> Crew:
        everyone = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        size = ulysses * ring
        crews = _cut(everyone, size * guidance)
        teams = _cut(everyone, size)
        own = group if len(crews) == 1 else _own(crews, group)
        team = own if guidance == 1 else _own(teams, group)
        pair = None if guidance == 1 else _own([_every(crew, size) for crew in crews], group)
        share = Share.alone() if size == 1 else Share.of(team, 0)
        if ring > 1:
            in_ring = _own([_every(one, ulysses) for one in teams], group)
            heads = _own([_cut(one, ulysses) for one in teams], group) if ulysses > 1 else None
            share = Share.of(team, 0, Ring(in_ring, parts=ulysses), heads)
        number = everyone.index(dist.get_rank()) % (size * guidance) // size
        return cls(
            group=own,
            ranks=size * guidance,
            ulysses=ulysses,
            number=number,
            team=share,
            pair=pair,
        )

    def together(self, ulysses: int | None, heads: int) -> Share | None:
        """Return the share of this rank where both teams share a sequence; None if they cannot.

        Args:
            ulysses: how many ranks were asked to exchange heads; None if that was not said.
            heads: of a layer.
        """
        alone = ulysses == 1 and self.team.ranks == 1  # asked for whole sequences
        if self.pair is None or self.team.ring is not None or heads < self.ranks or alone:
            return None
        return Share.of(self.group, 0)


def _cut(ranks: list[int], size: int) -> list[list[int]]:
    """Return so many ranks in a row each."""
    return [ranks[n : n + size] for n in range(0, len(ranks), size)]


def _every(ranks: list[int], step: int) -> list[list[int]]:
    """Return every so manieth rank, from each of the first ones on."""
    return [ranks[n::step] for n in range(step)]


def _own(teams: list[Any], group: Any) -> Any:
    """Return the group of the team that this rank is in, of teams or lists of them.

    Where `group` is everyone, all make all the groups, as torch wants it. Ranks of a smaller one
    make their own alone, which torch names by how many groups a process has: it would wait forever
    where these numbers differ.

    Raises:
        RuntimeError: if they differ.
    """
    flat = [team for one in teams for team in (one if isinstance(one[0], list) else [one])]
    own = next(team for team in flat if dist.get_rank() in team)
    if group is None or dist.get_world_size(group) == dist.get_world_size():
        return next(made for team, made in [(t, dist.new_group(t)) for t in flat] if team is own)
    known = dist.distributed_c10d._world.pg_names
    counts: list[int] = [0] * dist.get_world_size(group)
    dist.all_gather_object(counts, len(known), group=group)
    if len(set(counts)) > 1:
        raise RuntimeError(
            f"the ranks of this group are in {', '.join(map(str, counts))} groups, and torch can "
            "make groups of some of them only where these numbers are equal; have every rank of "
            "the group make as many groups before"
        )
    return dist.new_group(own, use_local_synchronization=True)
