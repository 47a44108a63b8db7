"""A pair that should help, small: two members trained here on programs and on English beat both over mixed text.

Everything through the product: real checkpoints, the builder's matrices, weights tuned on one half of the documents,
bits per byte on the other.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from ensemble_core.config_file import load_config
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import ArtefactError
from ensemble_core.evaluation.run import Chosen
from ensemble_core.fitting.run import Search, fit_council
from ensemble_core.llm import LLM
from studies import domains, routing, trained_pair
from studies.trained_pair import GAIN, SMALL, Measured

SEED = 0
PROSE = "The method returns the number of elements that were found in the sequence, and raises an error when"
FUSED = [f"{fusion}-code" for fusion in SMALL.fusions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_pair.prepare(SMALL, tmp_path_factory.mktemp("pair"), SEED).parent


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Measured]:
    return {each.model: each for each in trained_pair.measure(folder / "pair.yaml", SMALL.num_positions)}


@pytest.mark.parametrize("model", FUSED)
def test_the_fused_model_beats_both_members(found: dict[str, Measured], model: str) -> None:
    """By 5 % with the whole interval, on documents that neither training nor tuning saw."""
    for member in SMALL.sizes:
        assert found[model].over(found[member]).high <= 1 - GAIN


def test_both_members_count(found: dict[str, Measured]) -> None:
    for model in FUSED:
        assert min(found[model].weights.values()) > 0.1
        assert sum(found[model].weights.values()) == pytest.approx(1.0, abs=1e-3)


def test_the_engine_says_the_same(found: dict[str, Measured]) -> None:
    """Its scores of the texts as prompts begin a little earlier than the first place that both tokenizers share."""
    for each in found.values():
        assert each.echo == pytest.approx(each.bits.value, rel=0.03)


def test_the_tuned_weights_are_in_the_file(folder: Path, found: dict[str, Measured]) -> None:
    ensembles = load_config(folder / "pair.yaml").ensembles
    assert {name: ensembles[name].weights for name in FUSED} == {
        name: pytest.approx(dict(found[name].weights), abs=1e-3) for name in FUSED
    }


def test_a_router_picks_the_better_member(folder: Path) -> None:
    """On documents that are all of one kind: nearly always, and so in bits, in under two milliseconds."""
    linear, clusters = routing.route(folder, routing.write_documents(folder, SMALL, SEED))
    assert linear.fitted.agreement >= routing.AGREEMENT
    assert linear.gap >= routing.GAP
    assert linear.fitted.is_sure
    assert clusters.fitted.is_sure


def test_a_fitted_router_is_written_loaded_and_asked(folder: Path) -> None:
    """`unisono fit`, then the council answers: with the better member, as that member alone would."""
    documents = routing.write_documents(folder, SMALL, SEED)
    path = routing.with_council(folder, "linear")
    config = load_config(path)
    chosen = Chosen([f"single={documents}"], "even", None, 0, folder / "scores")
    said = fit_council(config, chosen, "smart", None, Search(), None, force=False)
    assert "written to" in said
    with closing(LLM(path)) as llm:
        params = SamplingParams(max_tokens=6, temperature=0.0)
        for prompt, expected in (("def __init__(self, name):\n    self.name =", "code"), (PROSE, "prose")):
            (routed,) = llm.generate(prompt, params, "smart")
            (own,) = llm.generate(prompt, params, expected)
            assert routed.served_by == expected
            assert routed.text == own.text
    about = folder / "router-linear" / "about.json"
    about.write_text(about.read_text().replace('"by": "linear"', '"by": "clusters"'))
    with pytest.raises(ArtefactError, match="fitted for by: clusters"):
        LLM(path)


def test_what_is_held_out_is_in_no_training_text() -> None:
    corpora = domains.read_domains(SEED, 40)
    known = {line for corpus in corpora.values() for text in corpus.training for line in text.split("\n\n")}
    held_out = [part for text in corpora["prose"].held_out for part in text.split("\n\n")]
    assert held_out
    assert not known.intersection(held_out)
    assert not set(corpora["code"].training) & set(corpora["code"].held_out)


def test_a_mixed_document_has_pieces_of_both_kinds_each_once() -> None:
    kinds = [domains.Corpus((), tuple(f"{kind} {i:02}\n" * 8 for i in range(9))) for kind in ("code", "text")]
    documents = domains.mixed_documents(kinds, 4, 200, seed=3)
    pieces = [piece.split("\n")[0] for document in documents for piece in document.split("\n\n")]
    assert [piece[:4] for piece in pieces] == ["code", "text"] * 8
    assert len(set(pieces)) == len(pieces)
    with pytest.raises(ValueError, match="give 4 mixed documents, 5 are asked for"):
        domains.mixed_documents(kinds, 5, 200, seed=3)


def test_code_has_the_marks_of_programs_and_prose_does_not() -> None:
    marks = {}
    for name, corpus in domains.read_domains(SEED, 40).items():
        text = "".join(corpus.training)
        marks[name] = sum(text.count(mark) for mark in "()[]{}=_:") / len(text)
    assert marks["code"] > 4 * marks["prose"]
