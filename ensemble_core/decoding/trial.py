"""The process that tries forms out: it forks a child for each, which may take its time and memory, and be killed.

The grammar engine bounds most of what it does, but not all (`multipleOf`), what is written in Python holds the
interpreter's lock (GBNF, `$ref`s), and a crash of native code takes its process along. So a form is first compiled
here, over the bytes and the control tokens of its vocabulary. A form that is not done soon leaves the cores to
everybody else: two members that step on two cores wait for each other, so any time slice that it gets is a longer
gap of every stream. One JSON object a line: a vocabulary to know or to
forget (no answer), or a form; the answer is its grammar, or why it is refused. Knows no torch, so a fork is cheap;
runs with a low priority.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.grammars import LIMITS, check_finite, grammar_of, tokenizer_of

CPU_SECONDS = 1  # ordinary schemas need a tenth at most
_WALL_SECONDS = 40.0  # on a busy machine a low priority has to wait
_AT_ONCE_SECONDS = 0.1  # ordinary schemas are done by then
_MEMORY = 2 * 2**30  # address space, most of it the interpreter's libraries
_PRIORITY, _LAST_PRIORITY = 10, 19
_NUM_MASKS = 4


def main() -> None:
    """Answer lines until the input ends."""
    os.nice(_PRIORITY)
    tokenizers: dict[int, LLTokenizer] = {}
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        if "forget" in asked:
            tokenizers.pop(asked["forget"], None)
        elif "size" in asked:
            tokenizers[asked["key"]] = _tokenizer(asked)
        else:
            sys.stdout.write(json.dumps(_tried(tokenizers[asked["key"]], asked["form"])) + "\n")
            sys.stdout.flush()


def _tokenizer(asked: dict[str, Any]) -> LLTokenizer:
    """Single bytes in place of ordinary tokens, and the control tokens where they are."""
    named = {int(token_id): name.encode("latin-1") for token_id, name in asked["specials"].items()}
    free = [token_id for token_id in range(asked["size"]) if token_id not in named]
    tokens = [b""] * asked["size"]
    for token_id, name in (*named.items(), *zip(free, (bytes([i]) for i in range(256)), strict=False)):
        tokens[token_id] = name
    return tokenizer_of(tokens, named, asked["stops"], lambda text: [free[byte] for byte in text.encode()])


def _tried(tokenizer: LLTokenizer, form: dict[str, Any]) -> dict[str, str]:
    """What a child finds out."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _as_child(writing, tokenizer, form)
    os.close(writing)
    said = _all_of(reading, child)
    os.close(reading)
    if said is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if said:
        return dict(json.loads(said))
    if said is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
        return {"refusal": f"it takes over {CPU_SECONDS} s to compile"}
    return {"refusal": "the grammar engine fails at it"}


def _all_of(pipe: int, child: int) -> bytes | None:
    """What a child writes to a pipe until it is closed; None: that takes too long. It steps back after a while."""
    said, begun = b"", time.monotonic()
    while (spent := time.monotonic() - begun) < _WALL_SECONDS:
        left = _AT_ONCE_SECONDS - spent
        if left <= 0:
            os.setpriority(os.PRIO_PROCESS, child, _LAST_PRIORITY)
        if select.select([pipe], [], [], left if left > 0 else _WALL_SECONDS - spent)[0]:
            if not (part := os.read(pipe, 65_536)):
                return said
            said += part
    return None


def _as_child(pipe: int, tokenizer: LLTokenizer, form: dict[str, Any]) -> None:
    """Compile, say what was found, and end."""
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        said = json.dumps(_compiled(tokenizer, TextForm(**form))).encode()
        while said:
            said = said[os.write(pipe, said) :]
    finally:
        os._exit(0)


def _compiled(tokenizer: LLTokenizer, form: TextForm) -> dict[str, str]:
    """Errors of the engine itself are left to the one that compiles the form over the whole vocabulary."""
    try:
        grammar = grammar_of(form)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
        for _ in range(_NUM_MASKS):
            if matcher.is_error() or not (bits := matcher.compute_logit_bias()).strip(b"\0"):
                break
            matcher.consume_token(next(i for i, bit in enumerate(bits) if bit))
        if not matcher.is_error():
            check_finite(form)
    except (ValueError, RecursionError, MemoryError) as error:
        return {"refusal": str(error) or type(error).__name__}
    return {"grammar": grammar}


if __name__ == "__main__":
    main()
