"""What says which of main's tokens may come next in one sequence: the contract.

Does not know grammars or reasoning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Guide(Protocol):
    """The position of one sequence in what its text must be."""

    @property
    def binds(self) -> bool:
        """Whether what may come next depends on the tokens before, now or later."""

    @property
    def chooses(self) -> bool:
        """Whether it may allow some of several tokens next, so that main must answer with its whole vocabulary."""

    @property
    def forced(self) -> int | None:
        """The only token that may come next, where that is known in advance."""

    def allowed(self) -> Tensor | None:
        """(V,) bool on the CPU: the tokens that may come next, at least one; None: all."""

    def accept(self, token_id: int) -> None:
        """Advance by a token that was allowed."""
