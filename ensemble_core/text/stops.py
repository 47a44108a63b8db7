"""Stop strings in a text that grows: which is complete first, and how much of the end may still become one.

The automaton of Aho and Corasick (1975), built as far as texts go: a state is the longest end of the text that
begins a stop string. A character costs the same for one stop string and for many, for short and for long ones, and
nothing is built in advance. Knows no bytes and no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopState:
    """The longest end of a text that begins one of the stop strings; of an empty text, the root of all others.

    depth: its length in characters. match: the longest stop string that the text ends in, if it ends in one.
    """

    __slots__ = ("_children", "_fallback", "_stops_by_next", "depth", "match")

    def __init__(self, stops: Sequence[str], depth: int = 0, fallback: StopState | None = None) -> None:
        self.depth = depth
        shorter = fallback.match if fallback is not None else None
        self.match: str | None = next((stop for stop in stops if len(stop) == depth), shorter)
        self._fallback = fallback  # the longest shorter end that begins a stop string, too; the root has none
        self._children: dict[str, StopState] = {}
        self._stops_by_next: dict[str, list[str]] = {}
        for stop in stops:
            if len(stop) > depth:
                self._stops_by_next.setdefault(stop[depth], []).append(stop)

    def step(self, char: str) -> StopState:
        """The state of the text after one more character."""
        state, unbuilt = self, []
        while char not in state._children:
            if char in state._stops_by_next:
                unbuilt.append(state)
            if state._fallback is None:
                break
            state = state._fallback
        reached = state._children.get(char, state)  # if nobody has such a child, state is the root
        for parent in reversed(unbuilt):  # from short to long: each child falls back to the one before
            reached = StopState(parent._stops_by_next[char], parent.depth + 1, reached)
            parent._children[char] = reached
        return reached
