"""Makes `stored.json`: asks a running server what `unisono playground --demo` then replays.

    python -m server.playground.record http://127.0.0.1:8000 [FILE]

The server needs the models that are named here. Numbers keep four digits, so that the file stays small.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from server.playground.stored import FILE

_STORY = {"prompt": "The capital of France is", "max_tokens": 40, "temperature": 0}
_LAWS = {"prompt": "Three things that every good cook knows:\n", "max_tokens": 64, "temperature": 0}
_SUM = {"messages": [{"role": "user", "content": "What is 12 times 3? Answer with a number."}], "max_tokens": 40}
_NAMES = {"messages": [{"role": "user", "content": "Name three colours of the rainbow."}], "max_tokens": 40}
_ASKED = [
    *((model, _STORY) for model in ("duet", "gemma3", "smollm2")),
    *((model, _LAWS) for model in ("duet", "gemma3", "smollm2", "duet-verify")),
    ("duet-smollm2", _NAMES | {"temperature": 0}),
    ("smollm2", _NAMES | {"temperature": 0}),
    ("poll", _SUM | {"temperature": 0.7, "seed": 7}),
]


def main(url: str, path: Path) -> None:
    """Ask, and write the file."""
    with httpx.Client(base_url=url, timeout=600.0) as client:
        cards = client.get("/v1/models").raise_for_status().json()["data"]
        wanted = set(_named(cards))
        stored = {
            "models": [card for card in cards if card["id"] in wanted],
            "strategies": client.get("/v1/strategies").raise_for_status().json(),
            "answers": [_asked(client, model, fields) for model, fields in _ASKED],
        }
    path.write_text(
        json.dumps(_rounded(stored), ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")  # noqa: T201


def _named(cards: list[dict[str, Any]]) -> Iterator[str]:
    """The models that are asked, and the members of those that are not members themselves."""
    asked = {model for model, _ in _ASKED}
    for card in cards:
        if card["id"] in asked:
            yield card["id"]
            yield from (card["recipe"] or {}).get("members", ())


def _asked(client: httpx.Client, model: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """One answer in the form in which the playground exports it."""
    body = {"model": model, **fields, "ensemble": {"trace": True}}
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    reply = client.post(path, json=body).raise_for_status().json()
    choice = reply["choices"][0]
    return {
        "model": model,
        "request": body,
        "text": choice["message"]["content"] if "message" in choice else choice["text"],
        "finish_reason": choice["finish_reason"],
        "usage": reply["usage"],
        "served_by": reply.get("served_by"),
        "council": choice.get("council"),
        "trace": choice.get("trace") or [],
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else FILE)
