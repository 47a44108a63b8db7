"""The rule of verify as slow, plain code, and members of several vocabularies to hold the mode against it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import replace

import torch
from fakes import (
    FakeMember,
    byte_vocabulary,
    ensemble,
    fake_engine,
    pair_vocabulary,
    run,
    sequence,
    space_of,
    tokens,
)

from ensemble_core.decoding.modes.base import choose_mode
from ensemble_core.decoding.randomness import generator
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import Output
from ensemble_core.decoding.sampler import sample
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Choice
from ensemble_core.decoding.shaping import shape
from ensemble_core.fusion.base import FUSIONS, Fused, Fusion, build_fusion, single
from ensemble_core.members.base import Candidates, Feed, ask
from ensemble_core.text.detokenizer import Detokenizer

K = 64
OPTIONS: dict[str, dict[str, object]] = {
    "contrastive": {"expert": "beta", "base": "gamma"},
    "core": {"base": {"name": "projection"}},
}
PROMPTS = ["abc", "deed 中文 bad", "cab " * 6, "Ωμέγα", "مرحبا", "a😀b"]


def trio() -> list[FakeMember]:
    """Three vocabularies: bytes, pairs of letters, and longer pieces."""
    return [
        FakeMember("alpha", byte_vocabulary(), seed=1, max_len=512),
        FakeMember("beta", pair_vocabulary(), seed=2, max_len=512),
        FakeMember("gamma", byte_vocabulary(["abc", "ca", "中", "de", "ed "]), seed=3, max_len=512),
    ]


def recipe_of(members: list[FakeMember], name: str = "relative", **mode: object) -> Recipe:
    recipe = ensemble(members)
    if name != "relative":
        options = FUSIONS.parse(name, OPTIONS.get(name, {}), "fusion")
        recipe = replace(recipe, fusion=build_fusion(name, options, space_of(members)), fusion_name=name)
    return replace(recipe, mode=choose_mode("verify", dict(mode), "mode"))


def in_lockstep(recipe: Recipe, positions: str = "all") -> Recipe:
    return replace(recipe, mode=choose_mode("lockstep", {"positions": positions}, "mode"))


def engine_tokens(
    members: list[FakeMember], recipe: Recipe, prompts: list[str], params: SamplingParams
) -> list[list[int]]:
    engine = fake_engine(members, num_candidates=K)
    engine.add([sequence(i, prompt, members, recipe, params) for i, prompt in enumerate(prompts)])
    outputs = run(engine)
    assert all(member.is_empty for member in members)
    return [tokens(outputs[i]) for i in range(len(prompts))]


def lenient(members: list[FakeMember], recipe: Recipe) -> Recipe:
    """The recipe, which may lose assistants."""

    def refit(names: Collection[str]) -> Fusion:
        left = [member for member in members if member.name in names]
        return build_fusion("projection", FUSIONS.parse("projection", {}, "fusion"), space_of(left))

    return replace(recipe, on_failure="drop", refit=refit)


def losing(
    members: list[FakeMember], recipe: Recipe, params: SamplingParams, lost: str, fault: str, when: int
) -> dict[int, list[Output]]:
    """What two sequences get where a member begins to fail on the first of them after so many steps."""
    engine = fake_engine(members, num_candidates=K)
    engine.add([sequence(i, "abc", members, lenient(members, recipe), params) for i in range(2)])
    outputs: dict[int, list[Output]] = {0: [], 1: []}
    for step in range(500):
        if step == when:
            getattr(next(member for member in members if member.name == lost), fault).add(0)
        for seq_id, output in engine.step():
            outputs[seq_id].append(output)
        if not engine.has_work:
            break
    assert all(member.is_empty for member in members)
    return outputs


class Reference:
    """The rule, one place at a time, everything computed anew from the text."""

    def __init__(self, members: list[FakeMember], recipe: Recipe, prompt: str, params: SamplingParams) -> None:
        self.main, *self.others = members
        self.recipe, self.params, self.prompt = recipe, params, prompt
        self.ghost = sequence(0, prompt, members, recipe, params)
        self.final: list[int] = []
        rng = generator(params.seed)
        self.draws = [rng.random() for _ in range(params.max_tokens + 64)]
        self.whole = recipe.fusion is not None and recipe.fusion.full_vocabulary
        options = json.loads(recipe.mode.options)
        self.rejects = recipe.mode.name == "verify" and options["acceptance"] == "rejection"

    def answer(self, member: FakeMember, completion: list[int]) -> Candidates:
        """The member's candidates after its prompt and these tokens of its own."""
        ids = member.vocabulary.encode(self.prompt) + completion
        top_k = len(member.vocabulary) if self.whole else K
        found = ask(member, [Feed(10**6, ids)], top_k)
        member.release(10**6)
        return found

    def choose(self, fused: Fused, place: int) -> int:
        """The ghost has the final tokens, which penalties and min_tokens depend on."""
        self.ghost.decide([Choice(token) for token in self.final[self.ghost.num_completion_tokens :]])
        self.ghost._drawn = [self.draws[place]]
        return sample(shape(fused, [self.ghost], [None]), [self.ghost])[0]

    def accept(self, drafted: int, own: Fused, fused: Fused, place: int) -> int:
        """Keep with probability q / p, else draw from what q has beyond p."""
        self.ghost.decide([Choice(token) for token in self.final[self.ghost.num_completion_tokens :]])
        p, q = (self.shares(shape(each, [self.ghost], [None])) for each in (own, fused))
        begin = sum(list(p.values())[: list(p).index(drafted)])
        rest = (self.draws[place] - begin) / p[drafted]
        kept = min(q.get(drafted, 0.0) / p[drafted], 1.0)
        if rest < kept:
            return drafted
        beyond = {token: share - p.get(token, 0.0) for token, share in q.items() if share > p.get(token, 0.0)}
        left = (rest - kept) / (1 - kept) * sum(beyond.values())
        for token, share in beyond.items():
            left -= share
            if left < 0:
                return token
        raise AssertionError("no token is left")

    def shares(self, fused: Fused) -> dict[int, float]:
        """Each token's probability, from likely to unlikely."""
        pairs = zip(fused.token_ids[0].tolist(), fused.logprobs[0].double().tolist(), strict=True)
        order = sorted((-logprob, token) for token, logprob in pairs if logprob > -math.inf)
        weights = {token: math.exp((order[0][0] - lost) / self.params.temperature) for lost, token in order}
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    def text(self, ids: list[int]) -> tuple[str, bool]:
        return Detokenizer().foresee(b"".join(self.main.vocabulary.text_bytes(i) for i in ids))

    def fuse(self, parts: list[Candidates]) -> Fused:
        assert self.recipe.fusion is not None
        weights = torch.tensor([self.recipe.weights])
        gate = self.recipe.gate
        return self.recipe.fusion.fuse(parts, weights if gate is None else gate.weigh(parts, weights))

    def stops(self, token: int) -> bool:
        return token in self.main.vocabulary.stop_ids and not self.params.ignore_eos

    def draft(self) -> list[int]:
        """The next token that main alone would choose, and those that complete its last character."""
        draft: list[int] = []
        while not draft or self.text(self.final + draft)[1]:
            place = len(self.final) + len(draft)
            draft.append(self.choose(single(self.answer(self.main, self.final + draft)), place))
            if self.stops(draft[-1]) or place + 1 >= self.params.max_tokens or self.bound:
                break
        return draft

    @property
    def bound(self) -> bool:
        """Whether shaping depends on the tokens before, so that a place must be judged at once or not at all."""
        return self.params.penalises or len(self.final) < self.params.min_tokens

    def boundary(self, member: FakeMember, text: str, before: str) -> int | None:
        """How many of the member's tokens lie before the place behind `before`; None: none ends there."""
        ids = member.vocabulary.encode(text)
        rest = len(text.removeprefix(before).encode())
        for number in range(len(ids), -1, -1):
            if sum(len(member.vocabulary.text_bytes(i)) for i in ids[number:]) == rest:
                return number
        return None

    def run(self, consensus: bool) -> list[int]:
        while self.recipe.fusion is not None:
            if not self.final:
                parts = [self.answer(member, []) for member in (self.main, *self.others)]
                self.final.append(self.choose(self.fuse(parts), 0))
            else:
                self.judge(self.draft(), consensus)
            last = self.final[-1]
            if self.stops(last) or len(self.final) >= self.params.max_tokens:
                break
        stops = [i for i, token in enumerate(self.final) if self.stops(token)]
        return self.final[: min([self.params.max_tokens, *(i + 1 for i in stops)])]

    def judge(self, draft: list[int], consensus: bool) -> None:
        """Only the first token is judged: at the others a character is incomplete."""
        before, begins_within = self.text(self.final)
        text, within = self.text(self.final + draft)
        text = before if within else text
        token = chosen = draft[0]
        places = [self.boundary(member, text, before) for member in self.others]
        if self.bound:
            read = [len(member.vocabulary.encode(before)) for member in self.others]
            places = [place if place == count else None for place, count in zip(places, read, strict=True)]
        if not begins_within and all(place is not None for place in places):
            spelt = [member.vocabulary.encode(text) for member in self.others]
            rows = [
                self.answer(member, ids[:place])
                for member, ids, place in zip(self.others, spelt, places, strict=True)
            ]
            followed = [
                ids[place] if place != len(ids) else None for ids, place in zip(spelt, places, strict=True)
            ]
            if not (consensus and self.agree(token, rows, followed)):
                parts = [self.answer(self.main, self.final), *rows]
                if self.rejects and not self.params.greedy:
                    chosen = self.accept(token, single(parts[0]), self.fuse(parts), len(self.final))
                else:
                    chosen = self.choose(self.fuse(parts), len(self.final))
        self.final.append(chosen)

    def agree(self, token: int, rows: list[Candidates], followed: list[int | None]) -> bool:
        text = self.main.vocabulary.text_bytes(token)
        if not text or not self.params.greedy or self.bound:
            return False
        on_top, chances = True, []
        for member, row, own in zip(self.others, rows, followed, strict=True):
            best = row.logprobs[0] == row.logprobs[0].max()
            top = int(row.token_ids[0][best].min())
            on_top = on_top and (top == own or member.vocabulary.text_bytes(top) == text)
            known = own is not None and bool((row.token_ids[0] == own).any())
            chances.append(float(row.logprobs[0][row.token_ids[0] == own].max().exp()) if known else 0.0)
        mean = sum(chances) / len(chances) if self.recipe.gate is None else min(chances)
        return on_top or mean > 0.5
