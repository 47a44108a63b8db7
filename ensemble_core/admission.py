"""From a request to a sequence: every member's prompt, and the checks that keep bad input from the engine.

Thread-safe: it only reads. Knows recipes, prompts and lengths; does not know engines, queues or tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sequence import Recipe, Sequence
from ensemble_core.errors import InvalidRequestError
from ensemble_core.recipes import RecipeBook
from ensemble_core.text.alignment import Track
from ensemble_core.text.detokenizer import Detokenizer
from ensemble_core.text.prompt import PromptEncoder
from ensemble_core.text.vocabulary import Vocabulary

# No token is known to spell more characters than this many; a longer prompt cannot fit and is not tokenised.
_MAX_CHARS_PER_TOKEN = 256


@dataclass(frozen=True, slots=True)
class Speaker:
    """What admission needs of a member."""

    vocabulary: Vocabulary
    prompts: PromptEncoder
    max_len: int


class Admission:
    """Makes sequences."""

    def __init__(self, book: RecipeBook, speakers: Mapping[str, Speaker]) -> None:
        self._book = book
        self._speakers = dict(speakers)
        self._ids = itertools.count()

    def admit(self, request: GenerationRequest) -> Sequence:
        """A sequence for the engine's queue.

        Raises ModelNotFoundError for an unknown model, InvalidRequestError for overrides, prompts and lengths that
        cannot be served.
        """
        recipe = self._book.resolve(request.model, request.overrides)
        tracks = {member: self._track(member, request, recipe) for member in recipe.members}
        return Sequence(next(self._ids), request, recipe, tracks, Detokenizer(request.params.stop))

    def _track(self, member: str, request: GenerationRequest, recipe: Recipe) -> Track:
        speaker = self._speakers[member]
        ids = self._encode(speaker, request, member)
        room = speaker.max_len - len(ids)
        wanted = request.params.max_tokens if member == recipe.main else 1
        if room < wanted:
            raise InvalidRequestError(
                f"this model's context is {speaker.max_len} tokens of member {member!r}; the prompt has "
                f"{len(ids)} and max_tokens is {request.params.max_tokens}; shorten the prompt or lower it",
                "prompt" if room < 1 else "max_tokens",
            )
        return Track(speaker.vocabulary, ids)

    def _encode(self, speaker: Speaker, request: GenerationRequest, member: str) -> list[int]:
        if not isinstance(request.prompt, str):
            return speaker.prompts.encode_chat([dict(message) for message in request.prompt])
        if len(request.prompt) > speaker.max_len * _MAX_CHARS_PER_TOKEN:
            raise InvalidRequestError(
                f"the prompt has {len(request.prompt)} characters, which cannot fit the {speaker.max_len} tokens "
                f"of member {member!r}; shorten it",
                "prompt",
            )
        return speaker.prompts.encode(request.prompt)
