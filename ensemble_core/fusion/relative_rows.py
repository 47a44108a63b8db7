"""Relative fusion by EM on candidates as one compiled loop over rows, each worked on where it lies in a core's cache.

The same steps as `RelativeFusion.fuse` in torch's operations, against which it is tested. There a row of r is one of
a batch of (B, A) numbers, 6 MB at 32 rows, which every step of the algorithm reads and writes; here a row is finished
before the next begins, and only the few thousand anchors that somebody speaks of are touched. A row does not depend
on the others. One that is not finite comes out as NaN.

Knows candidates as numbers, and matrices; does not know options or members' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ensemble_core.members.base import Candidates
from ensemble_core.members.kernels.compiled.base import (
    Array,
    Frame,
    Number,
    bits,
    bits_of,
    float_of,
    floats,
    inlined,
    integers,
    run,
    short_integers,
    thread,
    word,
)

_PER_MEMBER = 8  # words of a frame
_FIRST = 18  # word of the first member


@dataclass(frozen=True, slots=True)
class Rows:
    """A transfer matrix as the loop reads it; rows sum to 1, empty ones to 0."""

    columns: Tensor  # (V, k) int32
    values: Tensor  # (V, k) float32
    row_mass: Tensor  # (V,) float32


@dataclass(frozen=True, slots=True)
class Bounds:
    """Numbers of the algorithm. reached: places of main's tokens that may join the support."""

    steps: int
    reached: int
    tiny: float
    rounding: float
    supposed: float


def fuse_rows(
    candidates: Sequence[Candidates],
    weights: Tensor,  # (B, M)
    matrices: Sequence[Rows],
    anchor_ids: Tensor,  # (A,) int64
    least: Tensor,  # (B,) main's least candidate, see `support.floors_of`
    limits: Bounds,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Main's ids (B, S), their fused probabilities, that of the rest (B,), each member's unmapped mass (B, M)."""
    num, width = len(weights), candidates[0].token_ids.shape[1] + limits.reached
    token_ids, fused = torch.empty(num, width, dtype=torch.long), torch.empty(num, width)
    rest, unmapped = torch.empty(num), torch.empty(num, len(candidates))
    words: list[int | Tensor] = [num, len(candidates), matrices[0].columns.shape[1], len(anchor_ids)]
    words += [limits.steps, limits.reached, bits(limits.tiny), bits(limits.rounding), bits(limits.supposed), width]
    words += [weights.float().contiguous(), unmapped, anchor_ids, token_ids, fused, rest, least]
    for part, matrix in zip(candidates, matrices, strict=True):
        assert matrix.columns.shape[1] == matrices[0].columns.shape[1], "matrices of one width are expected"
        words += [part.token_ids.shape[1], len(matrix.row_mass)]
        words += [part.logprobs.exp().contiguous(), part.token_ids.contiguous(), part.tail.exp().contiguous()]
        words += [matrix.columns, matrix.values, matrix.row_mass]
    run(_fuse, torch.float32, num * 64 * width, *words)
    return token_ids, fused, rest, unmapped


def _fuse(frame: Frame) -> None:
    num, members, k, outside = word(frame, 1), word(frame, 2), word(frame, 3), word(frame, 4)
    steps, reached, width = word(frame, 5), word(frame, 6), word(frame, 10)
    tiny, rounding = float_of(np.uint32(word(frame, 7))), float_of(np.uint32(word(frame, 8)))
    supposed = float_of(np.uint32(word(frame, 9)))
    weights, unmapped = carray(floats(frame, 11), (num, members)), carray(floats(frame, 12), (num, members))
    anchor_ids = carray(integers(frame, 13), (outside,))
    token_ids, fused = carray(integers(frame, 14), (num, width)), carray(floats(frame, 15), (num, width))
    rest, least = carray(floats(frame, 16), (num,)), carray(floats(frame, 17), (num,))
    num_own = word(frame, _FIRST)
    columns = carray(short_integers(frame, _FIRST + 5), (word(frame, _FIRST + 1), k))
    values = carray(floats(frame, _FIRST + 6), (word(frame, _FIRST + 1), k))
    masses = carray(floats(frame, _FIRST + 7), (word(frame, _FIRST + 1),))

    own, target = np.zeros(outside + 1, np.float32), np.zeros(outside + 1, np.float32)
    q, seen = np.zeros(outside + 1, np.float32), np.zeros(outside + 1, np.bool_)
    touched, best = np.empty(outside + 1, np.int32), np.empty(reached, np.uint64)
    heard, said = np.empty(members, np.float32), np.empty(members, np.float32)
    prior, p = np.empty(width, np.float32), np.empty(width + 1, np.float32)
    step = np.empty(width + 1, np.float32)
    for row in range(thread(), num, word(frame, 0)):
        _listen(frame, row, num, members, tiny, weights, unmapped, heard, said)
        count = _touch(outside, 0, seen, touched)
        count = _project(frame, 0, row, num, k, np.float32(1.0) / said[0], own, count, seen, touched)
        own[outside] = carray(floats(frame, _FIRST + 4), (num,))[row] / said[0]
        for i in range(count):
            target[touched[i]] = own[touched[i]] * heard[0]
        for m in range(1, members):
            share = heard[m] / said[m]
            count = _project(frame, m, row, num, k, share, target, count, seen, touched)
            target[outside] += carray(floats(frame, _FIRST + 4 + _PER_MEMBER * m), (num,))[row] * share

        _largest_gaps(own, target, touched, count, outside, rounding, best)
        tail = _extend(
            frame, row, num, num_own, best, anchor_ids, least[row], supposed, token_ids[row], fused[row]
        )
        mass = tail
        for j in range(width):
            prior[j] = fused[row, j] if masses[token_ids[row, j]] > np.float32(0.0) else np.float32(0.0)
            mass += prior[j]
        at_least = mass if mass > tiny else tiny
        count = _suppose(
            prior, heard[0] / at_least, num_own, token_ids[row], columns, values, target, count, seen, touched
        )
        for j in range(width):
            p[j] = prior[j] / at_least
        p[width] = tail / at_least

        _carry(p, token_ids[row], columns, values, q, touched, count, outside)
        _gather(q, target, touched, count, outside, tiny)
        for turn in range(steps):
            if turn:
                _carry(p, token_ids[row], columns, values, q, touched, count, outside)
            _improve(p, token_ids[row], columns, values, q, target, step, outside, tiny)
        for j in range(width):
            if prior[j] != np.float32(0.0):
                fused[row, j] = p[j] * mass
        rest[row] = p[width] * mass
        for i in range(count):
            own[touched[i]], target[touched[i]], q[touched[i]] = np.float32(0.0), np.float32(0.0), np.float32(0.0)
            seen[touched[i]] = False


@inlined
def _touch(anchor: int, count: int, seen: Array, touched: Array) -> int:
    """Note that somebody speaks of an anchor; returns how many are noted."""
    if seen[anchor]:
        return count
    seen[anchor], touched[count] = True, anchor
    return count + 1


@inlined
def _listen(
    frame: Frame,
    row: int,
    num: int,
    members: int,
    tiny: Number,
    weights: Array,
    unmapped: Array,
    heard: Array,
    said: Array,
) -> None:
    """What each member says of anchors in all, at least `tiny`, and the weights of those who say anything."""
    total = np.float32(0.0)
    for m in range(members):
        at = _FIRST + _PER_MEMBER * m
        size, vocabulary = word(frame, at), word(frame, at + 1)
        shares, ids = carray(floats(frame, at + 2), (num, size)), carray(integers(frame, at + 3), (num, size))
        masses = carray(floats(frame, at + 7), (vocabulary,))
        mapped, lost = np.float32(0.0), np.float32(0.0)
        for j in range(size):
            if masses[ids[row, j]] > np.float32(0.0):
                mapped += shares[row, j]
            else:
                lost += shares[row, j]
        spoken = mapped + carray(floats(frame, at + 4), (num,))[row]
        unmapped[row, m] = lost
        said[m] = tiny if spoken < tiny else spoken
        heard[m] = weights[row, m] * (spoken / said[m])
        total += heard[m]
    for m in range(members):
        heard[m] /= tiny if total < tiny else total


@inlined
def _project(
    frame: Frame,
    m: int,
    row: int,
    num: int,
    k: int,
    share: Number,
    anchors: Array,
    count: int,
    seen: Array,
    touched: Array,
) -> int:
    """Add `share` times what a member's candidates say of anchors; returns how many are touched."""
    at = _FIRST + _PER_MEMBER * m
    size, vocabulary = word(frame, at), word(frame, at + 1)
    shares, ids = carray(floats(frame, at + 2), (num, size)), carray(integers(frame, at + 3), (num, size))
    columns = carray(short_integers(frame, at + 5), (vocabulary, k))
    values = carray(floats(frame, at + 6), (vocabulary, k))
    for j in range(size):
        mass, token = shares[row, j] * share, ids[row, j]
        for t in range(k):
            if values[token, t] != np.float32(0.0):
                count = _touch(columns[token, t], count, seen, touched)
                anchors[columns[token, t]] += mass * values[token, t]
    return count


@inlined
def _largest_gaps(
    own: Array, target: Array, touched: Array, count: int, outside: int, rounding: Number, best: Array
) -> None:
    """Keys of the anchors of which r says most beyond main, the largest first: the gap's bits, then lower ones first.

    0 where there are no more.
    """
    best[:] = 0
    last = len(best) - 1
    for i in range(count):
        anchor = touched[i]
        gap = target[anchor] - own[anchor]
        if anchor == outside or not gap > rounding:
            continue
        key = (np.uint64(bits_of(gap)) << np.uint64(32)) | np.uint64(0xFFFF_FFFF - anchor)
        if key > best[last]:
            at = last
            while at > 0 and best[at - 1] < key:
                best[at] = best[at - 1]
                at -= 1
            best[at] = key


@inlined
def _extend(
    frame: Frame,
    row: int,
    num: int,
    num_own: int,
    best: Array,
    anchor_ids: Array,
    least: Number,
    supposed: Number,
    token_ids: Array,
    prior: Array,
) -> Number:
    """Main's candidates and its own tokens of the anchors with the largest gaps: ids and prior; the tail is returned.

    See `relative._extend`.
    """
    shares = carray(floats(frame, _FIRST + 2), (num, num_own))
    ids = carray(integers(frame, _FIRST + 3), (num, num_own))
    tail = carray(floats(frame, _FIRST + 4), (num,))[row]
    for j in range(num_own):
        token_ids[j], prior[j] = ids[row, j], shares[row, j]
    fresh = 0
    for i in range(len(best)):
        extra = -1
        if best[i]:
            extra = anchor_ids[np.int64(np.uint64(0xFFFF_FFFF) - (best[i] & np.uint64(0xFFFF_FFFF)))]
            for j in range(num_own):
                if token_ids[j] == extra:
                    extra = -1
        token_ids[num_own + i] = token_ids[0] if extra < 0 else extra
        prior[num_own + i] = np.float32(0.0) if extra < 0 else np.float32(1.0)
        fresh += extra >= 0
    floor = supposed * tail / np.float32(max(fresh, 1))
    floor = least if least < floor else floor
    for i in range(len(best)):
        prior[num_own + i] *= floor
    left = tail - np.float32(fresh) * floor
    return np.float32(0.0) if left < np.float32(0.0) else left


@inlined
def _suppose(
    prior: Array,
    scale: Number,
    num_own: int,
    token_ids: Array,
    columns: Array,
    values: Array,
    target: Array,
    count: int,
    seen: Array,
    touched: Array,
) -> int:
    """Put what main is supposed to have beyond its candidates where the support has it, out of what lies outside."""
    outside, taken = len(target) - 1, np.float32(0.0)
    for j in range(num_own, len(token_ids)):
        mass, token = prior[j] * scale, token_ids[j]
        if prior[j] != np.float32(0.0):
            taken += mass
            for t in range(columns.shape[1]):
                if values[token, t] != np.float32(0.0):
                    count = _touch(columns[token, t], count, seen, touched)
                    target[columns[token, t]] += mass * values[token, t]
    left = target[outside] - taken
    target[outside] = np.float32(0.0) if left < np.float32(0.0) else left
    return count


@inlined
def _carry(
    p: Array, token_ids: Array, columns: Array, values: Array, q: Array, touched: Array, count: int, outside: int
) -> None:
    """q = p R_main, the tail outside."""
    for i in range(count):
        q[touched[i]] = np.float32(0.0)
    for j in range(len(token_ids)):
        if p[j] != np.float32(0.0):
            for t in range(columns.shape[1]):
                if values[token_ids[j], t] != np.float32(0.0):
                    q[columns[token_ids[j], t]] += p[j] * values[token_ids[j], t]
    q[outside] += p[len(token_ids)]


@inlined
def _gather(q: Array, target: Array, touched: Array, count: int, outside: int, tiny: Number) -> None:
    """Lay outside what r says of anchors that no token with mass reaches."""
    lost = np.float32(0.0)
    for i in range(count):
        anchor = touched[i]
        if not q[anchor] > tiny:
            lost += target[anchor]
            target[anchor] = np.float32(0.0)
    target[outside] += lost


@inlined
def _improve(
    p: Array,
    token_ids: Array,
    columns: Array,
    values: Array,
    q: Array,
    target: Array,
    step: Array,
    outside: int,
    tiny: Number,
) -> None:
    """p <- p * (R_main (r / q)), normalised; where nothing that r speaks of can be reached p stays."""
    total, last = np.float32(0.0), len(token_ids)
    for j in range(last):
        ratio = np.float32(0.0)
        if p[j] != np.float32(0.0):
            for t in range(columns.shape[1]):
                anchor = columns[token_ids[j], t]
                there = tiny if q[anchor] < tiny else q[anchor]
                ratio += target[anchor] * values[token_ids[j], t] / there
        step[j] = p[j] * ratio
        total += step[j]
    there = tiny if q[outside] < tiny else q[outside]
    step[last] = p[last] * target[outside] / there
    total += step[last]
    if total == np.float32(0.0):
        return
    total = tiny if total < tiny else total
    for j in range(last + 1):
        p[j] = step[j] / total
