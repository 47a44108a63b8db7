"""What a text costs as it grows: respelling it in each member's tokens, and watching it for stop strings.

    python -m benchmarks.text_growth [--config configs/demo.yaml] [--quick]

Milliseconds per sequence, member and step, with one more character at each step, at 1,000 and 8,000 characters. No
model runs. Stop strings: 16 of 1,024 characters, five characters a step; some texts nearly complete them.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from benchmarks.ledger import Check, Report, Value, arguments
from benchmarks.stopwatch import Spread
from ensemble_core.config import load_config
from ensemble_core.members.loading.checkpoints import load_vocabulary
from ensemble_core.text.alignment import Track
from ensemble_core.text.detokenizer import Detokenizer
from ensemble_core.text.vocabulary import Vocabulary

LENGTHS = (1000, 8000)
_RECORDS = [{"id": i, "name": f"user{i * 37 % 101}", "tags": ["a", "b"], "score": i / 7} for i in range(300)]
TEXTS = {
    "English": "The council met on Tuesday to discuss the new proposal, which wasn't popular with everybody. ",
    "Chinese": "人工智能正在改变我们的生活方式。许多研究人员认为，未来十年内，大型语言模型将成为日常工作中的工具。",
    "Chinese, no signs": "今天天气很好我和朋友们一起去公园散步看见许多孩子在草地上奔跑",
    "minified JSON": json.dumps(_RECORDS, separators=(",", ":")),
    "a": "a",
    "=": "=",
    "哈": "哈",
    "newlines": "\n",
}
T = TypeVar("T")
NUM_STOPS, STOP_LENGTH, PIECE = 16, 1024, 5


def respelling(vocabulary: Vocabulary, text: str, steps: int) -> Spread:
    """Seconds of a `respell` with one more character, up to the whole text."""
    track = Track(vocabulary, [0])
    track.respell(text[:-steps])
    return _timed(track.respell, (text[:length] for length in range(len(text) - steps + 1, len(text) + 1)))


def watching(stops: tuple[str, ...], text: str, steps: int) -> Spread:
    """Seconds of a `feed` of five characters, of which as many came before that a stop string can be near its end."""
    detokenizer, start = Detokenizer(stops), 2 * STOP_LENGTH
    detokenizer.feed(text[:start].encode())
    places = range(start, start + steps * PIECE, PIECE)
    return _timed(detokenizer.feed, (text[place : place + PIECE].encode() for place in places))


def _timed(call: Callable[[T], object], values: Iterable[T]) -> Spread:
    seconds = []
    for value in values:
        started = time.perf_counter()
        call(value)
        seconds.append(time.perf_counter() - started)
    return Spread.of(seconds)


def main() -> None:
    """Measure every member's vocabulary on every text, then the stop strings."""
    args = arguments(__doc__).parse_args()
    steps = 10 if args.quick else 100
    respelt: list[dict[str, Value]] = []
    for name, member in load_config(args.config).members.items():
        vocabulary = load_vocabulary(name, member)
        for kind, unit in TEXTS.items():
            texts = {length: (unit * length)[:length] for length in LENGTHS}
            costs = {f"{n}": respelling(vocabulary, text, steps).median * 1e3 for n, text in texts.items()}
            respelt.append({"member": name, "text": kind, **costs})
    rng = random.Random(0)
    stops = {
        "random": tuple("".join(rng.choices("abcdefgh ", k=STOP_LENGTH)) for _ in range(NUM_STOPS)),
        "a...ab": tuple("a" * (STOP_LENGTH - 1 - rank) + "b" for rank in range(NUM_STOPS)),
    }
    watched: list[dict[str, Value]] = [
        {"stops": kind, "text": text, "ms": watching(strings, TEXTS[text] * 8000, steps).median * 1e3}
        for kind, strings in stops.items()
        for text in ("English", "a")
    ]
    worst = max(float(str(row["8000"])) for row in respelt)
    checks = [
        Check("respelling 8,000 characters, ms", worst, "<=", 0.2),
        Check("16 stop strings of 1,024, ms", max(float(str(row["ms"])) for row in watched), "<=", 0.1),
    ]
    tables = {"respelling": respelt, "stop strings": watched}
    Report("text_growth", tables, checks, {"steps": steps, "quick": args.quick}).print()


if __name__ == "__main__":
    main()
