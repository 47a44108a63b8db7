"""Which of this machine's cores the members of its CPU work on: side by side, each on its own.

A forward that has all cores waits at a barrier after every operation, hundreds of times a forward, and each time for
the slowest core: on an idle machine that costs a tenth of a step, and a multiple of it where another process holds a
core. Members that step together therefore share the cores out among them, by what their forwards cost; one that steps
alone has them all. How many threads a forward has changes no bit of its answer (a test holds this).

Knows names, counts and seconds; does not know members, lanes of other devices or threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ForwardCost:
    """Seconds of a member's forward: a fixed part, more for each token that it is fed and each answer it is asked."""

    fixed: float = 1.0
    token: float = 0.0
    answer: float = 0.0

    def __call__(self, num_tokens: int, num_answers: int) -> float:
        """Of a forward of so many tokens; what has been read before them does not count."""
        return self.fixed + self.token * num_tokens + self.answer * num_answers


@dataclass(frozen=True, slots=True)
class Team:
    """Members that work in turn, each with so many cores; 0: it is not said."""

    members: tuple[str, ...]
    cores: int


@dataclass(frozen=True, slots=True)
class Cores:
    """How many cores there are, and what forwards of the members that work on them cost on all of them."""

    num: int = 1
    costs: Mapping[str, ForwardCost] = field(default_factory=dict)

    def teams(self, work: Mapping[str, float]) -> tuple[Team, ...]:
        """Teams of members that step together, the one that takes longest last. work: seconds of each, above 0.

        On one core there is one team, with as many threads as there are.
        """
        if self.num == 1:
            return (Team(tuple(work), 0),) if work else ()
        return share_out(work, self.num)


def share_out(work: Mapping[str, float], cores: int) -> tuple[Team, ...]:
    """Teams that use all cores at the same time, the one that takes longest last.

    With a core for each member, every member is a team of its own, and each core that is left goes where most work
    waits for a core. Otherwise each core has a team, and members join the one with the least work, the dearest first.
    """
    dearest = sorted(work, key=lambda name: (-work[name], name))
    if len(dearest) > cores:
        teams = _packed({name: work[name] for name in dearest}, cores)
    else:
        shares = dict.fromkeys(dearest, 1)
        for _ in range(cores - len(dearest) if dearest else 0):
            shares[max(dearest, key=lambda name: work[name] / shares[name])] += 1
        teams = [Team((name,), share) for name, share in shares.items()]
    return tuple(sorted(teams, key=lambda team: sum(work[name] for name in team.members) / team.cores))


def _packed(work: Mapping[str, float], cores: int) -> list[Team]:
    teams: list[list[str]] = [[] for _ in range(cores)]
    for name in work:
        min(teams, key=lambda team: sum(work[each] for each in team)).append(name)
    return [Team(tuple(team), 1) for team in teams]
