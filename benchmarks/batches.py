"""What people who wait notice of a batch: first tokens and gaps of their streams beside it, over those without.

    python -m benchmarks.batches [--config configs/demo.yaml] [--rounds 3] [--quick]

One client sends short streams, one after the other with random pauses, to a server process; in turns with nothing
else there, and beside a batch of `/v1/batches` that fills the places it may take. The batch's answers have different
lengths, so that its requests end and begin all the time; the streams begin once some of them have ended. After a turn
the batch is cancelled, and its requests end before the next one. Milliseconds; the ratio is of the turns that lie
beside each other.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import yaml

from benchmarks.ledger import Check, Findings, TableRow, Value, arguments
from benchmarks.serving import Prompts
from benchmarks.stopwatch import percentile
from benchmarks.traffic import Call, Stream, client, play, send, serving
from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.members.loading.checkpoints import load_tokenizer

BOUND = 2.0  # median time to the first token beside a batch over that without
FIGURES = {"TTFT p50": 50, "TTFT p95": 95, "inter-token p50": 50, "inter-token p95": 95}
_LOOK_SECONDS = 0.1
_ENDED = ("completed", "failed", "cancelled", "expired")


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How much to send."""

    rounds: int = 3
    streams: int = 20  # of a turn
    prompt_tokens: int = 64
    answer_tokens: int = 32
    pause: float = 0.3  # seconds at most between two streams
    lines: int = 2000  # more than a turn can answer
    batch_tokens: tuple[int, int] = (64, 192)
    warm: int = 16  # requests of the batch that end before the streams begin

    def quick(self) -> BatchPlan:
        """To see that it runs."""
        return replace(self, rounds=1, streams=3, answer_tokens=8, lines=200, batch_tokens=(4, 12), warm=2)


def with_files(config: Config, folder: Path) -> Path:
    """A file with this configuration and batches, without councils."""
    server = config.server.model_copy(update={"files_folder": folder / "files"})
    path = folder / "config.yaml"
    served = config.model_copy(update={"server": server, "councils": {}})
    dump = served.model_dump(mode="json", exclude_defaults=True)
    path.write_text(yaml.safe_dump(dump))
    return path


async def turn(session: httpx.AsyncClient, prompts: Prompts, plan: BatchPlan) -> dict[str, float]:
    """Figures of some streams, one after the other."""
    streams = list[Stream]()
    for _ in range(plan.streams):
        call = prompts.call(plan.prompt_tokens, plan.answer_tokens)
        streams.append(await send(session, call, time.perf_counter() + random.uniform(0.0, plan.pause)))
    samples = {
        "TTFT": [stream.ttft for stream in streams],
        "inter-token": [gap for stream in streams for gap in stream.gaps()],
    }
    return {name: 1e3 * percentile(samples[name.split()[0]], q) for name, q in FIGURES.items()}


@asynccontextmanager
async def batch(session: httpx.AsyncClient, calls: Sequence[Call], warm: int) -> AsyncIterator[str]:
    """A batch of these calls, its id: from when so many are answered until it is cancelled and all have ended."""
    lines = "\n".join(json.dumps(_line(number, call)) for number, call in enumerate(calls))
    file = await _post(
        session, "/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", lines.encode())}
    )
    asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    made = await _post(session, "/v1/batches", json=asked)
    while (found := await _get(session, made["id"]))["request_counts"]["completed"] < warm:
        if found["status"] in _ENDED:
            raise RuntimeError(f"the batch ended before its time: {found['status']}, {found['errors']}")
        await asyncio.sleep(_LOOK_SECONDS)
    try:
        yield made["id"]
    finally:
        if (await _get(session, made["id"]))["status"] not in _ENDED:
            await _post(session, f"/v1/batches/{made['id']}/cancel")
        while (await _get(session, made["id"]))["status"] not in _ENDED:
            await asyncio.sleep(_LOOK_SECONDS)


def _line(number: int, call: Call) -> dict[str, object]:
    body = {name: value for name, value in call.body().items() if not name.startswith("stream")}
    return {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}


async def _post(session: httpx.AsyncClient, path: str, **content: Any) -> dict[str, Any]:
    return _said(await session.post(path, **content))


async def _get(session: httpx.AsyncClient, batch_id: str) -> dict[str, Any]:
    return _said(await session.get(f"/v1/batches/{batch_id}"))


def _said(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != 200:
        raise RuntimeError(f"the server answered {response.status_code}: {response.text}")
    return dict(response.json())


async def rounds(url: str, prompts: Prompts, plan: BatchPlan) -> tuple[list[TableRow], float]:
    """Both ways in turn: rows of figures and their ratio, and the requests a second that the batch got done."""
    calm, beside, rates = list[dict[str, float]](), list[dict[str, float]](), list[float]()
    async with client(url) as session:
        for _ in range(plan.rounds):
            calm.append(await turn(session, prompts, plan))
            lengths = random.choices(range(*plan.batch_tokens), k=plan.lines)
            async with batch(
                session, [prompts.call(plan.prompt_tokens, n) for n in lengths], plan.warm
            ) as batch_id:
                started, before = time.perf_counter(), await _completed(session, batch_id)
                beside.append(await turn(session, prompts, plan))
                done = await _completed(session, batch_id) - before
                rates.append(done / (time.perf_counter() - started))
    return [row("alone", calm), row("beside a batch", beside), ratio(calm, beside)], median(rates)


async def _completed(session: httpx.AsyncClient, batch_id: str) -> int:
    return int((await _get(session, batch_id))["request_counts"]["completed"])


def row(title: str, turns: Sequence[dict[str, float]]) -> dict[str, Value]:
    """Medians of all turns."""
    return {"streams": title, **{name: median(each[name] for each in turns) for name in FIGURES}}


def ratio(calm: Sequence[dict[str, float]], beside: Sequence[dict[str, float]]) -> dict[str, Value]:
    """Beside over alone: medians over the rounds."""
    pairs = list(zip(beside, calm, strict=True))
    return {"streams": "beside / alone", **{name: median(b[name] / a[name] for b, a in pairs) for name in FIGURES}}


def main() -> None:
    """Measure the first ensemble of the configuration."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    plan = BatchPlan().quick() if args.quick else BatchPlan(rounds=args.rounds)
    config = load_config(args.config)
    model = next(iter(config.ensembles))
    member = config.ensembles[model].main
    prompts = Prompts(model, load_tokenizer(member, config.members[member]))
    random.seed(1)
    with tempfile.TemporaryDirectory() as folder, serving(with_files(config, Path(folder))) as url:
        asyncio.run(play(url, [prompts.call(plan.prompt_tokens, 8)]))  # warm
        rows, rate = asyncio.run(rounds(url, prompts, plan))
    checks = [Check("median TTFT beside a batch / alone", float(str(rows[-1]["TTFT p50"])), "<=", BOUND)]
    settings = {"model": model, **asdict(plan), "batch requests/s": round(rate, 2), "quick": args.quick}
    Findings("batches", {"streams": rows}, checks, settings).print()


if __name__ == "__main__":
    main()
