"""Stored scores: what is collected, and fusions over it, against the engine and against slow references."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeMember, byte_vocabulary, ensemble, fake_config, fake_loaded, pair_vocabulary
from torch import Tensor

from ensemble_core import factory
from ensemble_core.config import Config
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation import collect
from ensemble_core.evaluation.collect import Collector
from ensemble_core.evaluation.offline import (
    document_nats,
    document_sums,
    fuse_positions,
    shared_positions,
)
from ensemble_core.evaluation.scores import MemberScores, Scores, load_scores, save_scores
from ensemble_core.evaluation.spelling import Document
from ensemble_core.evaluation.weights import minimise
from ensemble_core.fusion.base import Fused
from ensemble_core.llm import LLM
from ensemble_core.members.base import Candidates

WHOLE = 400  # more than either vocabulary has
TEXTS = ["abcde deab cab", "abab abé cde\n\nab", "dea 中 abc", "a dea dea dea cab abc abc abc"]
DOCUMENTS = [Document(text) for text in TEXTS]
SCORING = SamplingParams(max_tokens=0, echo=True, logprobs=0)


class Bench:
    """An LLM over fakes, and collectors for it."""

    def __init__(self, folder: Path, config: Config, members: dict[str, FakeMember]) -> None:
        self.folder, self.config, self.members = folder, config, members
        self.llm = LLM(config)

    def collect(
        self,
        documents: Sequence[Document],
        top_k: int = WHOLE,
        members: Sequence[str] = ("alpha", "beta"),
        **more: Any,
    ) -> Scores:
        config = more.get("config", self.config)
        folder = self.folder / more.get("folder", "scores")
        return Collector(config, tuple(members), folder, top_k, lambda: self.llm).collect(documents)

    @property
    def calls(self) -> int:
        return sum(len(member.calls) for member in self.members.values())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    members = {
        "alpha": FakeMember("alpha", byte_vocabulary(), seed=1, page_size=4, num_pages=25, max_len=100),
        "beta": FakeMember("beta", pair_vocabulary(), seed=2, page_size=4, num_pages=25, max_len=100),
    }
    config = fake_config(scheduler={"num_candidates": WHOLE, "token_budget": 32})
    monkeypatch.setattr(factory, "load", lambda config, sink: fake_loaded(config, members, sink))
    monkeypatch.setattr(collect, "resolve_folder", lambda member: tmp_path / "nothing")
    made = Bench(tmp_path, config, members)
    yield made
    assert all(member.is_empty for member in members.values())
    made.llm.close()


def truth(member: FakeMember, text: str) -> Tensor:
    """(T - 1,) log-probabilities of a text's tokens after the first."""
    ids = member.vocabulary.encode(text)
    rows = [member.next_logits(ids[:end]).log_softmax(dim=0)[ids[end]] for end in range(1, len(ids))]
    return torch.stack(rows)


def equal(left: Scores, right: Scores) -> bool:
    def tensors(scores: Scores) -> list[Tensor]:
        found = [scores.num_bytes]
        for _, part in sorted(scores.members.items()):
            found += [part.document, part.rest, part.token, part.logprob, part.scored, part.slot]
            found += [part.candidates.token_ids, part.candidates.logprobs, part.candidates.tail]
        return found

    pairs = zip(tensors(left), tensors(right), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_the_engine_gives_the_same_numbers(bench: Bench) -> None:
    scores = bench.collect(DOCUMENTS)
    for names in (("alpha", "beta"), ("beta", "alpha")):
        recipe = ensemble([bench.members[name] for name in names], [0.6, 0.4], support="closed", steps=3)
        shared = shared_positions(scores, names)
        found = fuse_positions(scores, recipe, shared, WHOLE)
        main = scores.members[names[0]]
        offline = main.logprob.index_put((shared.rows,), found.logprobs)
        config = fake_config(
            ensembles={"duo": {"members": {names[0]: 0.6, names[1]: 0.4}, "main": names[0]}},
            scheduler={"num_candidates": WHOLE},
        )
        llm = LLM(config)
        for index, text in enumerate(TEXTS):
            own = offline[main.document == index]
            (answer,) = llm.generate([text], SCORING, "duo")
            online = [entry.logprob for entry in answer.prompt_logprobs][-len(own) :]
            assert online == pytest.approx(own.tolist(), abs=1e-4)
        assert len(shared.rows) > 20
        llm.close()


def test_a_member_alone_scores_what_it_says_itself(bench: Bench) -> None:
    scores = bench.collect(DOCUMENTS, top_k=20)
    for name, member in bench.members.items():
        recipe = Recipe(name, (name,), (1.0,), None, "single")
        sums = document_sums(scores, recipe, {n: m.vocabulary for n, m in bench.members.items()}, 20)
        for index, text in enumerate(TEXTS):
            start = len(text.encode()) - int(scores.num_bytes[index])
            ends, at = [], 0
            for token_id in member.vocabulary.encode(text):
                at += len(member.vocabulary.tokens[token_id])
                ends.append(at)
            counted = [end > start for end in ends[1:]]
            expected = -truth(member, text)[torch.tensor(counted)].sum() / math.log(2)
            assert float(sums.bits[index]) == pytest.approx(float(expected), abs=1e-3)


def test_all_members_are_scored_over_the_same_bytes(bench: Bench) -> None:
    scores = bench.collect(DOCUMENTS)
    for index, text in enumerate(TEXTS):
        for name, part in scores.members.items():
            tokens = bench.members[name].vocabulary.tokens
            scored = part.token[(part.document == index) & part.scored].tolist()
            spelt = b"".join(tokens[token_id] for token_id in scored)
            assert spelt == text.encode()[-int(scores.num_bytes[index]) :]


def test_only_the_answer_behind_a_prompt_counts(bench: Bench) -> None:
    whole = bench.collect([Document(TEXTS[0])])
    answer = bench.collect([Document(TEXTS[0], start=6)])  # "abcde " ends where both have a boundary or not
    assert int(answer.num_bytes[0]) == len(TEXTS[0]) - 6
    for name, part in answer.members.items():
        scored = part.logprob[part.scored]
        tokens = bench.members[name].vocabulary.tokens
        spelt = b"".join(tokens[i] for i in part.token[part.scored].tolist())
        assert spelt.endswith(TEXTS[0][6:].encode())
        assert len(spelt) - (len(TEXTS[0]) - 6) in (0, 1), "at most the token that straddles the beginning"
        every = whole.members[name].logprob
        assert torch.equal(scored, every[-len(scored) :])


def test_candidates_are_kept_where_others_have_a_boundary(bench: Bench) -> None:
    scores = bench.collect(DOCUMENTS, top_k=20)
    alpha, beta = (scores.members[name] for name in ("alpha", "beta"))
    places = {name: set(part.places.tolist()) for name, part in scores.members.items()}
    for part, other in ((alpha, "beta"), (beta, "alpha")):
        met = [place in places[other] for place in part.places.tolist()]
        assert (part.slot >= 0).tolist() == met
        assert part.candidates.token_ids.shape == (sum(met), 20)
    row = int((alpha.slot >= 0).nonzero()[3])
    ids = bench.members["alpha"].vocabulary.encode(TEXTS[int(alpha.document[row])])
    end = [sum(len(bench.members["alpha"].vocabulary.tokens[i]) for i in ids[n:]) for n in range(len(ids))]
    logprobs = bench.members["alpha"].next_logits(ids[: end.index(int(alpha.rest[row]))]).log_softmax(dim=0)
    best = logprobs.topk(20)
    slot = int(alpha.slot[row])
    assert alpha.candidates.token_ids[slot].tolist() == best.indices.tolist()
    assert torch.allclose(alpha.candidates.logprobs[slot], best.values, atol=1e-5)
    rest = 1 - best.values.double().exp().sum()
    assert float(alpha.candidates.tail[slot].exp()) == pytest.approx(float(rest), abs=1e-6)


@pytest.mark.parametrize("budget", [1, 5, 17, 64])
def test_the_packing_does_not_matter(bench: Bench, budget: int) -> None:
    config = fake_config(scheduler={"num_candidates": WHOLE, "token_budget": budget})
    packed = bench.collect(DOCUMENTS, config=config, folder="packed")
    for calls in (member.calls for member in bench.members.values()):
        assert max(sum(len(feed.token_ids) for feed in feeds) for feeds in calls) <= budget
    assert equal(packed, bench.collect(DOCUMENTS, folder="again"))


def test_members_run_once_whatever_is_asked_later(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "GROUP", 2)
    first = bench.collect(DOCUMENTS)
    calls = bench.calls
    assert equal(bench.collect(DOCUMENTS), first)
    assert bench.calls == calls
    bench.collect([*DOCUMENTS, Document("abc abc")])
    fed = [feed for member in bench.members.values() for feeds in member.calls[-1:] for feed in feeds]
    assert len(fed) == 2, "the new document alone"
    calls = bench.calls
    bench.collect(DOCUMENTS, top_k=20)
    assert bench.calls > calls


def test_a_text_that_is_too_long_is_named(bench: Bench) -> None:
    with pytest.raises(EvaluationError, match=r"poems.jsonl, line 3: 300 tokens of member 'alpha'"):
        bench.collect([Document("a" * 300, origin="poems.jsonl, line 3")])


def test_files_come_back_as_they_were_and_damage_is_named(bench: Bench, tmp_path: Path) -> None:
    scores = bench.collect(DOCUMENTS, top_k=20)
    path = tmp_path / "copy.safetensors"
    save_scores(path, scores)
    assert equal(load_scores(path), scores)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(EvaluationError, match="copy"):
        load_scores(path)


class Pool:
    """A linear pool of members that share one vocabulary; keeps main's `num_kept` likeliest, the rest is tail."""

    name = "pool"
    full_vocabulary = False

    def __init__(self, num_kept: int = 99, tail: bool = True) -> None:
        self._num_kept, self._tail = num_kept, tail

    def fuse(self, candidates: Sequence[Candidates], weights: Tensor) -> Fused:
        size = 1 + max(int(part.token_ids.max()) for part in candidates)
        dense = torch.zeros(len(candidates[0]), size)
        for part, weight in zip(candidates, weights.t(), strict=True):
            dense.scatter_add_(1, part.token_ids, weight.unsqueeze(1) * part.logprobs.exp())
        ids = candidates[0].token_ids[:, : self._num_kept]
        kept = dense.gather(1, ids)
        rest = 1 - kept.sum(dim=1) if self._tail else torch.zeros(len(ids))
        return Fused(ids, kept.log(), rest.log(), torch.zeros(len(ids), len(candidates)))


def scores_of(*members: Tensor, true: Tensor) -> Scores:
    """One document of N shared positions; members: (N, V) probabilities over one vocabulary."""
    num = len(true)
    rows = torch.arange(num)

    def part(p: Tensor) -> MemberScores:
        best = p.log().sort(dim=1, descending=True)
        return MemberScores(
            document=torch.zeros(num, dtype=torch.int32),
            rest=(num - rows).int(),
            token=true.int(),
            logprob=p.log()[rows, true],
            scored=torch.ones(num, dtype=torch.bool),
            slot=rows.int(),
            candidates=Candidates(best.indices, best.values, torch.full((num,), -torch.inf)),
        )

    return Scores(torch.tensor([num]), {f"m{i}": part(p) for i, p in enumerate(members)})


def pool(num: int, **options: Any) -> Recipe:
    return Recipe("pool", tuple(f"m{i}" for i in range(num)), (1 / num,) * num, Pool(**options), "pool")


def test_tuning_finds_the_optimum_that_is_known() -> None:
    """One member is right at 70 % of positions, the other at 30 %: w .9 + (1 - w) .1 = .7 at w = .75."""
    true = torch.tensor([0] * 70 + [1] * 30)
    scores = scores_of(torch.tensor([[0.9, 0.1]] * 100), torch.tensor([[0.1, 0.9]] * 100), true=true)
    recipe = pool(2)
    shared = shared_positions(scores, recipe.members)

    def nats(weights: tuple[float, ...]) -> float:
        return float(document_nats(scores, "m0", shared, fuse_positions(scores, recipe, shared, 2, weights)).sum())

    assert minimise(nats, recipe.weights, precision=0.002)[0] == pytest.approx(0.75, abs=0.003)
    expected = -(70 * math.log(0.5) + 30 * math.log(0.5))
    assert nats((0.5, 0.5)) == pytest.approx(expected, abs=1e-3)


def test_what_lies_outside_the_support_gets_its_part_of_the_tail() -> None:
    p = torch.tensor([[0.6, 0.3, 0.08, 0.02]])
    every = [
        fuse_positions(scores, pool(2, num_kept=2), shared_positions(scores, ("m0", "m1")), 2)
        .logprobs.exp()
        .item()
        for scores in (scores_of(p, p.flip(1), true=torch.tensor([token])) for token in range(4))
    ]
    # Main's two candidates are 0 and 1, the other's 3 and 2: the pool gives .6 / 2 and .3 / 2 and leaves .55.
    assert every == pytest.approx([0.3, 0.15, 0.55 * 0.8, 0.55 * 0.2], abs=1e-5)
    assert sum(every) == pytest.approx(1.0, abs=1e-5)


def test_a_token_that_is_ruled_out_is_charged_and_counted() -> None:
    p = torch.tensor([[0.6, 0.3, 0.08, 0.02]])
    scores = scores_of(p, p, true=torch.tensor([2]))
    found = fuse_positions(scores, pool(2, num_kept=2, tail=False), shared_positions(scores, ("m0", "m1")), 2)
    assert found.ruled_out.tolist() == [True]
    assert found.logprobs.exp().item() == pytest.approx(0.08e-4, rel=1e-3)


def test_a_subset_of_the_members_has_shared_positions_of_its_own() -> None:
    p = torch.full((4, 3), 1 / 3)
    scores = scores_of(p, p, p, true=torch.zeros(4, dtype=torch.long))
    third = scores.members["m2"]
    rarer = replace(third, rest=third.rest * 2, slot=torch.tensor([0, -1, 2, 3], dtype=torch.int32))  # 8 6 4 2
    scores = Scores(scores.num_bytes, {**scores.members, "m2": rarer})
    assert len(shared_positions(scores, ("m0", "m1")).rows) == 4
    found = shared_positions(scores, ("m0", "m1", "m2"))  # places 4 and 2
    assert found.rows.tolist() == [0, 2]
    assert [slots.tolist() for slots in found.slots] == [[0, 2], [0, 2], [2, 3]]


def test_more_candidates_than_are_stored_and_whole_vocabularies_are_refused() -> None:
    p = torch.full((2, 3), 1 / 3)
    scores = scores_of(p, p, true=torch.zeros(2, dtype=torch.long))
    shared = shared_positions(scores, ("m0", "m1"))
    assert torch.isfinite(fuse_positions(scores, pool(2), shared, 4).logprobs).all(), (
        "three are all that there are"
    )
    first = scores.members["m0"]
    cut = replace(first, candidates=first.candidates.best(2))
    with pytest.raises(EvaluationError, match="num_candidates is 4"):
        fuse_positions(Scores(scores.num_bytes, {**scores.members, "m0": cut}), pool(2), shared, 4)
    recipe = pool(2)
    recipe.fusion.full_vocabulary = True  # type: ignore[union-attr]
    with pytest.raises(EvaluationError, match="closed"):
        fuse_positions(scores, recipe, shared, 2)
    with pytest.raises(EvaluationError, match=r"weighting\.by=fixed"):
        fuse_positions(scores, replace(pool(2), tau=0.25), shared, 2)


def test_agreement_and_overruling_are_counted_at_shared_positions() -> None:
    main = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.1, 0.3, 0.6]])
    other = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.5, 0.3]])
    scores = scores_of(main, other, true=torch.tensor([0, 0, 2]))
    vocabularies = dict.fromkeys(("m0", "m1"), byte_vocabulary())
    sums = document_sums(scores, pool(2), vocabularies, 3)
    # Means: .65 .25 .1 -> 0; .35 .55 .1 -> 1, which overrules main; .15 .4 .45 -> 2, where the other has 1.
    assert [float(sums.overruled[0]), float(sums.agreed["m1"][0]), float(sums.positions[0])] == [1, 2, 3]
    assert float(sums.shared_nats[0]) == pytest.approx(-math.log(0.65 * 0.35 * 0.45), abs=1e-5)
    assert float(sums.main_nats[0]) == pytest.approx(-math.log(0.6 * 0.6 * 0.6), abs=1e-5)
