"""Three scripted discussions, word for word: what each model reads in each round, and how the vote is weighed.

The files of `discussions/` are what a reader compares with ReConcile (arXiv 2309.13007); `UNISONO_WRITE_GOLDEN=1`
writes them anew.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_config
from scripted_engine import Script, ScriptedEngine, as_json, asked, text_of, whole

from ensemble_core.councils.discuss import vote_weight
from ensemble_core.decoding.requests import Conversation, GenerationRequest

FOLDER = Path(__file__).parent / "discussions"
CHOICE = "Which is the capital of Australia?\nA. Sydney\nB. Canberra\nC. Melbourne"
NUMBER = "A farmer has 17 sheep. All but 9 run away. How many are left?"
WORDS = "Who painted the ceiling of the Sistine Chapel?"
SAMPLES = [
    {
        "question": "What is 7 + 5 x 2?",
        "answer": "17",
        "explanation": "Products come before sums: 5 x 2 is 10, and 7 + 10 is 17.",
        "model": "beta",
    }
]


def opinion(reasoning: str, answer: str, confidence: float) -> str:
    return as_json(reasoning=reasoning, answer=answer, confidence=confidence)


# model -> its answer in each round
DISCUSSIONS: dict[str, tuple[str, str, dict[str, list[str]]]] = {
    "persuaded": (
        "choice",
        CHOICE,
        {
            "alpha": [
                opinion("It is the largest city.", "A", 0.7),
                opinion("Canberra was built for it.", "B", 0.85),
            ],
            "beta": [
                opinion("Parliament sits in Canberra.", "B", 1.0),
                opinion("Parliament sits there.", "B", 1.0),
            ],
            "gamma": [opinion("I believe it is Melbourne.", "C", 0.5), opinion("Beta has a reason.", "B", 0.65)],
        },
    ),
    "outweighed": (
        "number",
        NUMBER,
        {
            "alpha": [opinion("17 - 9 = 8.", "8", 0.6)] * 3,
            "beta": [opinion("All but 9 means that 9 stay.", "9", 0.95)] * 3,
            "gamma": [opinion("Subtract.", "8.0", 0.3)] * 3,
        },
    ),
    "tied": (
        "exact",
        WORDS,
        {
            "alpha": [opinion("He also built the dome.", "Michelangelo", 0.9)] * 3,
            "beta": [opinion("He painted the rooms beside it.", "Raphael", 0.85)] * 3,
            "gamma": [opinion("Raphael worked there.", "raphael.", 0.65)] * 3,
        },
    ),
}


def discussed(name: str, folder: Path) -> str:
    kind, question, script = DISCUSSIONS[name]
    examples = folder / "examples.jsonl"
    examples.write_text("".join(json.dumps(sample) + "\n" for sample in SAMPLES))
    table: dict[str, Any] = {"kind": "discuss", "models": list(script), "rounds": 2, "answer": kind}
    if name == "outweighed":
        table["examples"] = str(examples)
    settings = fake_config(tuple(script), ensembles={"table": table})

    def answer(request: GenerationRequest) -> Script:
        rank = int(request.request_id.split("/")[-2])
        return script[request.model][rank]

    engine = ScriptedEngine(answer)
    prompt = Conversation(({"role": "user", "content": question},))
    (found,) = asyncio.run(whole(engine.chamber(settings), asked("table", prompt, max_tokens=256)))
    assert found.report is not None
    lines = []
    for request in sorted(engine.seen, key=lambda each: each.request_id.split("/")[-2]):
        rank = request.request_id.split("/")[-2]
        answered = script[request.model][int(rank)]
        lines.append(f"=== round {rank}, {request.model} reads\n{text_of(request.prompt)}")
        lines.append(f"--- {request.model} answers\n{answered}")
    weights = found.report.trace["table"]["weights"]
    lines.append(
        f"=== the weighted vote\n{json.dumps(weights)}\n=== the answer, by {found.served_by}\n{found.text}"
    )
    return "\n\n".join(lines) + "\n"


@pytest.mark.parametrize("name", DISCUSSIONS)
def test_a_discussion_is_what_the_file_says(name: str, tmp_path: Path) -> None:
    found = discussed(name, tmp_path)
    path = FOLDER / f"{name}.txt"
    if os.environ.get("UNISONO_WRITE_GOLDEN"):
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("confidence", "weight"),
    [(1.0, 1.0), (0.99, 0.8), (0.9, 0.8), (0.89, 0.5), (0.8, 0.5), (0.79, 0.3), (0.61, 0.3), (0.6, 0.1), (0, 0.1)],
)
def test_confidence_is_recalibrated_as_in_the_paper(confidence: float, weight: float) -> None:
    assert vote_weight(confidence) == weight
