"""Models answer, read each other's reasons, and answer again; a vote weighted by confidence decides.

ReConcile (arXiv 2309.13007). Answers are JSON by a schema, so all of them can be read: one that runs out of tokens is
asked once more for its answer alone, while calls are left. docs/councils.md lists where this differs from the paper's
code. Knows texts; does not know how answers come.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ensemble_core.council_config import DiscussConfig
from ensemble_core.councils.answers import answer_in
from ensemble_core.councils.base import (
    NOTHING,
    Answer,
    Call,
    CallCost,
    CostOf,
    Notes,
    Plan,
    Round,
    Settled,
    as_conversation,
    asking,
    drafting,
    question_of,
    seeded,
)
from ensemble_core.councils.wording import worded
from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import CouncilError

_CLOSING_TOKENS = 192  # a whole answer and a confidence, with room
_RESERVED_TOKENS = 64  # of a longer answer, for what comes after the reasoning
_LEAST_REASONING = 40  # characters
_LONGEST_ANSWER = 120  # characters
_CONFIDENCES = [step / 20 for step in range(21)]
_LABEL_LINE = re.compile(r"^\s*\(?([A-H])[).:]", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Sample:
    """A convincing solution. model: whom it convinced; shown to the others. Empty: to all."""

    question: str
    answer: str
    explanation: str
    model: str = ""


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one model answered. key: the answer in the form in which answers are compared."""

    model: str
    key: str
    answer: str
    reasoning: str
    confidence: float
    output: Answer

    @property
    def weight(self) -> float:
        """Its vote; see `vote_weight`."""
        return vote_weight(self.confidence)


def vote_weight(confidence: float) -> float:
    """ReConcile's recalibration of a stated confidence."""
    if confidence >= 1.0:
        return 1.0
    if confidence >= 0.9:
        return 0.8
    if confidence >= 0.8:
        return 0.5
    return 0.3 if confidence > 0.6 else 0.1


def discuss_cost(config: DiscussConfig, cost_of: CostOf) -> CallCost:
    """Every model in every round; what calls are left may close answers that ran out of tokens."""
    once = NOTHING
    for model in config.models:
        once = once.beside(cost_of(model))
    whole = NOTHING
    for _ in range(config.rounds + 1):
        whole = whole + once
    closings = min(
        spare_calls(config, whole.calls, config.limits.max_calls), len(config.models) * (config.rounds + 1)
    )
    return replace(whole, calls=whole.calls + closings, fixed=whole.fixed + closings * _CLOSING_TOKENS)


def spare_calls(config: DiscussConfig, needed: int, most: int) -> int:
    """Calls that may close answers. A closing call to a council would need several, so those get none."""
    return max(most - needed, 0) if needed == len(config.models) * (config.rounds + 1) else 0


def discuss_plan(config: DiscussConfig, samples: Sequence[Sample], spare: int, request: GenerationRequest) -> Plan:
    """First answers, then discussions until all agree or the rounds are over. spare: closing calls at most."""
    table = _Table(config, samples, request, spare)
    opinions = yield from table.round(0, ())
    history = [opinions]
    while len(history) <= config.rounds and len({each.key for each in opinions}) > 1:
        opinions = yield from table.round(len(history), opinions)
        history.append(opinions)
    return _decided(opinions, history)


@dataclass(slots=True)
class _Table:
    """One discussion."""

    config: DiscussConfig
    samples: Sequence[Sample]
    request: GenerationRequest
    spare: int

    def round(
        self, rank: int, before: Sequence[Opinion]
    ) -> Generator[Round, Sequence[Answer], tuple[Opinion, ...]]:
        """Everybody's opinion, after reading those of the round before. Raises CouncilError if there is none."""
        answers = yield Round(tuple(self._call(model, rank, before) for model in self.config.models))
        read = {answer.call.model: self._opinion(answer) for answer in answers if answer.output is not None}
        cut = [answer for answer in answers if answer.output is not None and read[answer.call.model] is None]
        cut, self.spare = cut[: self.spare], self.spare - len(cut[: self.spare])
        if cut:
            closed = yield Round(tuple(self._closing(answer) for answer in cut))
            reasons = {answer.call.model: _reasoning(answer.text) for answer in cut}
            read |= {
                each.call.model: self._opinion(each, reasons[each.call.model])
                for each in closed
                if each.output is not None
            }
        opinions = tuple(opinion for model in self.config.models if (opinion := read.get(model)) is not None)
        if not opinions:
            raise CouncilError(f"no model gave an answer that can be read in round {rank}; allow more tokens")
        return opinions

    def _call(self, model: str, rank: int, before: Sequence[Opinion]) -> Call:
        question = question_of(self.request.prompt)
        if before:
            shown = [sample for sample in self.samples if sample.model != model]
            text = round_prompt(question, model, before, shown, self._form)
        else:
            text = worded("discuss_first", question=question, form=self._form)
        params = replace(drafting(self.request.params), form=self._told(self.request.params.max_tokens))
        return Call(model, model, self._asking(text), seeded(params, model, rank), round=rank, clipped=True)

    def _closing(self, cut: Answer) -> Call:
        question = question_of(self.request.prompt)
        text = worded("discuss_close", question=question, reasoning=_reasoning(cut.text), form=self._form)
        params = replace(SamplingParams(), max_tokens=_CLOSING_TOKENS, temperature=0.0, form=self._told(None))
        call = cut.call
        return Call(call.node, call.model, self._asking(text), params, round=call.round, sample=1, clipped=True)

    def _asking(self, text: str) -> Any:
        return asking(as_conversation(self.request.prompt), text)

    @property
    def _labels(self) -> list[str]:
        found = sorted(set(_LABEL_LINE.findall(question_of(self.request.prompt))))
        return found if len(found) > 1 else list("ABCDE")

    @property
    def _form(self) -> str:
        match self.config.answer:
            case "choice":
                return f"the letter of your option, one of {', '.join(self._labels)}"
            case "number":
                return "a number, without its unit"
            case "exact":
                return "the answer alone, in a few words"

    def _told(self, max_tokens: int | None) -> TextForm:
        """The form of a statement. max_tokens: of an answer with reasoning; None: without."""
        answer: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": _LONGEST_ANSWER}
        if self.config.answer == "choice":
            answer = {"enum": self._labels}
        elif self.config.answer == "number":
            answer = {"type": "string", "pattern": r"^-?[0-9]{1,15}(\.[0-9]{1,6})?$"}
        fields: dict[str, Any] = {"answer": answer, "confidence": {"enum": _CONFIDENCES}}
        if max_tokens is not None:
            room = max(2 * (max_tokens - _RESERVED_TOKENS), _LEAST_REASONING)
            fields = {"reasoning": {"type": "string", "maxLength": room}} | fields
        schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
        return TextForm("json", json.dumps(schema))

    def _opinion(self, answer: Answer, reasoning: str | None = None) -> Opinion | None:
        """None for a text that was cut. reasoning: what a closed answer said before."""
        try:
            said = json.loads(answer.text)
            text, confidence = str(said["answer"]).strip(), float(said["confidence"])
            thought = str(said.get("reasoning", "")) if reasoning is None else reasoning
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        key = answer_in(text, self.config.answer) or text
        return Opinion(answer.call.model, key, text, thought.strip(), min(max(confidence, 0.0), 1.0), answer)


def _reasoning(text: str) -> str:
    """The reasoning of a JSON text that was cut."""
    _, _, rest = text.partition('"reasoning"')
    inside = rest.partition('"')[2].rpartition('"')[0] or rest.partition('"')[2]
    return inside.replace("\\n", "\n").replace('\\"', '"').rstrip("\\")


def round_prompt(
    question: str, reader: str, opinions: Sequence[Opinion], samples: Sequence[Sample], form: str
) -> str:
    """What a model reads in a discussion: answers in groups, the largest first, each with its explanations."""
    groups: dict[str, list[Opinion]] = {}
    for opinion in opinions:
        groups.setdefault(opinion.key, []).append(opinion)
    shown = [
        {
            "answer": holders[0].answer,
            "holders": [
                {"reasoning": each.reasoning, "confidence": each.confidence, "is_you": each.model == reader}
                for each in holders
            ],
        }
        for holders in sorted(groups.values(), key=len, reverse=True)
    ]
    return worded(
        "discuss_round", question=question, groups=shown, samples=samples, form=form, num_answers=len(opinions)
    )


def tally(opinions: Sequence[Opinion]) -> dict[str, float]:
    """Answer -> the sum of its holders' weights, largest first.

    Of equal sums the answer with more holders comes first, then the one of the surest holder, then the one named
    first.
    """
    keys = list(dict.fromkeys(each.key for each in opinions))
    holders = {key: [each for each in opinions if each.key == key] for key in keys}
    weights = {key: sum(each.weight for each in holders[key]) for key in keys}

    def rank(key: str) -> tuple[float, int, float]:
        return round(weights[key], 9), len(holders[key]), max(each.confidence for each in holders[key])

    return {key: weights[key] for key in sorted(keys, key=rank, reverse=True)}


def _decided(opinions: Sequence[Opinion], history: Sequence[Sequence[Opinion]]) -> Settled:
    """The winning answer in the words of its surest holder."""
    weights = tally(opinions)
    winner = next(iter(weights))
    voice = max((each for each in opinions if each.key == winner), key=lambda each: each.confidence)
    output = voice.output.output
    assert output is not None
    text = worded("discuss_final", reasoning=voice.reasoning, answer=voice.answer)
    notes = Notes(
        {"rounds": [[_shown(each) for each in opinions] for opinions in history], "weights": weights},
        rounds=len(history),
        agreement=sum(each.key == winner for each in opinions) / len(opinions),
    )
    said = replace(output, text=text, token_ids=(), logprobs=(), traces=(), finish_reason="stop", stop_reason=None)
    return Settled(said, voice.model, notes)


def _shown(opinion: Opinion) -> Mapping[str, Any]:
    return {
        "model": opinion.model,
        "answer": opinion.answer,
        "confidence": opinion.confidence,
        "weight": opinion.weight,
        "reasoning": opinion.reasoning,
    }
