"""A server under mixed load with aborts and errors, for minutes: does its memory stay flat, is nothing lost?

    python -m benchmarks.soak [--config configs/demo.yaml] [--seconds 600] [--clients 16]

Each client does one thing after the other, chosen by a seeded draw: whole answers, streams, streams that it leaves,
several choices, schemas, scored prompts, chats, costly choices that are refused, and bodies that are wrong, too large
or cut off. Checked: every answer has the status that its kind must have; resident memory, caches apart, grows by less
than 5 % after the first minute; at the end nothing runs or waits, no page is held, and a greedy answer is the same as
at the start. Linux alone: memory is read off /proc.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from tqdm import tqdm

from benchmarks import prose
from benchmarks.ledger import Check, Findings, TableRow, arguments
from benchmarks.traffic import serving_process

WARM_SECONDS = 60.0
GROWTH_BOUND = 0.05
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "people": {"type": "integer"}}}


@dataclass(slots=True)
class Soak:
    """One run: where it sends, and what came back."""

    url: str
    models: list[str]
    ends: float
    outcomes: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)

    async def client(self, seed: int) -> None:
        """One thing after the other until the time is over."""
        draw = random.Random(seed)
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as http:
            while time.monotonic() < self.ends:
                kind = draw.choice(list(KINDS))
                expected, act = KINDS[kind]
                try:
                    status = await act(self, http, draw)
                except Exception as error:
                    status = -1
                    self.surprises.append(f"{kind}: {type(error).__name__}: {error}")
                self.outcomes[f"{kind} {status}"] += 1
                if status not in (expected, -1):
                    self.surprises.append(f"{kind}: {status}, expected {expected}")

    def text(self, draw: random.Random, most: int = 12) -> str:
        """Some sentences; half of the time with a beginning that others have, too."""
        return prose.sentences(draw.choice([0, draw.randrange(10_000)]), draw.randint(1, most))

    def fields(self, draw: random.Random, **own: Any) -> dict[str, Any]:
        """A body of /v1/completions."""
        base = {"model": draw.choice(self.models), "prompt": self.text(draw), "max_tokens": draw.randint(1, 48)}
        return base | {"temperature": draw.choice([0, 0.7, 1.3])} | own


async def _post(http: httpx.AsyncClient, body: dict[str, Any], path: str = "/v1/completions") -> int:
    return (await http.post(path, json=body)).status_code


async def _whole(soak: Soak, http: httpx.AsyncClient, draw: random.Random) -> int:
    return await _post(http, soak.fields(draw))


async def _choices(soak: Soak, http: httpx.AsyncClient, draw: random.Random) -> int:
    return await _post(http, soak.fields(draw, n=draw.randint(2, 6)))


async def _scored(soak: Soak, http: httpx.AsyncClient, draw: random.Random) -> int:
    return await _post(http, soak.fields(draw, echo=True, logprobs=draw.randint(0, 20), max_tokens=1))


async def _biased(soak: Soak, http: httpx.AsyncClient, draw: random.Random) -> int:
    bias = {str(draw.randrange(40_000)): draw.uniform(-5, 5) for _ in range(300)}
    return await _post(http, soak.fields(draw, logit_bias=bias, presence_penalty=1.0))


async def _chat(soak: Soak, http: httpx.AsyncClient, draw: random.Random) -> int:
    messages = [{"role": "user", "content": soak.text(draw, 3)}]
    body = {"model": soak.models[0], "messages": messages, "max_tokens": draw.randint(1, 32)}
    return await _post(http, body, "/v1/chat/completions")


async def _schema(soak: Soak, http: httpx.AsyncClient, draw: random.Random) -> int:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    messages = [{"role": "user", "content": soak.text(draw, 2)}]
    body = {"model": soak.models[0], "messages": messages, "max_tokens": 32, "response_format": form}
    return await _post(http, body, "/v1/chat/completions")


async def _stream(soak: Soak, http: httpx.AsyncClient, draw: random.Random) -> int:
    body = soak.fields(draw, stream=True, ensemble=None)
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line async for line in answer.aiter_lines() if line]
    return answer.status_code if lines[-1] == "data: [DONE]" and "error" not in lines[-2][:12] else 0


async def _leave(soak: Soak, http: httpx.AsyncClient, draw: random.Random) -> int:
    body = soak.fields(draw, stream=True, max_tokens=400, ignore_eos=True)
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        left = draw.randint(0, 20)
        async for _line in answer.aiter_lines():
            if (left := left - 1) < 0:
                break
    return answer.status_code


async def _hang_up(soak: Soak, _http: httpx.AsyncClient, draw: random.Random) -> int:
    """A body that ends in its middle."""
    where = urlsplit(soak.url)
    with socket.socket() as sock:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (where.hostname, where.port))
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n"
        await asyncio.get_running_loop().sock_sendall(sock, head + b'{"model":')
        await asyncio.sleep(draw.random() / 2)
    return 0


async def _wrong(soak: Soak, http: httpx.AsyncClient, draw: random.Random) -> int:
    wrong: list[dict[str, Any]] = [{"max_tokens": -1}, {"prompt": []}, {"n": 10**9}, {"temperature": "hot"}]
    return await _post(http, soak.fields(draw, **draw.choice(wrong)))


async def _costly(soak: Soak, http: httpx.AsyncClient, draw: random.Random) -> int:
    fusion = {"name": "relative", "options": {"solver": "search", "steps": 100, "support": "full"}}
    return await _post(http, soak.fields(draw, model=soak.models[0], ensemble={"fusion": fusion}))


async def _unknown(soak: Soak, http: httpx.AsyncClient, draw: random.Random) -> int:
    return await _post(http, soak.fields(draw, model="nobody" * draw.randint(1, 50)))


async def _large(soak: Soak, http: httpx.AsyncClient, draw: random.Random) -> int:
    return await _post(http, soak.fields(draw, prompt="x" * (5 * 2**20)))


Act = Callable[[Soak, httpx.AsyncClient, random.Random], Awaitable[int]]
KINDS: dict[str, tuple[int, Act]] = {
    "whole": (200, _whole),
    "choices": (200, _choices),
    "scored": (200, _scored),
    "biased": (200, _biased),
    "chat": (200, _chat),
    "schema": (200, _schema),
    "stream": (200, _stream),
    "leave": (200, _leave),
    "hang up": (0, _hang_up),
    "wrong": (400, _wrong),
    "costly": (400, _costly),
    "unknown": (404, _unknown),
    "large": (413, _large),
}


def gauges(url: str) -> dict[str, float]:
    """What runs and waits, and the share of each cache that sequences hold."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    names = ("unisono_num_requests", "unisono_member_kv_usage_ratio")  # pages that sequences hold
    return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if x.startswith(names))}


def greedy(url: str, model: str) -> str:
    """An answer that depends on nothing but the weights."""
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 24, "temperature": 0}
    return str(httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"])


def resident(pid: int) -> tuple[int, int]:
    """Bytes of memory that a process holds: beside the caches, and in them.

    Caches take their configured size page by page, as sequences first use them. They are the mappings without huge
    pages (flag nh), see `members/cache/base.py`.
    """
    others = caches = size = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line.startswith("Rss:"):
            size = 1024 * int(line.split()[1])
        elif line.startswith("VmFlags:"):
            if "nh" in line.split():
                caches += size
            else:
                others += size
    return others, caches


Sample = tuple[float, float, float]  # seconds, GB beside the caches, GB in them


async def watched(soak: Soak, pid: int, clients: int, seconds: float) -> list[Sample]:
    """Run all clients; a sample of the process's memory every other second."""
    samples: list[Sample] = []
    begun = time.monotonic()
    work = asyncio.gather(*(soak.client(seed) for seed in range(clients)))
    with tqdm(total=round(seconds), desc="soak", unit="s", disable=None) as bar:
        while not work.done():
            others, caches = resident(pid)
            samples.append((time.monotonic() - begun, others / 1e9, caches / 1e9))
            bar.n = min(round(samples[-1][0]), round(seconds))
            bar.refresh()
            await asyncio.wait([work], timeout=2.0)
    await work
    return samples


def growth(samples: list[Sample], warm: float) -> float:
    """How much more memory the last tenth of the run held than the tenth after it was warm, caches apart; a share."""
    after = [others for at, others, _caches in samples if at >= warm]
    part = max(len(after) // 10, 1)
    first, last = sorted(after[:part])[part // 2], sorted(after[-part:])[part // 2]
    return last / first - 1


def settled(url: str) -> dict[str, float]:
    """The gauges once nothing runs any more, or after 60 s."""
    for _ in range(60):
        found = gauges(url)
        if not any(value for name, value in found.items() if "requests" in name):
            return found
        time.sleep(1)
    return found


def main() -> None:
    """Soak a server of the configuration."""
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=16)
    args = parser.parse_args()
    seconds = 20.0 if args.quick else args.seconds
    warm = min(WARM_SECONDS, seconds / 2)
    with serving_process(args.config) as (url, process):
        models = [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]]
        before = greedy(url, models[0])
        soak = Soak(url, models, time.monotonic() + seconds)
        samples = asyncio.run(watched(soak, process.pid, args.clients, seconds))
        after, end = greedy(url, models[0]), settled(url)
    for line in soak.surprises[:20]:
        print(line)
    print(json.dumps(dict(sorted(soak.outcomes.items())), indent=1))
    checks = [
        Check("answers of another kind than provoked", len(soak.surprises), "<=", 0),
        Check("growth of resident memory after the first minute", growth(samples, warm), "<=", GROWTH_BOUND),
        Check("sequences and pages that are held at the end", sum(end.values()), "<=", 0),
        Check("a greedy answer that differs from the first", float(before != after), "<=", 0),
    ]
    rows: list[TableRow] = [
        {"seconds": round(at), "GB beside the caches": others, "GB in them": caches}
        for at, others, caches in samples[:: max(len(samples) // 40, 1)]
    ]
    settings = {"seconds": seconds, "clients": args.clients, "quick": args.quick, "sent": soak.outcomes.total()}
    Findings("soak", {"memory": rows}, checks=checks, settings=settings).print()


if __name__ == "__main__":
    main()
