"""Gates: the weights that they make, the files that they come from, and how they are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import FakeMember, byte_vocabulary, fake_config, pair_vocabulary
from fusion_cases import FIRST, MAIN, SECOND, TRIO, answers, logits_of, space, weights_of
from gates import gate_of, gated_config, numbers_of, space_in
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ensemble_core.config import Config
from ensemble_core.errors import ArtefactError
from ensemble_core.fitting.gate_training import GateExamples, learn
from ensemble_core.fusion.base import FUSIONS, build_fusion
from ensemble_core.fusion.evidence import NAMES, NUM_LEADING, Evidence
from ensemble_core.fusion.gate import GateNumbers
from ensemble_core.fusion.gate_store import load_gate
from ensemble_core.members.base import Candidates

ROWS = 12


def said(top_k: int = 64, seed: int = 3) -> list[Candidates]:
    return answers(logits_of(TRIO, ROWS, seed), top_k)


# What is shown


def test_evidence_is_that_of_the_formulas() -> None:
    """One row by hand: main is sure of "ab", the assistant of nothing."""
    logs = [torch.full((1, len(vocabulary)), -30.0) for vocabulary in (MAIN, FIRST)]
    ab, a = MAIN.ids_by_bytes[b"ab"], MAIN.ids_by_bytes[b"a"]
    logs[0][0, [ab, a]] = torch.tensor([0.75, 0.25]).log()
    theirs = [FIRST.ids_by_bytes[text] for text in (b"ab", b" a", b"bc", b"a")]
    logs[1][0, theirs] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    found = Evidence(space([MAIN, FIRST])).of(answers(logs, 32))[0]
    main, other = ({name: float(value) for name, value in zip(NAMES, row, strict=True)} for row in found)
    assert main["first"] == pytest.approx(torch.tensor(0.75).log().item(), abs=1e-4)
    assert main["lead"] == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-4)
    assert main["entropy"] == pytest.approx(0.5623, abs=2e-3)
    assert (main["length"], main["letter"], main["space"]) == pytest.approx((0.5, 1.0, 0.0), abs=1e-4)
    assert (other["letter"], other["space"]) == pytest.approx((0.7, 0.3), abs=1e-4)
    assert main["others' first"] == pytest.approx(other["first"])
    assert other["others' lead"] == pytest.approx(main["lead"])
    assert (main["agree"], other["agree"]) == (1.0, 1.0)
    assert main["given"] == pytest.approx(other["gives"])
    assert main["given"] == pytest.approx(torch.tensor(0.4).log().item(), abs=1e-3)
    expected = (0.75 * 0.4) ** 0.5 + (0.25 * 0.1) ** 0.5
    assert main["overlap"] == pytest.approx(expected, abs=1e-3)
    assert other["overlap"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("top_k", [NUM_LEADING, 20, 10_000])
def test_evidence_does_not_depend_on_k(top_k: int) -> None:
    evidence = Evidence(space(TRIO))
    assert torch.allclose(evidence.of(said(top_k)), evidence.of(said(64)), atol=1e-4)


def test_evidence_is_finite_whatever_is_certain() -> None:
    logits = logits_of(TRIO, ROWS, 1)
    logits[1][0, 5] = 1e4
    logits[2][1, 1:] = -torch.inf
    assert bool(Evidence(space(TRIO)).of(answers(logits, 32)).isfinite().all())


# What a gate makes of it


def test_a_gate_that_says_nothing_leaves_the_weights() -> None:
    weights = weights_of(ROWS, 3, 1)
    assert torch.allclose(gate_of(space(TRIO), scale=0.0).weigh(said(), weights), weights, atol=1e-6)


def test_weights_sum_to_one_and_follow_the_place() -> None:
    found = gate_of(space(TRIO)).weigh(said(), torch.full((ROWS, 3), 1 / 3))
    assert torch.allclose(found.sum(dim=1), torch.ones(ROWS), atol=1e-6)
    assert float(found.std(dim=0).min()) > 0.005
    assert float(found.std(dim=0).max()) > 0.2


def test_rows_do_not_touch_each_other() -> None:
    gate, weights = gate_of(space(TRIO)), weights_of(ROWS, 3, 1)
    whole = gate.weigh(said(), weights)
    for row in range(ROWS):
        part = [each.rows([row]) for each in said()]
        assert torch.equal(gate.weigh(part, weights[row : row + 1])[0], whole[row])


def test_what_is_not_finite_stays_in_its_row() -> None:
    gate, weights = gate_of(space(TRIO)), weights_of(ROWS, 3, 1)
    logits = logits_of(TRIO, ROWS, 3)
    logits[1][4] = torch.nan
    found, whole = gate.weigh(answers(logits, 64), weights), gate.weigh(said(), weights)
    assert bool(found[4].isnan().all())
    others = [row for row in range(ROWS) if row != 4]
    assert torch.equal(found[others], whole[others])


def test_the_order_of_assistants_means_nothing() -> None:
    weights, names = weights_of(ROWS, 3, 1), "acb"
    straight = gate_of(space(TRIO)).weigh(said(), weights)
    main, first, second = said()
    turned = gate_of(space([MAIN, SECOND, FIRST], names)).weigh([main, second, first], weights[:, [0, 2, 1]])
    assert torch.allclose(turned[:, [0, 2, 1]], straight, atol=1e-6)


def test_all_the_weight_on_one_stays_there_and_none_stays_none() -> None:
    gate = gate_of(space(TRIO))
    assert torch.equal(gate.weigh(said(), torch.tensor([[1.0, 0.0, 0.0]] * ROWS)), torch.eye(3)[[0] * ROWS])
    assert torch.equal(gate.weigh(said(), torch.tensor([[0.5, 0.0, 0.5]] * ROWS))[:, 1], torch.zeros(ROWS))


def test_fewer_members_have_a_gate_too() -> None:
    gate, weights = gate_of(space(TRIO)), weights_of(ROWS, 2, 1)
    main, _, second = said()
    found = gate.among(("a", "c")).weigh([main, second], weights)
    assert torch.allclose(found.sum(dim=1), torch.ones(ROWS), atol=1e-6)
    own = gate_of(space([MAIN, SECOND], "ac")).weigh([main, second], weights)
    assert torch.equal(found, own)
    assert gate.among(("a", "c")) is gate.among(("a", "c"))
    assert gate.among(("a", "b", "c")) is gate


@pytest.mark.parametrize("fusion", ["projection", "union", "gac", "eva"])
def test_identical_members_are_one_whatever_the_gate_says(fusion: str) -> None:
    same = space([MAIN] * 3)
    main = answers(logits_of([MAIN], ROWS, 2), 10_000)[0]
    weights = gate_of(same).weigh([main] * 3, weights_of(ROWS, 3, 1))
    fused = build_fusion(fusion, FUSIONS.parse(fusion, {}, "fusion"), same).fuse([main] * 3, weights)
    found = torch.zeros(ROWS, len(MAIN)).scatter_add_(1, fused.token_ids, fused.logprobs.exp())
    assert torch.allclose(found, main.logprobs.exp(), atol=1e-5)


# On disk


PAIR = {"members": {"alpha": 0.6, "beta": 0.4}, "main": "alpha", "fusion": "projection"}


@pytest.fixture
def members() -> dict[str, FakeMember]:
    return {
        "alpha": FakeMember("alpha", byte_vocabulary(), seed=1),
        "beta": FakeMember("beta", pair_vocabulary(), seed=2),
    }


def load(config: Config, members: dict[str, FakeMember], path: Path) -> object:
    return load_gate(path, config, "duo", space_in(config, members))


def test_a_gate_comes_back_as_it_was_written(members: dict[str, FakeMember], tmp_path: Path) -> None:
    path, numbers = tmp_path / "gates" / "duo.safetensors", numbers_of(2)
    config = gated_config(members, path, PAIR, numbers)
    gate = load(config, members, path)
    assert all(torch.equal(getattr(gate._numbers, n), getattr(numbers, n)) for n in numbers.__dataclass_fields__)  # type: ignore[attr-defined]
    assert path.stat().st_size < 16_384


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"main": "beta"},
            r"members: it was learnt for \['alpha', 'beta'\] \(main first\), not for \['beta', 'alpha'\]",
        ),
        ({"members": {"alpha": 0.5, "beta": 0.5}}, "weights: expected"),
        ({"fusion": "union"}, "fusion: expected .*union"),
        ({"fusion": {"name": "projection", "options": {"pool": "log-linear"}}}, "fusion: expected .*log-linear"),
    ],
)
def test_a_gate_of_another_recipe_is_refused(
    members: dict[str, FakeMember], tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    path = tmp_path / "duo.safetensors"
    config = gated_config(members, path, PAIR, numbers_of(2))
    duo = PAIR | changes | {"weighting": {"by": "gate", "artefact": str(path)}}
    other = fake_config(list(members), ensembles={"duo": duo})
    assert load(config, members, path)
    with pytest.raises(
        ArtefactError, match=rf"ensembles\.duo\.weighting\.artefact: .*{reason}.*--method gate --write"
    ):
        load(other, members, path)


def test_another_checkpoint_or_tokenizer_is_refused(members: dict[str, FakeMember], tmp_path: Path) -> None:
    path = tmp_path / "duo.safetensors"
    config = gated_config(members, path, PAIR, numbers_of(2))
    beta = config.members["beta"].model_copy(update={"model": "fake-gamma"})
    with pytest.raises(ArtefactError, match=r"other checkpoints or tokenizers of \['beta'\]"):
        load(config.replaced(members={**config.members, "beta": beta}), members, path)
    others = members | {"alpha": FakeMember("alpha", pair_vocabulary(), seed=1)}
    with pytest.raises(ArtefactError, match=r"other checkpoints or tokenizers of \['alpha'\]"):
        load(config, others, path)


def _rewritten(path: Path, name: str, change: object) -> None:
    with safe_open(path, framework="pt") as reader:
        about = reader.metadata()
    tensors = load_file(path)
    tensors[name] = change(tensors[name])  # type: ignore[operator]
    save_file(tensors, path, metadata=about)


def test_damage_is_refused(members: dict[str, FakeMember], tmp_path: Path) -> None:
    path = tmp_path / "duo.safetensors"
    config = gated_config(members, path, PAIR, numbers_of(2))
    _rewritten(path, "bias", lambda bias: bias + 1)
    with pytest.raises(ArtefactError, match="sha256"):
        load(config, members, path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ArtefactError, match="cannot be read"):
        load(config, members, path)
    path.unlink()
    with pytest.raises(ArtefactError, match="expected a file, found none"):
        load(config, members, path)


@pytest.mark.parametrize(
    ("name", "change"),
    [("outer", {"outer": torch.zeros(2, 5)}), ("bias", {"bias": torch.tensor([0.0, torch.nan])})],
)
def test_numbers_that_are_none_are_refused(
    members: dict[str, FakeMember], tmp_path: Path, name: str, change: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "duo.safetensors"
    config = gated_config(members, path, PAIR, replace(numbers_of(2), **change))
    with pytest.raises(ArtefactError, match=f"{name}: expected finite numbers of shape"):
        load(config, members, path)


# Learning


def examples(seed: int, num: int = 3000) -> GateExamples:
    """Whose first number is large is right; all else is noise. 100 documents."""
    draw = torch.Generator().manual_seed(seed)
    evidence = torch.randn(num, 2, len(NAMES), generator=draw)
    right = (evidence[:, 0, 0] > evidence[:, 1, 0]).float()
    shares = torch.stack([0.1 + 0.8 * right, 0.9 - 0.8 * right], dim=1)
    return GateExamples(evidence, shares, torch.arange(num) % 100)


def nats(numbers: GateNumbers, seen: GateExamples, prior: Sequence[float]) -> float:
    logits = numbers.logits(numbers.standardised(seen.evidence)) + torch.tensor(prior).log()
    return -float((logits.softmax(dim=1) * seen.shares).sum(dim=1).log().mean())


def test_a_gate_learns_who_is_right() -> None:
    prior = (0.5, 0.5)
    learnt = learn(examples(1), prior, 2, 0)
    blank = numbers_of(2, scale=0.0)
    one, gate = nats(blank, examples(2), prior), nats(learnt, examples(2), prior)
    best = -float(examples(2).shares.amax(dim=1).log().mean())
    assert one == pytest.approx(0.69, abs=0.02)
    assert gate < best + 0.25 * (one - best)


def test_learning_is_seeded() -> None:
    first, again, other = (learn(examples(1, 600), (0.5, 0.5), 1, seed) for seed in (0, 0, 1))
    assert torch.equal(first.inner, again.inner)
    assert torch.equal(first.bias, again.bias)
    assert not torch.equal(first.inner, other.inner)


def test_noise_teaches_next_to_nothing() -> None:
    noise = replace(examples(3, 600), shares=torch.full((600, 2), 0.5))
    learnt = learn(noise, (0.7, 0.3), 2, 0)
    assert nats(learnt, noise, (0.7, 0.3)) == pytest.approx(0.6931, abs=1e-3)
