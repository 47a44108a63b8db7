"""One request in flight: its recipe, its text, and its tokens in every member. No torch.

Invariants: main's track comes first and holds the sampled tokens; every other track spells the same text. A sequence
does not know pages, steps or other sequences.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import TYPE_CHECKING

from ensemble_core.decoding.bans import Bans
from ensemble_core.decoding.counts import TokenCounts, TokenValues
from ensemble_core.decoding.habits import Habits
from ensemble_core.decoding.logprobs import Scored, describe_token
from ensemble_core.decoding.randomness import generator
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import FinishReason, GenerationRequest, Output, TokenLogprob, Trace
from ensemble_core.stats import Reason
from ensemble_core.text.alignment import Track
from ensemble_core.text.detokenizer import Detokenizer
from ensemble_core.text.lookup import Lookup
from ensemble_core.text.reasoning import ReasoningReader
from ensemble_core.text.shown import shown_text

if TYPE_CHECKING:
    from ensemble_core.decoding.guide import Guide
    from ensemble_core.decoding.perplexity import PromptLikelihood
    from ensemble_core.decoding.scoring import PromptScores
    from ensemble_core.text.call_forms import CallForm


@dataclass(frozen=True, slots=True)
class Ahead:
    """Text that an assistant has drafted behind main's: its track spells it, no other does.

    note: what its mode wants to remember of it.
    """

    member: str
    text: str = ""
    note: object = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A token that becomes final, with the reports that its request asked for."""

    token_id: int
    scored: Scored | None = None
    trace: Trace | None = None


@dataclass(frozen=True, slots=True)
class Drafted:
    """A token at the end of main's track that is not final.

    note: what its mode wants to remember of it. held: assistants do not spell it yet, nor what follows. guess: main
    has not chosen it yet; it may do so when it is fed.
    """

    token_id: int
    note: object = None
    held: bool = False
    guess: bool = False


@dataclass(slots=True)
class _Pending:
    """What has been added since the last output."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)


class Phase(Enum):
    """The stages of a sequence's life."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in flight.

    prompt_text: the prompt's text, for echo and for the offsets of a scored prompt. constraint: what says which
    tokens may come next. call_form: of the calls that its text may have. reasoning: splits its text, where its
    model may reason. bans: tokens that it must not write. scores: log-probabilities of the prompt, if they are
    asked for. likelihood: of the prompt in every member, if the weights depend on it. dropped: members that it
    has lost, some before it came; recipe and tracks no longer hold them. num_reused: prompt tokens that main had
    cached at the start. drafted: the tokens at the end of main's track that are not final; no client has seen them.
    habits: what its mode has learnt of its drafts; guess_habits: of guesses. lookup: of main's final tokens. cramped:
    an assistant has no room for a draft of more than one token. ends: what its mode wants to remember of the end of
    the final text. ahead: what an assistant has drafted behind.
    """

    seq_id: int
    request: GenerationRequest
    recipe: Recipe
    tracks: dict[str, Track]  # main first
    prompt_text: str = ""
    constraint: Guide | None = None
    call_form: CallForm | None = None
    reasoning: ReasoningReader | None = None
    bans: Bans | None = None
    scores: PromptScores | None = None
    likelihood: PromptLikelihood | None = None
    dropped: dict[str, Reason] = field(default_factory=dict)
    num_reused: int = 0
    drafted: tuple[Drafted, ...] = ()
    habits: Habits = field(default_factory=Habits)
    guess_habits: Habits = field(default_factory=Habits)
    lookup: Lookup = field(default_factory=Lookup)
    num_guessed: int = 0  # tokens at the end of the draft that are guesses
    cramped: bool = False
    ends: object = None
    ahead: Ahead | None = None
    phase: Phase = Phase.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    arrived: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    rng: random.Random = field(init=False)
    biases: TokenValues = field(init=False)
    pinned: tuple[int, ...] = field(init=False)  # main's ids that are always in the support
    num_extra: int = field(init=False)  # candidates of main beyond K: pinned ids, and as many as bans may take
    counts: TokenCounts = field(init=False)  # of main's tokens in the text
    shown: Detokenizer = field(init=False)  # the text as the client sees it
    spelt: Detokenizer = field(init=False)  # the text that assistants spell, without control tokens' names
    _pending: _Pending = field(default_factory=_Pending)
    _opened: bool = False  # the first output has been taken
    _drawn: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        params = self.request.params
        self.rng = generator(params.seed)
        self.biases = TokenValues(dict(params.logit_bias))
        self.pinned = params.pinned_ids
        self.num_extra = len(self.pinned) + (0 if self.bans is None else self.bans.most)
        self.counts = TokenCounts(self.main)
        keeps, exact = params.include_stop_str_in_output, params.form is not None
        self.shown = shown_text(params.stop, keeps, self.call_form, self.reasoning, exact)
        self.spelt = self.shown if params.skip_special_tokens else Detokenizer()

    @property
    def main(self) -> Track:
        """The main member's tokens."""
        return self.tracks[self.recipe.main]

    @property
    def is_finished(self) -> bool:
        """True once it has ended for any reason."""
        return self.phase is Phase.FINISHED

    @property
    def num_completion_tokens(self) -> int:
        """Main's final tokens so far, a stop token included."""
        return len(self.main.completion_ids) - len(self.drafted)

    @property
    def spelling(self) -> tuple[str, bool]:
        """The text for assistants in whole characters, and whether it ends within one. What is held is left out."""
        held = next((i for i, each in enumerate(self.drafted) if each.held), len(self.drafted))
        return self.spelling_of(held)

    def spelling_of(self, num_drafted: int, more: tuple[int, ...] = ()) -> tuple[str, bool]:
        """The same for the final text with so many drafted tokens and `more` of main's tokens behind it."""
        spell = self.main.vocabulary.text_bytes
        ids = (*(each.token_id for each in self.drafted[:num_drafted]), *more)
        return self.spelt.foresee(b"".join(map(spell, ids)))

    @property
    def num_spelt(self) -> int:
        """Drafted tokens that the assistants' tracks spell: those that are not held, up to a whole character."""
        count = next((i for i, each in enumerate(self.drafted) if each.held), len(self.drafted))
        while count and self.spelling_of(count)[1]:
            count -= 1
        return count

    @property
    def mid_character(self) -> bool:
        """True while the last character is incomplete."""
        return self.spelling[1] if self.drafted else self.spelt.mid_character

    @property
    def is_bound(self) -> bool:
        """Whether what may come next depends on every token before, so that nothing can be drafted ahead."""
        params = self.request.params
        early = self.num_completion_tokens < params.min_tokens
        bound = self.constraint is not None and self.constraint.binds
        return early or params.looks_back or bound

    @property
    def scoring(self) -> bool:
        """True while log-probabilities of the prompt are asked for and not yet known."""
        return self.scores is not None and not self.scores.described

    @property
    def weighing(self) -> bool:
        """True while the weights depend on the prompt's likelihood and it is not yet known."""
        return self.likelihood is not None and self.likelihood.weights is None

    def draw(self, ahead: int = 0) -> float:
        """A uniform number from [0, 1) for the token after `ahead` others that are not final.

        Each place of the text has its own, whatever is drafted there and taken back.
        """
        while len(self._drawn) <= ahead:
            self._drawn.append(self.rng.random())
        return self._drawn[ahead]

    def ahead_of(self, member: str) -> str:
        """What a member's track spells behind the text of all."""
        return self.ahead.text if self.ahead is not None and self.ahead.member == member else ""

    def decide(
        self,
        tokens: Iterable[Choice],
        draft: Iterable[Drafted] = (),
        ends: object = None,
        ahead: Ahead | None = None,
    ) -> None:
        """Make main's track end with `tokens`, now final, followed by `draft`. May finish the sequence.

        Their common prefix with the old draft stays cached; the rest of the old draft is taken back.
        """
        tokens = tuple(tokens)
        if tokens or ends is not None:
            self.ends = ends
        self.ahead = ahead if ahead is not None and ahead.member in self.tracks else None
        self.phase = Phase.DECODE
        self._redraft([*(Drafted(choice.token_id) for choice in tokens), *draft])
        for choice in tokens:
            self.drafted = self.drafted[1:]
            self._take_in(choice)
            if self.finish_reason is not None:
                self._redraft([])
                self.ahead = None
                return

    def _redraft(self, drafted: list[Drafted]) -> None:
        """Replace the draft. Of its tokens that are no guesses, main has one to feed at least."""
        old, new = ([each.token_id for each in draft] for draft in (self.drafted, drafted))
        chosen = [each.token_id for each in drafted if not each.guess]
        common = next(
            (i for i, (a, b) in enumerate(zip(old, chosen, strict=False)) if a != b), min(len(old), len(chosen))
        )
        for token_id in old[common:]:
            self.counts.remove(token_id)
        if common < len(old) or common == len(chosen):
            self.main.take_back(len(old) - common)  # 0 where a fed guess became final: main answers there again
        for token_id in new[common:]:
            self.main.append(token_id)
            self.counts.add(token_id)
        self.drafted = tuple(drafted)
        self.num_guessed = sum(each.guess for each in drafted)

    def _take_in(self, choice: Choice) -> None:
        """Make the first token of the draft final."""
        del self._drawn[:1]
        offset = len(self.shown.text) + (len(self.prompt_text) if self.request.params.echo else 0)
        self._pending.token_ids.append(choice.token_id)
        if choice.scored is not None:
            self._pending.logprobs.append(describe_token(self.main, choice.token_id, choice.scored, offset))
        if choice.trace is not None:
            self._pending.traces.append(choice.trace)
        if self.constraint is not None:
            self.constraint.accept(choice.token_id)
        self._spell(choice.token_id)
        self._maybe_finish(choice.token_id)

    def guess(self, draft: Iterable[int], count: int) -> tuple[int, tuple[int, ...]]:
        """Up to `count` tokens that may follow the final text and `draft`; before, how many tokens they rest on."""
        final = len(self.main.completion_ids) - len(self.drafted)
        known = len(self.lookup)
        prompt = len(self.main.prompt_ids)
        self.lookup.grow(
            [*self.main.prompt_ids[known:], *self.main.completion_ids[max(known - prompt, 0) : final]]
        )
        end = [*self.main.completion_ids[max(final - 3, 0) : final], *draft]
        length, ids = self.lookup.guess(end, count)
        return length, tuple(ids)

    def cramp(self) -> bool:
        """Draft one character at most, now and later. False if that was so already, or nothing is gained by it."""
        shorter = not self.cramped and (len(self.drafted) > 1 or self.ahead is not None)
        self.cramped, self.ahead = True, None
        if shorter:
            self._redraft(list(self.drafted[:1]))
        return shorter

    def relax(self) -> None:
        """Take the draft back, and draft as far as pays again: the assistant that had no room for more will go."""
        self.cramped, self.ahead = False, None
        if self.drafted:
            self._redraft([])

    def take(self) -> Output:
        """The output since the last one. The first output also carries the prompt's ids and reports."""
        pending, self._pending = self._pending, _Pending()
        if self.finish_reason is not None:
            pending.text += self._flush()
        first, self._opened = not self._opened, True
        params, prompt_ids = self.request.params, self.main.prompt_ids
        return Output(
            text=pending.text,
            token_ids=tuple(pending.token_ids),
            num_prompt_tokens=len(prompt_ids),
            num_completion_tokens=self.num_completion_tokens,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
            logprobs=tuple(pending.logprobs),
            traces=tuple(pending.traces),
            prompt_logprobs=self.scores.described if first and self.scores is not None else (),
            prompt_text=self.prompt_text if first and params.echo else "",
            prompt_token_ids=tuple(prompt_ids) if first else (),
            num_cached_tokens=self.num_reused,
            dropped=dict(self.dropped),
            calls=self.shown.take_calls(),
            reasoning=self.shown.take_reasoning(),
            num_reasoning_tokens=self.shown.num_reasoning,
        )

    def finish(self, reason: FinishReason, stop: str | int | None = None, error: str | None = None) -> None:
        """End the sequence. The scheduler removes it from its lists at the next `retire`."""
        self.phase, self.finish_reason, self.stop_reason, self.error = Phase.FINISHED, reason, stop, error

    def settle(self) -> None:
        """Set the recipe's weights if they depend on the prompt. Called once the prompt has been read."""
        if self.likelihood is not None and self.weighing:
            assert self.recipe.tau is not None
            prior = dict(zip(self.recipe.members, self.recipe.weights, strict=True))
            self.recipe = replace(self.recipe, weights=self.likelihood.settle(prior, self.recipe.tau))

    def follow(self, leader: Sequence) -> None:
        """Take over scores from a sequence with the same prompt, and weights if both have the same members."""
        if self.scores is not None and leader.scores is not None:
            self.scores.described = leader.scores.described
        mine, theirs = self.likelihood, leader.likelihood
        if mine is not None and theirs is not None and self.recipe.members == leader.recipe.members:
            mine.weights = theirs.weights
            self.recipe = replace(self.recipe, weights=leader.recipe.weights)

    def drop(self, member: str, reason: Reason) -> tuple[str, ...]:
        """Go on without an assistant. Returns it and any others that the fusion cannot use without it."""
        before, self.recipe = self.recipe.members, self.recipe.without((member,))
        gone = tuple(other for other in before if other not in self.recipe.members)
        for other in gone:
            del self.tracks[other]
            self.dropped[other] = reason if other == member else "idle"
        if self.ahead is not None and self.ahead.member in gone:
            self.ahead = None
        if self.scores is not None and self.scoring:
            self.scores.lose(gone)
        return gone

    def preempt(self) -> None:
        """Go back to waiting with nothing cached and no draft. The text and the sampling state stay."""
        self.phase = Phase.WAITING
        if self.drafted or self.ahead is not None:
            self.ahead = None
            self._redraft([])
            for track in list(self.tracks.values())[1:]:
                track.respell(self.spelling[0])
        for track in self.tracks.values():
            track.cache(0)
        if self.scores is not None and self.scoring:
            self.scores.reset()
        if self.likelihood is not None and self.weighing:
            self.likelihood.reset()

    def _spell(self, token_id: int) -> None:
        """Add a token's bytes to both texts."""
        params, vocabulary = self.request.params, self.main.vocabulary
        plain = vocabulary.text_bytes(token_id)
        named = plain if params.skip_special_tokens else vocabulary.tokens[token_id]
        if self.stops_at(token_id):
            named = vocabulary.tokens[token_id] if params.include_stop_str_in_output else b""
        self._pending.text += self.shown.feed(named, armed=self.num_completion_tokens >= params.min_tokens)
        if self.spelt is not self.shown:
            self.spelt.feed(plain)

    def stops_at(self, token_id: int) -> bool:
        """Whether this token of main ends the text."""
        params = self.request.params
        ends = token_id in self.main.vocabulary.stop_ids and not params.ignore_eos
        return ends or token_id in params.stop_token_ids

    def _maybe_finish(self, token_id: int) -> None:
        params = self.request.params
        if self.shown.stop is not None:
            self.finish("stop", stop=self.shown.stop)
        elif self.stops_at(token_id):
            reason: FinishReason = "tool_calls" if self.shown.called else "stop"
            self.finish(reason, stop=token_id if token_id in params.stop_token_ids else None)
        elif self.num_completion_tokens >= params.max_tokens:
            self.finish("length")

    def _flush(self) -> str:
        """The text held back until the end. A stop string that it completes is still cut."""
        rest = self.shown.flush()
        if self.shown.stop is not None and self.finish_reason == "length":
            self.finish_reason, self.stop_reason = "stop", self.shown.stop
        return rest
