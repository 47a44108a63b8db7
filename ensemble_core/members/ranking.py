"""The order of tokens: likelier first, of equals the lowest id.

Logits in bfloat16 have many equals, and `topk` neither orders them nor says which of them it keeps. Here each token
gets a key, an integer that no other token of its row has, so the first n of a row are always the same and the first n
of more. Equal means the same float32; -0.0 equals 0.0. NaN comes first, so that a cut never hides it.

Where ids rise from place to place, a long row is searched through stripes. A row is cut into blocks of 1,024 places;
a block is 64 stripes that lie side by side, each of every 64th place. A few last places are in no stripe.

Knows numbers and ids; does not know logits, members or requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRIPE = 16  # places of a stripe
BESIDE = 64  # stripes of a block
_BLOCK = STRIPE * BESIDE


def ranked(numbers: Tensor, num: int, token_ids: Tensor | None = None) -> Tensor:
    """Places of the first `num` (or all) of each row in the order: (..., W) of any float dtype -> (..., num) int64.

    token_ids: (..., W), the ids that stand there, below 2^31; None: they rise from place to place.
    """
    width = numbers.shape[-1]
    if has_stripes(width, num) and (token_ids is None or _rises(token_ids)):
        places = within_reach(peaks(numbers), num, width)
        return places.gather(-1, ranked(numbers.gather(-1, places), num, places))
    if token_ids is None:
        token_ids = torch.arange(width, device=numbers.device)
    return _keys(numbers, token_ids).topk(min(num, width), dim=-1).indices


def has_stripes(width: int, num: int) -> bool:
    """Whether rows are so long that the search for the first `num` goes through stripes."""
    return width // _BLOCK * BESIDE >= 4 * (num + BESIDE)


def peaks(numbers: Tensor) -> Tensor:
    """The largest number of each stripe, (..., W) -> (..., stripes)."""
    blocks = numbers.shape[-1] // _BLOCK
    whole = numbers[..., : blocks * _BLOCK]
    return whole.reshape(*numbers.shape[:-1], blocks, STRIPE, BESIDE).amax(dim=-2).flatten(-2)


def within_reach(peaks: Tensor, num: int, width: int) -> Tensor:
    """Places among which the first `num` are: (..., stripes) peaks of rows of `width` -> (..., C) int64.

    Take the first `num + BESIDE - 1` stripes, by peak and number. Then for each stripe that is left out, `num` of
    those taken are in other blocks (its own block has at most BESIDE - 1 more). Each of these has a higher peak, or
    the same peak in an earlier block, where all ids are lower. So `num` places come before all that is left out.
    """
    keys = _keys(peaks, torch.arange(peaks.shape[-1], device=peaks.device))
    stripes = keys.topk(num + BESIDE - 1, dim=-1, sorted=False).indices
    first = stripes + stripes // BESIDE * (_BLOCK - BESIDE)
    steps = torch.arange(0, _BLOCK, BESIDE, device=peaks.device)
    places = (first.unsqueeze(-1) + steps).flatten(-2)
    rest = torch.arange(width // _BLOCK * _BLOCK, width, device=peaks.device)
    return torch.cat([places, rest.expand(*places.shape[:-1], -1)], dim=-1)


def _keys(numbers: Tensor, token_ids: Tensor) -> Tensor:
    """(..., W) int64, the larger the earlier in the order; equal for no two places of a row."""
    plain = numbers.float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    bits = plain.add_(0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    bits ^= (bits >> 31).bitwise_and_(0x7FFF_FFFF)  # the bits of a negative number rise as it falls
    keys = bits.long().bitwise_left_shift_(32)
    return keys.sub_(token_ids)


def _rises(token_ids: Tensor) -> bool:
    """Whether each id is higher than the one before it, in every row; of a repeated row one is read."""
    rows = token_ids if token_ids.stride(0) else token_ids[:1]
    return bool((rows[..., 1:] > rows[..., :-1]).all())
