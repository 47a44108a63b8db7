"""Which of this machine's cores the members of its CPU work on: side by side, each on its own.

A forward that has all cores waits at a barrier after every operation, hundreds of times a forward, and each time for
the slowest core: on an idle machine that costs a tenth of a step, and a multiple of it where another process holds a
core. Members that step together therefore share the cores out among them, by what their forwards cost; one that steps
alone has them all. How many threads a forward has changes no bit of its answer (a test holds this).

Knows names and numbers; does not know members, lanes of other devices or threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Team:
    """Members that work in turn, each with so many cores; 0: it is not said."""

    members: tuple[str, ...]
    cores: int


@dataclass(frozen=True, slots=True)
class Cores:
    """How many cores there are, and what a forward of each member that works on them costs beside those of others."""

    num: int = 1
    costs: Mapping[str, float] = field(default_factory=dict)

    def teams(self, members: Iterable[str]) -> tuple[Team, ...]:
        """Of members that step together; in turn where there is one core, as many threads as there are."""
        names = tuple(members)
        if self.num == 1:
            return (Team(names, 0),) if names else ()
        return share_out({name: self.costs[name] for name in names}, self.num)


def share_out(costs: Mapping[str, float], cores: int) -> tuple[Team, ...]:
    """Teams of members that use all cores at the same time.

    costs: member -> what its forward costs, above 0. With a core for each member, every member is a team of its own,
    and each core that is left goes where most work waits for a core. Otherwise each core has a team, and members join
    the one with the least work, the dearest first.
    """
    dearest = sorted(costs, key=lambda name: (-costs[name], name))
    if len(dearest) > cores:
        return _packed({name: costs[name] for name in dearest}, cores)
    shares = dict.fromkeys(dearest, 1)
    for _ in range(cores - len(dearest) if dearest else 0):
        shares[max(dearest, key=lambda name: costs[name] / shares[name])] += 1
    return tuple(Team((name,), share) for name, share in shares.items())


def _packed(costs: Mapping[str, float], cores: int) -> tuple[Team, ...]:
    teams: list[list[str]] = [[] for _ in range(cores)]
    for name in costs:
        min(teams, key=lambda team: sum(costs[each] for each in team)).append(name)
    return tuple(Team(tuple(team), 1) for team in teams)
