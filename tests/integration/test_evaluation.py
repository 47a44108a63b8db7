"""`unisono evaluate` and `unisono tune` over two tiny real models with different tokenizers, float32."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import Kind
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ensemble_core.config_file import load_config
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.evaluation import workbench
from ensemble_core.evaluation.likelihood import Likelihood
from ensemble_core.evaluation.offline import document_sums, fuse_positions, shared_positions
from ensemble_core.evaluation.spelling import Document
from ensemble_core.evaluation.variants import parse_variant
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.transfer.build import build_matrices
from server.cli import app

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and Größe does not mind at all.",
    "In a village by the sea there lived a fisherman; 你好 was what he said.",
    "def add(left, right):\n\treturn left + right\n",
    "Every morning the old man rowed out to the rocks; the gulls followed him, and the tide brought him home.",
    "Take 250 g of flour, 3 eggs and a little salt. Stir, wait 20 minutes, and bake it until it is golden.",
    "for word in words:\n\tcounts[word] = counts.get(word, 0) + 1\nprint(sorted(counts))\n",
]
CONTRASTIVE = "duet?fusion=contrastive&options.expert=llama&options.base=gpt2"
SCORING = SamplingParams(max_tokens=0, echo=True, logprobs=0)


def configuration(folder: Path, checkpoints: dict[Kind, Path], num_candidates: int) -> Path:
    member = {"dtype": "float32", "device": "cpu", "kv_memory": "8MiB", "max_len": 256}
    raw = {
        "members": {kind: {"model": str(checkpoints[kind]), **member} for kind in ("llama", "gpt2")},
        "ensembles": {"duet": {"members": {"llama": 0.7, "gpt2": 0.3}, "main": "llama"}},
        "matrices": {"folder": str(folder / "matrices")},
        "scheduler": {"token_budget": 64, "num_candidates": num_candidates},
    }
    path = folder / f"config-{num_candidates}.yaml"
    path.write_text("# weights: to be tuned\n" + yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config(tiny_checkpoints: dict[Kind, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = configuration(tmp_path_factory.mktemp("evaluation"), tiny_checkpoints, 200)
    build_matrices(load_config(path), force=True, only_missing=False)
    return path


@pytest.fixture(scope="module")
def bench(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with Workbench(load_config(config), tmp_path_factory.mktemp("scores")) as made:
        yield made


def test_offline_and_online_agree_where_the_truth_is_among_the_candidates(bench: Workbench) -> None:
    """Online the true next tokens join the candidates; offline they do not, so elsewhere the two differ by design."""
    greedy = SamplingParams(max_tokens=30, temperature=0.0)
    pairs = zip(TEXTS, bench.llm().generate(TEXTS, greedy, "duet"), strict=True)
    texts = [text + answer.text for text, answer in pairs]  # random models know nothing but what they say
    scores = bench.scores([Document(text) for text in texts], ["llama", "gpt2"], "test")
    recipe = bench.recipe(parse_variant("duet"))
    shared = shared_positions(scores, recipe.members)
    fused = fuse_positions(scores, recipe, shared, bench.num_candidates)
    known = torch.ones(len(shared.rows), dtype=torch.bool)
    for name, slots in zip(recipe.members, shared.slots, strict=True):
        part = scores.members[name]
        owner = torch.full((len(part.candidates),), -1)
        owner[part.slot[part.slot >= 0].long()] = part.token[part.slot >= 0].long()
        known &= (part.candidates.token_ids[slots] == owner[slots].unsqueeze(1)).any(dim=1)
    main = scores.members["llama"]
    offline = main.logprob.index_put((shared.rows,), fused.logprobs)
    comparable = torch.ones(len(offline), dtype=torch.bool).index_put((shared.rows,), known)
    for index, text in enumerate(texts):
        own = main.document == index
        (answer,) = bench.llm().generate([text], SCORING, "duet")
        online = torch.tensor([entry.logprob for entry in answer.prompt_logprobs][-int(own.sum()) :])
        keep = comparable[own]
        assert torch.allclose(offline[own][keep], online[keep], atol=1e-3)
    assert 10 < int(known.sum()) < len(known), "both kinds of position are there"


@pytest.mark.parametrize("fusion", ["relative", "projection", "union", "gac", "eva"])
@pytest.mark.parametrize("num_candidates", [16, 200])
def test_main_with_all_the_weight_scores_as_alone(bench: Workbench, fusion: str, num_candidates: int) -> None:
    """A position that is fused with weight 1 on main costs what main's own exact log-probability says."""
    scores = bench.scores([Document(text) for text in TEXTS], ["llama", "gpt2"], "test")
    recipe = bench.recipe(parse_variant(f"duet?fusion={fusion}"))
    shared = shared_positions(scores, recipe.members)
    fused = fuse_positions(scores, recipe, shared, num_candidates, (1.0, 0.0))
    assert len(shared.rows) > 200
    assert not fused.ruled_out.any()
    expected = scores.members["llama"].logprob[shared.rows]
    torch.testing.assert_close(fused.logprobs, expected, atol=1e-5, rtol=0.0)


def test_a_members_bits_are_its_models_own(bench: Workbench, tiny_checkpoints: dict[Kind, Path]) -> None:
    scores = bench.scores([Document(text) for text in TEXTS], ["llama", "gpt2"], "test")
    for kind in ("llama", "gpt2"):
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints[kind], dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoints[kind])
        sums = document_sums(scores, bench.recipe(parse_variant(kind)), bench.vocabularies, bench.num_candidates)
        for index, text in enumerate(TEXTS):
            ids = torch.tensor(tokenizer(text)["input_ids"])
            with torch.no_grad():
                logprobs = model(ids.unsqueeze(0)).logits[0, :-1].log_softmax(dim=1)
            own = logprobs.gather(1, ids[1:].unsqueeze(1)).squeeze(1)
            part = scores.members[kind]
            counted = int(part.scored[part.document == index].sum())
            assert counted >= len(own) - 8, "nearly all of the text"
            expected = -float(own[-counted:].sum()) / math.log(2)
            assert float(sums.bits[index]) == pytest.approx(expected, rel=1e-4)


def test_stored_scores_need_no_model(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document(text) for text in TEXTS]
    bench.scores(documents, ["llama", "gpt2"], "test")
    monkeypatch.setattr(workbench, "LLM", lambda config: pytest.fail("a model is loaded"))
    with Workbench(bench.config, bench.cache) as second:
        scores = second.scores(documents, ["llama", "gpt2"], "test")
        assert second.sums(scores, second.recipe(parse_variant("duet?weights.gpt2=0.9"))).bits.isfinite().all()


@pytest.fixture
def tasks(tmp_path: Path) -> list[str]:
    """Options of --task for three kinds of task."""
    choices = [
        {"question": f"What is {n}?", "A": "one", "B": "two two", "C": "three", "answer": "ABC"[n % 3]}
        for n in range(6)
    ]
    answers = [{"question": f"Who is number {n}?", "answer": ["x", "y"]} for n in range(3)]
    files = {"choices": choices, "answers": answers, "texts": [{"text": text} for text in TEXTS]}
    options = []
    for name, records in files.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        options += ["--task", f"{name}={path}"]
    return options


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_weights_that_follow_a_prompt_are_left_out_unless_named(
    config: Path, tasks: list[str], tmp_path: Path
) -> None:
    raw = yaml.safe_load(config.read_text())
    raw["ensembles"]["weighed"] = {
        **raw["ensembles"]["duet"],
        "weighting": "perplexity",
        "fusion": {"name": "projection"},
    }
    path = config.with_name("weighed.yaml")
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    command = ["evaluate", "--config", str(path), "--cache", str(tmp_path / "cache")]
    everything = invoke(*command, *tasks, "--measure", "bits")
    assert everything.exit_code == 0, everything.output
    assert "weighed is left out" in everything.stderr
    assert "duet" in everything.stdout
    assert "weighed" not in everything.stdout
    named = invoke(*command, *tasks[2:4], "--measure", "score", "--model", "weighed")
    assert named.exit_code == 0, named.output
    assert "weighed" in named.stdout


def test_evaluate_writes_everything_and_goes_on_where_it_was(
    config: Path, tasks: list[str], tmp_path: Path
) -> None:
    out, cache = tmp_path / "out", str(tmp_path / "cache")
    command = ["evaluate", "--config", str(config), *tasks, "--cache", cache, "--out", str(out)]
    models = ["--model", "duet", "--model", "llama", "--model", "gpt2"]
    first = invoke(*command, *models)
    assert first.exit_code == 0, first.output
    found = json.loads((out / "results.json").read_text())
    metrics = {(result["task"], result["metric"]) for result in found["results"]}
    assert {("texts", "bits_per_byte"), ("choices", "accuracy"), ("answers", "accuracy")} <= metrics
    assert ("texts", "accuracy") not in metrics
    assert (out / "results.png").stat().st_size > 1000
    assert first.stdout.strip() == (out / "results.txt").read_text().strip()
    lines = (out / "items.jsonl").read_text().splitlines()
    assert len(lines) == 3 * (6 + 6 + 3 + 3 + len(TEXTS))

    refused = invoke(*command, *models)
    assert refused.exit_code == 1
    assert "--resume" in refused.stderr

    (out / "items.jsonl").write_text("\n".join(lines[:20]) + "\n")
    again = invoke(*command, *models, "--resume")
    assert again.stdout == first.stdout
    assert sorted((out / "items.jsonl").read_text().splitlines()) == sorted(lines)

    Path(tasks[1].partition("=")[2]).write_text('{"question": "q", "A": "a", "B": "b", "answer": "A"}\n')
    changed = invoke(*command, *models, "--resume")
    assert changed.exit_code == 1
    assert "other task choices" in changed.stderr


def test_tune_lowers_bits_and_writes_weights_beside_comments(
    config: Path, tasks: list[str], tmp_path: Path, tiny_checkpoints: dict[Kind, Path]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config.read_text())
    command = [
        "tune",
        "--config",
        str(path),
        "--ensemble",
        "duet",
        *tasks[-2:],
        "--cache",
        str(tmp_path / "cache"),
    ]
    tuned = invoke(*command, "--split", "all", "--write")
    assert tuned.exit_code == 0, tuned.output
    written = yaml.safe_load(path.read_text())["ensembles"]["duet"]["members"]
    assert written != {"llama": 0.7, "gpt2": 0.3}
    assert sum(written.values()) == pytest.approx(1.0)
    assert path.read_text().startswith("# weights: to be tuned\n")
    rows = [line.split() for line in tuned.stdout.splitlines() if " .. " in line]
    values = {row[0]: float(row[1]) for row in rows}
    assert values["after"] <= min(values["before"], values["llama"])  # weight 1 on main was on offer, too

    alone = invoke("tune", "--config", str(path), "--ensemble", "llama", *tasks[-2:])
    assert alone.exit_code == 1
    assert "a member alone" in alone.stderr


@pytest.mark.parametrize(
    "fusion", ["relative", "projection", "projection&options.pool=log-linear", "union", "gac", "eva"]
)
def test_tuned_weights_are_the_best_of_a_plain_grid(bench: Workbench, fusion: str) -> None:
    """In bits of whole documents, as they are reported, on the texts that were tuned on."""
    scores = bench.scores([Document(text) for text in TEXTS], ["llama", "gpt2"], "test")
    recipe = bench.recipe(parse_variant(f"duet?fusion={fusion}"))
    shared = shared_positions(scores, recipe.members)

    def bits(weights: tuple[float, ...]) -> float:
        return float(bench.sums(scores, replace(recipe, weights=weights)).bits.sum())

    found = Likelihood(scores, recipe, shared, bench.num_candidates, lambda num: None).best_weights()
    assert bits(found) <= 1.002 * min(bits((step / 20, 1 - step / 20)) for step in range(21))
    assert bits(found) <= bits(recipe.weights) + 1e-3
    assert bits((1.0, 0.0)) == pytest.approx(float(bench.sums(scores, alone("llama")).bits.sum()), rel=1e-6)


def alone(member: str) -> Recipe:
    return Recipe(member, (member,), (1.0,), None, "single")


def test_tune_by_score_takes_members_accuracies(config: Path, tmp_path: Path) -> None:
    records = [{"question": "Say", "A": "aaa", "B": "bbb", "answer": label} for label in "ABABABAB"]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    options = [
        "--config",
        str(config),
        "--ensemble",
        "duet",
        "--task",
        f"c={path}",
        "--cache",
        str(tmp_path / "k"),
    ]
    # Every model gives one answer to the one question, so each is right at half of the records.
    found = invoke("tune", *options, "--method", "score", "--split", "all")
    assert found.exit_code == 0, found.output
    assert [line.split()[-1] for line in found.stdout.splitlines()[1:3]] == ["0.500", "0.500"]


def test_tune_by_swarm_finds_weights_and_options(config: Path, tmp_path: Path) -> None:
    """No worse than configured where it was fitted, and not far from the search along the weights alone."""
    path = tmp_path / "config.yaml"
    path.write_text(config.read_text())
    records = tmp_path / "texts.jsonl"
    records.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    options = ["--config", str(path), "--task", f"texts={records}", "--cache", str(tmp_path), "--split", "all"]
    swarm = ["tune", *options, "--method", "swarm", "--budget", "40"]
    plain = invoke(*swarm, "--ensemble", "duet?fusion=gac&options.threshold=1")
    assert plain.exit_code == 0, plain.output
    exact = invoke("tune", *options, "--ensemble", "duet?fusion=gac&options.threshold=1")
    values = [_bits(each.stdout, "after") for each in (plain, exact)]
    assert values[0] == pytest.approx(values[1], rel=2e-3)

    both = invoke(*swarm, "--ensemble", CONTRASTIVE, "--vary", "alpha=0.0..3.0")
    assert both.exit_code == 0, both.output
    before, found, chance = map(float, re.findall(r"(\d+\.\d{5}) (?:as|by)", both.stdout))
    assert min(found, chance) < before
    assert re.search(r"fusion options: \{alpha: [0-3]", both.stdout)
    assert _bits(both.stdout, "after") <= _bits(both.stdout, "before")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--vary", "alpha"], "write NAME=LOW..HIGH"),
        (["--vary", "alpha=3..1"], "write NAME=LOW..HIGH"),
        (["--vary", "beat=1..3"], "beat"),
        (["--vary", "support=1..3"], "support"),
        (["--vary", "alpha=0.1..0.2", "--write"], "sets weights alone"),
        (["--vary", "alpha=0.1..0.2", "--method", "nll"], "--vary only acts with --method swarm"),
    ],
)
def test_what_a_swarm_cannot_vary_is_refused(config: Path, tmp_path: Path, extra: list[str], words: str) -> None:
    records = tmp_path / "texts.jsonl"
    records.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    command = ["tune", "--config", str(config), "--task", f"t={records}", "--cache", str(tmp_path)]
    found = invoke(*command, "--ensemble", CONTRASTIVE, "--method", "swarm", *extra)
    assert found.exit_code == 1
    assert words in found.output


def test_a_gate_is_learnt_written_and_served(config: Path, tmp_path: Path) -> None:
    """In sample a gain may be chance, so it is written by force alone; then the file's ensemble gives its figure."""
    path, records = tmp_path / "config.yaml", tmp_path / "texts.jsonl"
    path.write_text(config.read_text())
    records.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    options = ["--config", str(path), "--task", f"texts={records}", "--cache", str(tmp_path), "--split", "all"]
    tune = ["tune", *options, "--ensemble", "duet", "--method", "gate"]
    plain, unsure, forced = (invoke(*tune, *more) for more in ((), ("--write",), ("--write", "--force")))
    assert [each.exit_code for each in (plain, unsure, forced)] == [0, 0, 0], forced.output
    assert "not written; pass --write" in plain.stdout
    assert "the gain may be chance" in unsure.stdout
    assert forced.stdout.splitlines()[-1] == f"written to {tmp_path / 'gates' / 'duet.safetensors'}"
    assert _bits(forced.stdout, "gate") <= _bits(forced.stdout, "llama")

    raw = yaml.safe_load(path.read_text())
    raw["ensembles"]["duet"]["weighting"] = {"by": "gate", "artefact": "gates/duet.safetensors"}
    path.write_text(yaml.safe_dump(raw))
    with Workbench(load_config(path), tmp_path) as made:
        scores = made.scores([Document(text.strip()) for text in TEXTS], ["llama", "gpt2"], "test")
        gated, fixed = (
            made.sums(scores, made.recipe(parse_variant(name))) for name in ("duet", "duet?weighting.by=fixed")
        )
    assert float(gated.bits.sum() / gated.num_bytes.sum()) == pytest.approx(_bits(forced.stdout, "gate"), abs=1e-4)
    assert float(gated.bits.sum()) < float(fixed.bits.sum())


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--ensemble", "duet", "--method", "nll", "--out", "x"], "--out and --force only act with --method gate"),
        (["--ensemble", "llama", "--method", "gate"], "no token-level ensemble has this name"),
    ],
)
def test_what_a_gate_cannot_be_learnt_for_is_refused(
    config: Path, tmp_path: Path, extra: list[str], words: str
) -> None:
    records = tmp_path / "texts.jsonl"
    records.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    command = ["tune", "--config", str(config), "--task", f"t={records}", "--cache", str(tmp_path)]
    found = invoke(*command, *extra)
    assert found.exit_code == 1
    assert words in found.output


def _bits(output: str, model: str) -> float:
    (line,) = (line for line in output.splitlines() if line.split()[:1] == [model] and " .. " in line)
    return float(line.split()[1])
