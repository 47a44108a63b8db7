"""Turns requests into sequences: encodes each member's prompt and rejects what the engine cannot serve.

Thread-safe: it only reads shared state. Knows recipes, prompts and lengths; does not know engines, queues or tensors.
"""

from __future__ import annotations

import itertools
from collections import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ensemble_core.decoding.bans import Bans, bans_of
from ensemble_core.decoding.calling import calls_form, constraint_of
from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.guidance import Constraint, Grammars
from ensemble_core.decoding.guide import Guide
from ensemble_core.decoding.perplexity import PromptLikelihood
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import Conversation, GenerationRequest, Overrides, Prompt
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.scoring import PromptScores
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.decoding.thinking import ThinkingGuide
from ensemble_core.errors import ConfigError, InvalidRequestError
from ensemble_core.recipes import RecipeBook
from ensemble_core.refusals import Refusals, check_ids, tools_of
from ensemble_core.speakers import Speaker
from ensemble_core.stats import Reason
from ensemble_core.text.alignment import Track
from ensemble_core.text.reasoning import ReasoningReader, opened_by, stage_within
from ensemble_core.text.vocabulary import Vocabulary

# No known token spells more characters than this. A prompt with more per token cannot fit and is not tokenised.
_MAX_CHARS_PER_TOKEN = 256
_NUM_LAST = 256  # tokens at a prompt's end that may hold a marker and the white space behind it


@dataclass(slots=True)
class _Reading:
    """What all choices of one prompt share: the recipe, the text and each member's ids, computed on first use.

    prompt: that of the request, cut where it asks for that. dropped: assistants of the ensemble whose context cannot
    hold the prompt, and why; the recipe is without them.
    """

    request: GenerationRequest
    recipe: Recipe
    prompt: Prompt
    text: str | None = None
    dropped: dict[str, Reason] | None = None
    ids: dict[str, list[int]] = field(default_factory=dict)  # tracks share these lists and never change them
    form: TextForm | None = None  # of its answers
    banned: dict[tuple[tuple[int, ...], tuple[str, ...]], Bans | None] = field(default_factory=dict)

    def bans(self, params: SamplingParams, vocabulary: Vocabulary) -> Bans | None:
        """What a choice must not write, spelt once for all choices that ban the same."""
        asked = (params.allowed_token_ids, params.bad_words)
        if asked not in self.banned:
            self.banned[asked] = bans_of(params, vocabulary)
        return self.banned[asked]

    def serves(self, other: GenerationRequest) -> bool:
        """Whether another request of the group can use this reading. Shared objects make the comparison cheap."""
        mine = self.request
        same_prompt = mine.prompt is other.prompt or mine.prompt == other.prompt
        same_model = mine.model == other.model and mine.overrides == other.overrides
        same_ids = mine.add_special_tokens == other.add_special_tokens and mine.truncate == other.truncate
        return same_prompt and same_model and same_ids


class Admission:
    """Makes sequences from requests."""

    def __init__(self, book: RecipeBook, speakers: Mapping[str, Speaker]) -> None:
        self._book = book
        self._speakers = dict(speakers)
        self._refusals = Refusals(self._speakers)
        self._ids = itertools.count()

    def admit(self, request: GenerationRequest) -> Sequence:
        """Make a sequence for the engine's queue.

        Raises ModelNotFoundError for an unknown model, InvalidRequestError for overrides, prompts, ids, lengths and
        schemas that cannot be served.
        """
        return self.admit_all([request])[0]

    def admit_all(self, requests: Iterable[GenerationRequest]) -> list[Sequence]:
        """Make a sequence for each request, all or none. The prompt of a group is encoded once.

        Raises as `admit`, for the first request that cannot be served.
        """
        readings: dict[str, _Reading] = {}
        made = []
        for request in requests:
            reading = readings.get(request.group or "")
            if request.group is None or reading is None or not reading.serves(request):
                reading = self._reading(request)
                readings[request.group or ""] = reading
            self._refusals.check(request, reading.recipe)
            made.append(self._sequence(request, reading))
        return made

    def forms(self, requests: Iterable[GenerationRequest]) -> list[tuple[Grammars, TextForm]]:
        """What `admit_all` will compile: it is faster where that is known by then. Raises as it does."""
        found = {}
        for request in requests:
            if request.params.form is not None or tools_of(request) is not None:
                recipe = self._book.resolve(request.model, request.overrides)
                self._refusals.check(request, recipe)
                if (form := self._form(request, recipe)) is not None:
                    found[recipe.main, form] = (self._speakers[recipe.main].grammars, form)
        return list(found.values())

    def members_of(self, request: GenerationRequest) -> tuple[str, ...]:
        """The members that a request asks for. Raises as `admit` for a model or overrides that cannot be served."""
        return self._book.resolve(request.model, request.overrides).members

    def _reading(self, request: GenerationRequest) -> _Reading:
        """The reading of a prompt, the last `truncate` of main's tokens if there are more."""
        recipe, prompt, most = (
            self._book.resolve(request.model, request.overrides),
            request.prompt,
            request.truncate,
        )
        if most is None or isinstance(prompt, Conversation):
            return _Reading(request, recipe, prompt)
        main = self._speakers[recipe.main]
        ids = self._encode(main, prompt, request.add_special_tokens)
        if most == -1:
            most = max(main.max_len - request.params.max_tokens, 1)
        return _Reading(request, recipe, tuple(ids[-most:]) if len(ids) > most else prompt)

    def check_ensembles(self, names: Iterable[str]) -> None:
        """Raise ConfigError where an ensemble, as it is configured, needs more than a member can do."""
        for name in names:
            try:
                self._refusals.check_abilities(
                    GenerationRequest("", name, "", SamplingParams()), self._book.resolve(name, Overrides())
                )
            except InvalidRequestError as error:
                raise ConfigError(f"ensembles.{name}: {error}") from error

    def check_calls(self, model: str, params: SamplingParams, where: str) -> None:
        """Raise ConfigError where a model cannot serve calls with these parameters."""
        try:
            request = GenerationRequest("", model, "", params)
            self._refusals.check(request, self._book.resolve(model, Overrides()))
        except InvalidRequestError as error:
            raise ConfigError(f"{where}: {model}: {error}") from error

    def tokenize(self, model: str, prompt: Prompt, add_special_tokens: bool) -> tuple[list[int], Speaker]:
        """A prompt's ids in a model's main member (none for an empty text), and that member. Raises as `admit`."""
        _, main = self.main_of(model)
        if prompt == "":
            return main.prompts.tokenize(prompt, add_special_tokens), main
        return self._encode(main, prompt, add_special_tokens), main

    def spell(self, model: str, token_ids: abc.Sequence[int]) -> str:
        """The text of main's ids, with control tokens by name. Raises InvalidRequestError, ModelNotFoundError."""
        vocabulary = self.main_of(model)[1].vocabulary
        check_ids("tokens", token_ids, vocabulary)
        return b"".join(vocabulary.tokens[token_id] for token_id in token_ids).decode("utf-8", "replace")

    def main_of(self, model: str) -> tuple[str, Speaker]:
        """The name of a model's main member, and that member. Raises ModelNotFoundError."""
        name = self._book.resolve(model, Overrides()).main
        return name, self._speakers[name]

    def check_council(self, request: GenerationRequest, models: Iterable[str]) -> None:
        """The same for a council. models: those that may write its answer. Raises as `check_reasoning`."""
        recipes = [self._book.resolve(model, Overrides()) for model in models]
        members = {member for recipe in recipes for member in recipe.members}
        self._refusals.check_reasoning(request, members, {recipe.main for recipe in recipes})

    def _sequence(self, request: GenerationRequest, reading: _Reading) -> Sequence:
        self._drop_full(reading)
        recipe, params = reading.recipe, request.params
        main, use = self._speakers[recipe.main], tools_of(request)
        tracks = {member: self._track(member, request, reading) for member in recipe.members}
        reader = self._reader(reading)
        return Sequence(
            seq_id=next(self._ids),
            request=request,
            recipe=recipe,
            tracks=tracks,
            prompt_text=self._text(reading),
            constraint=self._guide(request, reading, reader),
            call_form=None if use is None else replace(main.prompts.call_form, alone=use.choice == "required"),
            reasoning=reader,
            bans=reading.bans(params, main.vocabulary),
            scores=_scores(params),
            likelihood=PromptLikelihood() if recipe.tau is not None else None,
            dropped=dict(reading.dropped or {}),
        )

    def _reader(self, reading: _Reading) -> ReasoningReader | None:
        """What splits an answer, beginning where main's prompt leaves off; None where main has no marks."""
        main, prompt = self._speakers[reading.recipe.main], reading.request.prompt
        if main.thinking is None or not isinstance(prompt, Conversation):
            return None
        marks = main.thinking.marks
        if prompt.continue_final:
            return ReasoningReader(marks, stage_within(str(prompt.messages[-1]["content"]), marks))
        last = reading.ids[reading.recipe.main][-_NUM_LAST:]
        text = b"".join(main.vocabulary.tokens[token_id] for token_id in last).decode("utf-8", "replace")
        return ReasoningReader(marks, "inside" if opened_by(text, marks) else "before")

    def _guide(
        self, request: GenerationRequest, reading: _Reading, reader: ReasoningReader | None
    ) -> Guide | None:
        form, budget = self._constraint(request, reading), request.params.budget
        main = self._speakers[reading.recipe.main]
        if reader is None or main.thinking is None or (form is None and budget is None):
            return form
        return ThinkingGuide(reader, main.thinking, budget, form, len(main.vocabulary))

    def _form(self, request: GenerationRequest, recipe: Recipe) -> TextForm | None:
        """What the text of an answer must be, its calls included."""
        main, use = self._speakers[recipe.main], tools_of(request)
        if use is None:
            return request.params.form
        return calls_form(use, main.prompts.call_form, main.vocabulary, request.params.form)

    def _constraint(self, request: GenerationRequest, reading: _Reading) -> Constraint | None:
        if reading.form is None:
            reading.form = self._form(request, reading.recipe)
        grammars = self._speakers[reading.recipe.main].grammars
        return None if reading.form is None else constraint_of(grammars, reading.form)

    def _drop_full(self, reading: _Reading) -> None:
        """Leave out assistants that have no room for the prompt, once for all choices; see `Recipe.on_full`."""
        if reading.dropped is not None:
            return
        reading.dropped, whole = {}, reading.recipe
        self._prompt_ids(whole.main, reading)  # its ids are checked before anybody reads their text
        if whole.on_full == "drop":
            full = [member for member in whole.members[1:] if not self._holds(member, reading)]
            reading.recipe = whole.without(full)
            gone = [member for member in whole.members if member not in reading.recipe.members]
            reading.dropped = {member: "full" if member in full else "idle" for member in gone}

    def _holds(self, assistant: str, reading: _Reading) -> bool:
        speaker, prompt = self._speakers[assistant], reading.prompt
        if not isinstance(prompt, Conversation) and _is_hopeless(self._text(reading), speaker):
            return False
        room = speaker.max_len - len(self._prompt_ids(assistant, reading))
        return room >= min(1, reading.request.params.max_tokens)

    def _track(self, member: str, request: GenerationRequest, reading: _Reading) -> Track:
        speaker, is_main = self._speakers[member], member == reading.recipe.main
        ids = self._prompt_ids(member, reading)
        room = speaker.max_len - len(ids)
        wanted = request.params.max_tokens if is_main else min(1, request.params.max_tokens)
        if room < wanted:
            raise InvalidRequestError(
                f"this model's context is {speaker.max_len} tokens of member {member!r}; the prompt has "
                f"{len(ids)} and max_tokens is {request.params.max_tokens}; shorten the prompt or lower it",
                "prompt" if room < 1 else "max_tokens",
            )
        vocabulary = _vocabulary(speaker, request) if is_main else speaker.vocabulary
        return Track(vocabulary, ids, max_len=speaker.max_len)

    def _prompt_ids(self, member: str, reading: _Reading) -> list[int]:
        """A member's prompt ids, encoded once. Where the request sends ids, assistants encode their text."""
        if member not in reading.ids:
            reading.ids[member] = self._read(member, reading)
        return reading.ids[member]

    def _read(self, member: str, reading: _Reading) -> list[int]:
        request, speaker = reading.request, self._speakers[member]
        if member == reading.recipe.main or not isinstance(reading.prompt, tuple):
            return self._encode(speaker, reading.prompt, request.add_special_tokens)
        if text := self._text(reading):
            return self._encode(speaker, text, request.add_special_tokens)
        # Control tokens alone: there is no text to read, so the assistant begins as it begins any text.
        ids = speaker.prompts.tokenize("", request.add_special_tokens) or speaker.prompts.start()
        return ids or self._encode(speaker, "", request.add_special_tokens)

    def _encode(self, speaker: Speaker, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, Conversation):
            return speaker.prompts.encode_chat(
                prompt.messages, prompt.continue_final, prompt.tools, prompt.variables
            )
        if isinstance(prompt, tuple):
            check_ids("prompt", prompt, speaker.vocabulary)
            if not prompt:
                raise InvalidRequestError("prompt is an empty list of ids; send at least one", "prompt")
            return list(prompt)
        if _is_hopeless(prompt, speaker):
            raise InvalidRequestError(
                f"the prompt has {len(prompt)} characters, which cannot fit a context of {speaker.max_len} tokens; "
                "shorten it",
                "prompt",
            )
        return speaker.prompts.encode(prompt, add_special_tokens)

    def _text(self, reading: _Reading) -> str:
        """The text of a prompt, decoded once. Main's ids must have been checked."""
        if reading.text is None:
            reading.text = _spelt(reading.prompt, self._speakers[reading.recipe.main].vocabulary)
        return reading.text


def _spelt(prompt: Prompt, main: Vocabulary) -> str:
    """The text of a prompt, without control tokens if it is ids. Empty for a conversation, which is not echoed."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Conversation):
        return ""
    return b"".join(main.text_bytes(token_id) for token_id in prompt).decode("utf-8", "replace")


def _vocabulary(main: Speaker, request: GenerationRequest) -> Vocabulary:
    """The vocabulary of main's answer to a request."""
    if tools_of(request) is not None:
        return main.calling
    return main.answering if isinstance(request.prompt, Conversation) else main.vocabulary


def _is_hopeless(text: str, speaker: Speaker) -> bool:
    """Whether a text cannot fit, whatever its tokens are."""
    return len(text) > speaker.max_len * _MAX_CHARS_PER_TOKEN


def _scores(params: SamplingParams) -> PromptScores | None:
    if not params.scores_prompt:
        return None
    echoed = (params.logprobs or 0) if params.echo else 0
    return PromptScores(max(echoed, params.prompt_logprobs or 0), ranks=params.prompt_logprobs is not None)
