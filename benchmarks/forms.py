"""What a form costs: tokens/s with a JSON schema over without, and a stream's gaps while costly forms arrive.

    python -m benchmarks.forms [--config configs/demo.yaml] [--ensemble duet] [--rounds 3] [--quick]

With and without the schema the same prompts run in turn, B places filled once; every answer has exactly as many
tokens: the schema asks for a long list. The second table has one stream whose gaps are measured while others send one
kind of costly form after the other, each in a variant that nobody has sent: schemas with thousands of values, nested
quantifiers, what is not bounded by the grammar engine, slow conversions, ambiguous grammars. `refused`: how many of
them; the others run for 16 tokens. Times are milliseconds; a gap is counted if it ends before its attack does.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterator
from statistics import median

from benchmarks.in_process import in_process
from benchmarks.ledger import Check, Findings, TableRow, arguments
from benchmarks.stopwatch import percentile
from benchmarks.verify import KINDS, Bench
from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import InvalidRequestError, QueueFullError
from ensemble_core.runtime import Runtime

PLACES = (1, 8)
BOUND = 0.9  # tokens/s with a schema over without, 8 streams
GAP_BOUND = 2.0  # longest gap over the median before
_ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 30}, "number": {"type": "integer"}},
    "required": ["name", "number"],
    "additionalProperties": False,
}
SCHEMA = json.dumps({"type": "array", "items": _ITEM, "minItems": 500})


def _chain(number: int) -> str:
    """GBNF in which each rule is known after the next."""
    names = [f"r{number}-{i}" for i in range(2000)]
    rules = "\n".join(f"{name}::={after}" for name, after in itertools.pairwise(names))
    return f'root::={names[0]}\n{rules}\n{names[-1]}::="x"'


BOMBS: dict[str, Callable[[int], TextForm]] = {
    "6,000 values": lambda i: _schema({"enum": [f"{i}-{j}" for j in range(6000)]}),
    "400 choices of objects": lambda i: _schema(
        {"anyOf": [{"type": "object", "properties": {f"p{i}_{j}_{k}": {} for k in range(4)}} for j in range(400)]}
    ),
    "a large multiple": lambda i: _schema({"type": "integer", "multipleOf": 999_983 + 2 * i}),
    "200 patterns": lambda i: _schema(
        {
            "type": "object",
            "properties": {
                f"p{i}_{j}": {"type": "string", "pattern": f"^(a|b{{1,{j + 1}}}){{1,20}}$"} for j in range(200)
            },
            "required": [f"p{i}_{j}" for j in range(200)],
        }
    ),
    "references": lambda i: _schema(
        {
            "$ref": "#/$defs/a0",
            "$defs": {
                f"a{j}": {"anyOf": [{"$ref": f"#/$defs/a{(j * 7 + k + i) % 400}"} for k in range(4)]}
                for j in range(400)
            },
        }
    ),
    "nested quantifiers": lambda i: TextForm("regex", f"((a{{1,1000}}){{1,1000}}){{1,{1000 + i}}}"),
    "an alternation of 8,000": lambda i: TextForm("regex", "|".join(f"{i}x{j}" for j in range(8000))),
    "many states": lambda i: TextForm("regex", "|".join(f".*{letter}.{{{20 + i}}}" for letter in "abcdefghijkl")),
    "a chain in GBNF": lambda i: TextForm("grammar", _chain(i)),
    "an ambiguous grammar": lambda i: TextForm("grammar", f'start: s "{i}"?\ns: s s s | s s | /[a-z ]/ | ""'),
}


def _schema(schema: object) -> TextForm:
    return TextForm("json", json.dumps(schema))


def rates(config: Config, model: str, places: int, num_tokens: int, rounds: int) -> TableRow:
    """Tokens per second, both ways in turn; medians."""
    bench = Bench(config, places)
    prompts = [KINDS[i % 5] + " " * (i // 5) for i in range(places)]
    free = SamplingParams(max_tokens=num_tokens, temperature=0.7, ignore_eos=True, seed=1)
    bound = SamplingParams(max_tokens=num_tokens, temperature=0.7, seed=1, form=TextForm("json", SCHEMA))
    found: dict[str, list[float]] = {"free": [], "bound": []}
    try:
        for params in (free, bound):
            bench.rate(model, None, prompts, params)
        for _ in range(rounds):
            found["free"].append(bench.rate(model, None, prompts, free))
            found["bound"].append(bench.rate(model, None, prompts, bound))
    finally:
        bench.llm.close()
    ratios = [b / a for a, b in zip(found["free"], found["bound"], strict=True)]
    return {
        "B": places,
        "free tokens/s": round(median(found["free"]), 1),
        "with a schema": round(median(found["bound"]), 1),
        "over free": round(median(ratios), 3),
        "over rounds": f"{min(ratios):.2f} .. {max(ratios):.2f}",
    }


async def gaps(runtime: Runtime, model: str, num_bombs: int) -> list[TableRow]:
    """A row for each kind of costly form: a stream's gaps before and meanwhile."""
    rows, serial = list[TableRow](), itertools.count()
    for name, make in BOMBS.items():
        attack: asyncio.Task[int] | None = None
        params = SamplingParams(max_tokens=1500, temperature=0.7, ignore_eos=True, seed=1)
        stream = await runtime.submit([GenerationRequest(f"stream-{name}", model, KINDS[2], params)])
        before, beside, last = list[float](), list[float](), 0.0
        async for _, _output in stream:
            now = time.perf_counter()
            (before if attack is None else beside).append(now - last)
            last = now
            if len(before) > 40 and attack is None:
                attack = asyncio.create_task(_attack(runtime, model, make, num_bombs, serial))
            if attack is not None and attack.done():
                break
        await stream.aclose()
        assert attack is not None
        refused = await attack
        usual = median(before[2:])
        rows.append(
            {
                "form": name,
                "median before": 1e3 * usual,
                "median beside": 1e3 * median(beside),
                "p99 beside": 1e3 * percentile(beside, 99),
                "longest": 1e3 * max(beside),
                "over median before": round(max(beside) / usual, 2),
                "refused": f"{refused} of {num_bombs}",
            }
        )
    return rows


async def _attack(
    runtime: Runtime, model: str, make: Callable[[int], TextForm], num: int, serial: Iterator[int]
) -> int:
    refused = 0
    for _ in range(num):
        i = next(serial)
        params = SamplingParams(max_tokens=16, temperature=0.7, seed=i, form=make(i))
        try:
            async for _, _output in await runtime.submit([GenerationRequest(f"bomb-{i}", model, "a", params)]):
                pass
        except (InvalidRequestError, QueueFullError):
            refused += 1
    return refused


def main() -> None:
    """Measure, tell."""
    parser = arguments(__doc__)
    parser.add_argument("--ensemble", default="duet")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    config = load_config(args.config)
    places, num_tokens, rounds, bombs = ((1, 2), 16, 1, 1) if args.quick else (PLACES, 96, args.rounds, 6)
    rows = [rates(config, args.ensemble, each, num_tokens, rounds) for each in places]
    checks = [
        Check(f"B = {row['B']}: tokens/s with a schema over without", float(str(row["over free"])), ">=", BOUND)
        for row in rows
        if row["B"] == max(places)
    ]
    beside = in_process(config, lambda runtime: gaps(runtime, args.ensemble, bombs))
    worst = max(float(str(row["over median before"])) for row in beside)
    checks.append(Check("longest gap beside costly forms / median", worst, "<=", GAP_BOUND))
    settings = {"model": args.ensemble, "tokens": num_tokens, "rounds": rounds, "quick": args.quick}
    Findings("forms", {"rates": rows, "gaps": beside}, checks, settings).print()


if __name__ == "__main__":
    main()
