"""Products of small tiles of bfloat16 numbers, summed in float32 registers.

C (6, 64) = A (6, K) B (K, 64), or fewer rows. A and B come as words of two numbers that follow each other along K: a
row of A has K / 2 words, and a row of B has 64, each of two numbers that lie one under the other. Sums run along K in
order, whatever K is: a row of C does not depend on the other rows, and zeros at the end change nothing.

A processor with AVX512-BF16 multiplies such words itself. One with AVX2 alone widens them, which costs two cheap
operations a word for all rows, and has half the registers, so it goes over fewer columns at a time.

Knows addresses and steps; does not know what is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ROWS, COLUMNS = 6, 64
_INSTRUCTION = "llvm.x86.avx512bf16.dpbf16ps.512"
_MULTIPLY_ADD = "llvm.fma.v8f32"
_GROUPS = {
    1: 64,
    2: 32,
    3: 32,
    4: 16,
    5: 16,
    6: 16,
}  # rows -> columns whose sums AVX2 holds in 12 registers or fewer


def can_multiply() -> bool:
    """Whether there are such products on this processor."""
    return has_instruction() or (_has("avx2") and _has("fma"))


def has_instruction() -> bool:
    """Whether this processor multiplies pairs of bfloat16."""
    return _has("avx512bf16")


def _has(feature: str) -> bool:
    return bool(llvmlite.binding.get_host_cpu_features().get(feature, False))


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def product(rows: int, adds: bool = False) -> Callable[..., Any]:
    """An intrinsic: (address of C, its step, of A, its step, of B, its step, words of K); steps: 32-bit numbers.

    rows: of A and C, at most 6. adds: to what C holds.
    """

    def multiply(context: Any, c: Any, c_step: Any, a: Any, a_step: Any, b: Any, b_step: Any, num: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            tile = _PairTile(builder, 16) if has_instruction() else _WideTile(builder, 8)
            columns = COLUMNS if has_instruction() else _GROUPS[rows]
            for first in range(0, COLUMNS, columns):
                _generate(tile, rows, range(first, first + columns, tile.lanes), adds, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), generate

    return intrinsic(multiply)  # type: ignore[no-any-return]


class _Tile:
    """Vectors of some lanes, and how a word of A times words of B is added to a sum."""

    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder, self.lanes = builder, lanes
        self.floats = ir.VectorType(ir.FloatType(), lanes)
        self.words = ir.VectorType(ir.IntType(32), lanes)

    @property
    def parts(self) -> tuple[Callable[[Any], Any], ...]:
        """What makes factors of words: sums of their products are the products of words."""
        raise NotImplementedError

    def multiply_add(self, left: Any, right: Any, total: Any) -> Any:
        """total + left * right, lane by lane."""
        raise NotImplementedError

    def everywhere(self, word: Any) -> Any:
        """The word in every lane."""
        undefined = ir.Constant(self.words, ir.Undefined)
        one = self.builder.insert_element(undefined, word, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(one, undefined, zeros)


class _PairTile(_Tile):
    """By the processor's own instruction."""

    @property
    def parts(self) -> tuple[Callable[[Any], Any], ...]:
        return (lambda words: self.builder.bitcast(words, self._pairs),)

    def multiply_add(self, left: Any, right: Any, total: Any) -> Any:
        kind = ir.FunctionType(self.floats, (self.floats, self._pairs, self._pairs))
        multiply = cgutils.get_or_insert_function(self.builder.module, kind, _INSTRUCTION)
        return self.builder.call(multiply, [total, left, right])

    @property
    def _pairs(self) -> Any:
        return ir.VectorType(_BFloat(), 2 * self.lanes)


class _WideTile(_Tile):
    """In float32: a bfloat16 number is the upper half of a float32."""

    @property
    def parts(self) -> tuple[Callable[[Any], Any], ...]:
        return self._first, self._second

    def multiply_add(self, left: Any, right: Any, total: Any) -> Any:
        kind = ir.FunctionType(self.floats, (self.floats,) * 3)
        multiply = cgutils.get_or_insert_function(self.builder.module, kind, _MULTIPLY_ADD)
        return self.builder.call(multiply, [left, right, total])

    def _first(self, words: Any) -> Any:
        shifted = self.builder.shl(words, ir.Constant(self.words, [16] * self.lanes))
        return self.builder.bitcast(shifted, self.floats)

    def _second(self, words: Any) -> Any:
        masked = self.builder.and_(words, ir.Constant(self.words, [0xFFFF0000] * self.lanes))
        return self.builder.bitcast(masked, self.floats)


def _generate(
    tile: _Tile,
    rows: int,
    columns: range,
    adds: bool,
    c: Any,
    c_step: Any,
    a: Any,
    a_step: Any,
    b: Any,
    b_step: Any,
    num: Any,
) -> None:
    """The loop over K for some columns, whose sums stay in registers. columns: the first of each vector."""
    builder, floats = tile.builder, tile.floats
    places = [(row, column) for row in range(rows) for column in columns]
    sums = {place: cgutils.alloca_once(builder, floats) for place in places}

    def cell(row: int, column: int) -> Any:
        return _at(builder, c, builder.mul(c_step, _int(row)), column, floats)

    for place, total in sums.items():
        first = builder.load(cell(*place), align=4) if adds else ir.Constant(floats, [0.0] * tile.lanes)
        builder.store(first, total)
    with cgutils.for_range(builder, num) as loop:
        line = builder.mul(loop.index, b_step)
        rights = [builder.load(_at(builder, b, line, column, tile.words), align=4) for column in columns]
        words = [
            builder.load(
                _at(builder, a, builder.add(builder.mul(a_step, _int(row)), loop.index), 0, ir.IntType(32)),
                align=4,
            )
            for row in range(rows)
        ]
        for part in tile.parts:  # one after the other, so that few registers hold factors
            right = {column: part(word) for column, word in zip(columns, rights, strict=True)}
            for row in range(rows):
                left = part(tile.everywhere(words[row]))
                for column in columns:
                    total = sums[row, column]
                    builder.store(tile.multiply_add(left, right[column], builder.load(total)), total)
    for place, total in sums.items():
        builder.store(builder.load(total), cell(*place), align=4)


def _int(number: int) -> Any:
    return ir.Constant(ir.IntType(64), number)


def _at(builder: Any, start: Any, step: Any, more: int, kind: Any) -> Any:
    """A pointer `step + more` 32-bit numbers past `start`."""
    place = builder.mul(builder.add(step, _int(more)), _int(4))
    return builder.inttoptr(builder.add(start, place), kind.as_pointer())


multiply = product(ROWS)
multiply_and_add = product(ROWS, adds=True)
