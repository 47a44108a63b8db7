"""Products of small tiles of bfloat16 numbers, summed in float32 registers by the processor's own instruction.

C (6, 64) = A (6, K) B (K, 64), or fewer rows. The instruction multiplies pairs of bfloat16 along K, so A and B come
as words of two numbers: a row of A has K / 2 words, and a row of B has 64, each of two numbers that lie one under the
other. Sums run along K in order, whatever K is: a row of C does not depend on the other rows, and zeros at the end
change nothing.

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

ROWS, COLUMNS = 6, 64  # 24 of the 32 vector registers hold sums
_LANES = 16
_INSTRUCTION = "llvm.x86.avx512bf16.dpbf16ps.512"


def has_instruction() -> bool:
    """Whether this processor multiplies pairs of bfloat16."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16", False))


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(ir.IntType(32), _LANES)
_PAIRS = ir.VectorType(_BFloat(), 2 * _LANES)


def product(rows: int, adds: bool = False) -> Callable[..., Any]:
    """An intrinsic: (address of C, its step, of A, its step, of B, its step, words of K); steps: 32-bit numbers.

    rows: of A and C, at most 6. adds: to what C holds.
    """

    def multiply(context: Any, c: Any, c_step: Any, a: Any, a_step: Any, b: Any, b_step: Any, num: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _generate(builder, rows, adds, *arguments)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), generate

    return intrinsic(multiply)  # type: ignore[no-any-return]


def _generate(
    builder: Any, rows: int, adds: bool, c: Any, c_step: Any, a: Any, a_step: Any, b: Any, b_step: Any, num: Any
) -> None:
    multiply = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_FLOATS, (_FLOATS, _PAIRS, _PAIRS)), _INSTRUCTION
    )
    vectors = COLUMNS // _LANES
    places = [(row, vector) for row in range(rows) for vector in range(vectors)]
    sums = {place: cgutils.alloca_once(builder, _FLOATS) for place in places}

    def cell(row: int, vector: int) -> Any:
        return _at(builder, c, builder.mul(c_step, _int(row)), vector * _LANES, _FLOATS)

    for place, total in sums.items():
        first = builder.load(cell(*place), align=4) if adds else ir.Constant(_FLOATS, [0.0] * _LANES)
        builder.store(first, total)
    with cgutils.for_range(builder, num) as loop:
        line = builder.mul(loop.index, b_step)
        right = [
            builder.bitcast(builder.load(_at(builder, b, line, v * _LANES, _WORDS), align=4), _PAIRS)
            for v in range(vectors)
        ]
        for row in range(rows):
            word = _at(builder, a, builder.add(builder.mul(a_step, _int(row)), loop.index), 0, ir.IntType(32))
            left = builder.bitcast(_splat(builder, builder.load(word, align=4)), _PAIRS)
            for vector in range(vectors):
                total = sums[row, vector]
                builder.store(builder.call(multiply, [builder.load(total), left, right[vector]]), total)
    for place, total in sums.items():
        builder.store(builder.load(total), cell(*place), align=4)


def _int(number: int) -> Any:
    return ir.Constant(ir.IntType(64), number)


def _at(builder: Any, start: Any, step: Any, more: int, kind: Any) -> Any:
    """A pointer `step + more` 32-bit numbers past `start`."""
    place = builder.mul(builder.add(step, _int(more)), _int(4))
    return builder.inttoptr(builder.add(start, place), kind.as_pointer())


def _splat(builder: Any, word: Any) -> Any:
    one = builder.insert_element(ir.Constant(_WORDS, ir.Undefined), word, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(_WORDS, ir.Undefined), ir.Constant(_WORDS, [0] * _LANES))


multiply = product(ROWS)
multiply_and_add = product(ROWS, adds=True)
