"""What compiled loops have in common: a team of threads, frames of arguments, bfloat16, exp, kept machine code.

A loop is a C function that numba compiles. Every thread of a team runs it, and takes each `threads`-th item. The team
is torch's own: the function goes to the OpenMP runtime that torch has loaded (`GOMP_parallel`), since threads of a
second runtime would fight torch's spinning ones for the cores; where there is none, the import fails. Arguments are
one frame of 64-bit words: addresses, sizes, bits of floats. The type of the frame's pointer is that of its numbers.

Fast math is on but for NaN and infinity, which must come through: a row that is not finite has to be seen. Machine
code lies under `$UNISONO_HOME`, by the digest of this folder's sources. Loops that are to become vector instructions
count from 0 over an array or a slice of one.

Knows numbers; does not know attention, logits or layers.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray
from torch import Tensor

from ensemble_core.home import home

LANES = 16  # float32 in a vector of the widest instructions
Number = Any  # numpy's scalars inside compiled code
Array = NDArray[Any]
Frame = Any  # a pointer

_GRAIN = 32_768  # numbers that are worth a second thread, as in torch
_OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp", "afn"}, "error_model": "numpy"}
_TYPES = {torch.float32: types.float32, torch.bfloat16: types.uint16}


def _openmp() -> ctypes.CDLL:
    """The OpenMP runtime whose threads torch uses. Raises ImportError where it is none that we know."""
    package = Path(torch.__file__).parent
    own = [path for folder in ("lib", "../torch.libs") for path in sorted((package / folder).glob("libgomp*.so*"))]
    try:
        library = ctypes.CDLL(str(own[0]) if own else "libgomp.so.1")
        llvmlite.binding.add_symbol("omp_get_thread_num", _address(library.omp_get_thread_num))
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
    except (OSError, AttributeError) as error:
        raise ImportError(f"torch has no GNU OpenMP runtime here: {error}") from error
    return library


def _address(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


_OPENMP = _openmp()
_thread_num = types.ExternalFunction("omp_get_thread_num", types.intc())
if not numba.config.CACHE_DIR:
    numba.config.CACHE_DIR = str(home() / "compiled" / _sources())


@lru_cache
def _compiled(loop: Callable[[Frame], None], dtype: torch.dtype) -> Any:
    """Compiled for numbers of this type, at the first call unless its machine code is there."""
    signature = types.void(types.CPointer(_TYPES[dtype]))
    try:
        return cfunc(signature, cache=True, **_OPTIONS)(loop)
    except (RuntimeError, OSError):  # no folder can be written
        return cfunc(signature, **_OPTIONS)(loop)


def run(loop: Callable[[Frame], None], dtype: torch.dtype, work: int, *words: int | Tensor) -> None:
    """Run a loop over a frame: its threads, then words; of a tensor, which must be contiguous, its address.

    dtype: of the numbers. work: how many of them are read; a small loop that waits for another thread is slower, and
    on a busy machine by far.
    """
    threads = torch.get_num_threads() if work >= _GRAIN else 1
    addresses = (_start(word) if isinstance(word, Tensor) else word for word in words)
    frame = (ctypes.c_int64 * (1 + len(words)))(threads, *addresses)
    compiled = _compiled(loop, dtype)
    if threads == 1:
        compiled.ctypes(ctypes.cast(frame, compiled.ctypes.argtypes[0]))
    else:
        _OPENMP.GOMP_parallel(compiled.address, ctypes.byref(frame), threads, 0)


def _start(tensor: Tensor) -> int:
    assert tensor.is_contiguous(), "a loop reads memory, not strides"
    return tensor.data_ptr()


def bits(number: float) -> int:
    """A float32 as a word of a frame."""
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A part of a loop; sizes that are constants outside are constants in it."""
    return njit(forceinline=True, **_OPTIONS)(function)  # type: ignore[no-any-return]


@intrinsic  # type: ignore[untyped-decorator]
def word(context: Any, frame: Any, index: Any) -> Any:
    """A word of a frame as int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.gep(_words(builder, arguments[0]), [arguments[1]]))

    return types.int64(frame, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def numbers(context: Any, frame: Any, index: Any) -> Any:
    """Where a word of a frame points to: numbers of the frame's type."""
    return types.CPointer(frame.dtype)(frame, types.intp), _pointer


@intrinsic  # type: ignore[untyped-decorator]
def floats(context: Any, frame: Any, index: Any) -> Any:
    """Where a word of a frame points to: float32."""
    return types.CPointer(types.float32)(frame, types.intp), _pointer


@intrinsic  # type: ignore[untyped-decorator]
def integers(context: Any, frame: Any, index: Any) -> Any:
    """Where a word of a frame points to: int64."""
    return types.CPointer(types.int64)(frame, types.intp), _pointer


@intrinsic  # type: ignore[untyped-decorator]
def short_integers(context: Any, frame: Any, index: Any) -> Any:
    """Where a word of a frame points to: int32."""
    return types.CPointer(types.int32)(frame, types.intp), _pointer


def _words(builder: Any, frame: Any) -> Any:
    return builder.bitcast(frame, ir.IntType(64).as_pointer())


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    address = builder.load(builder.gep(_words(builder, arguments[0]), [arguments[1]]))
    return builder.inttoptr(address, context.get_value_type(signature.return_type))


@inlined
def thread() -> int:
    """Which of the team's threads this is; the number of all is the frame's first word."""
    return _thread_num()  # type: ignore[no-any-return]


@intrinsic  # type: ignore[untyped-decorator]
def float_of(context: Any, bits: Any) -> Any:
    """The float32 with these bits (uint32)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(context: Any, number: Any) -> Any:
    """The bits (uint32) of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def wide(number: Any) -> Any:
    """A number of a frame's array as float32."""
    raise NotImplementedError  # in compiled code alone


@overload(wide, inline="always")  # type: ignore[untyped-decorator]
def _wide(number: Any) -> Any:
    def of_bfloat16(number: Any) -> Any:
        return float_of(np.uint32(np.uint32(number) << np.uint32(16)))

    def of_float32(number: Any) -> Any:
        return number

    return of_bfloat16 if number == types.uint16 else of_float32


def narrow(number: Any, into: Any) -> Any:
    """A float32 as a number of the array that it goes into, rounded to even."""
    raise NotImplementedError  # in compiled code alone


@overload(narrow, inline="always")  # type: ignore[untyped-decorator]
def _narrow(number: Any, into: Any) -> Any:
    def to_bfloat16(number: Any, into: Any) -> Any:
        bits = bits_of(number)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    def to_float32(number: Any, into: Any) -> Any:
        return number

    return to_bfloat16 if into.dtype == types.uint16 else to_float32


@inlined
def exp(x: Any) -> Any:
    """e^x of a float32 that is at most 0, to 2e-7 of its value; what is below -87 gives 1e-38, NaN stays NaN.

    2^n times a polynomial of the rest: one pass of vector instructions, where a call to the C library is none.
    """
    power = (np.float32(-87.0) if x < np.float32(-87.0) else x) * np.float32(1.4426950408889634)
    whole = np.floor(power + np.float32(0.5))
    rest = power - whole
    value = np.float32(1.535336188319500e-4)
    value = value * rest + np.float32(1.339887440266574e-3)
    value = value * rest + np.float32(9.618437357674640e-3)
    value = value * rest + np.float32(5.550332471162809e-2)
    value = value * rest + np.float32(2.402264791363012e-1)
    value = value * rest + np.float32(6.931472028550421e-1)
    value = value * rest + np.float32(1.0)
    return value * float_of(np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23)))


@inlined
def largest(numbers: Array, top: Any) -> Any:
    """The largest of `top` and the numbers, lane by lane."""
    lanes, whole = np.full(LANES, top), len(numbers) // LANES * LANES
    for j in range(0, whole, LANES):
        for i in range(LANES):
            lanes[i] = numbers[j + i] if numbers[j + i] > lanes[i] else lanes[i]
    for j in range(whole, len(numbers)):
        top = numbers[j] if numbers[j] > top else top
    for i in range(LANES):
        top = lanes[i] if lanes[i] > top else top
    return top
