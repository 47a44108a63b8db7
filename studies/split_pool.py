"""Linear pools in which an assistant's mass on the beginning of tokens is split among them as main splits it.

Main's tokens fall into groups. An assistant says what a group has, main says which token of it: p(v) = w p_main(v) +
sum_i w_i P_i(group of v) p_main(v | group of v). Two partitions are known:

- `common_groups`: by the first common token of each (lossless vocabulary reduction at one position).
- `piece_groups`: a token that the assistant has too stands alone; one that it lacks joins the assistant's first piece
  of it. Two members.

Members with equal vocabularies have groups of one token, which is the linear pool. For studies: what these pools are
worth is in docs/methods.md. Does not know weights or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ensemble_core.fusion.base import Fused, FusionSpace, linear_pool
from ensemble_core.fusion.support import TokenPool, concluded
from ensemble_core.members.base import Candidates
from ensemble_core.text.vocabulary import Vocabulary
from studies.reductions import Reduction


class SplitPool(TokenPool):
    """groups: (V_main,) int64, a number for each token's group. places: an assistant's tokens as main's, or None."""

    name = "split"

    def __init__(self, space: FusionSpace, groups: Tensor, places: Tensor | None = None) -> None:
        super().__init__(space)
        self._groups = groups
        if places is not None:
            self._space._maps = [places]

    def fuse(self, candidates: Sequence[Candidates], weights: Tensor) -> Fused:
        """See `Fusion.fuse`."""
        support, weights = self.heard(candidates, weights)
        shares = support.shares()
        main, own = shares[:, 0, :-1], self._groups[support.token_ids]
        for member in range(1, shares.shape[1]):
            inside = shares[:, member, :-1]
            shares[:, member, :-1] = _split(inside, main, own)
        return concluded(support, linear_pool(weights, shares))


def _split(inside: Tensor, main: Tensor, groups: Tensor) -> Tensor:
    """Each group's mass (B, S) shared out as main's; where main gives a group nothing it stays as it is."""
    rows = torch.arange(len(groups)).unsqueeze(1) << 32
    found, inverse = torch.unique(rows | groups, return_inverse=True)
    totals = torch.zeros(2, len(found)).index_add_(
        1, inverse.flatten(), torch.stack([main.flatten(), inside.flatten()])
    )
    of_main, of_member = totals[0][inverse], totals[1][inverse]
    return torch.where(of_main > 0, of_member * main / of_main.clamp_min(1e-30), inside)


def common_groups(reduction: Reduction) -> Tensor:
    """(V,) each token's first common token; tokens without one stand alone."""
    size = len(reduction.sequences)
    return torch.tensor([each[0] if each else size + i for i, each in enumerate(reduction.sequences)])


def common_places(assistant: Reduction, main: Reduction) -> Tensor:
    """(V_assistant,) main's token of each token's first common token; -1 for none."""
    ids = {each[0]: i for i, each in enumerate(main.sequences) if len(each) == 1}
    return torch.tensor([ids[each[0]] if each else -1 for each in assistant.sequences])


def piece_groups(main: Vocabulary, assistant: Vocabulary) -> Tensor:
    """(V_main,) main's id of what the assistant would write first of each token."""
    groups = list(range(len(main)))
    for token_id in range(len(main)):
        spelt = main.text_bytes(token_id)
        if spelt and spelt not in assistant.ids_by_bytes:
            groups[token_id] = _first_piece(spelt, main, assistant, token_id)
    return torch.tensor(groups)


def _first_piece(spelt: bytes, main: Vocabulary, assistant: Vocabulary, token_id: int) -> int:
    """The token itself where it is no text, or where main has no such piece."""
    try:
        ids = assistant.encode(spelt.decode())
    except UnicodeDecodeError:
        return token_id
    return main.ids_by_bytes.get(assistant.text_bytes(ids[0]), token_id) if ids else token_id
