"""What of a request is refused before its prompt is read: ids, and what members cannot do.

Every refusal names the field and what to do. Thread-safe. Knows recipes and speakers; does not know engines or tokens
of prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import Conversation, GenerationRequest
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import InvalidRequestError
from ensemble_core.speakers import Speaker
from ensemble_core.text.tools import ToolUse
from ensemble_core.text.variables import reads_effort
from ensemble_core.text.vocabulary import Vocabulary

_IDS = ("allowed_token_ids", "stop_token_ids", "logprob_token_ids")  # parameters that are ids of main


class Refusals:
    """What members of a configuration cannot serve."""

    def __init__(self, speakers: Mapping[str, Speaker]) -> None:
        self._speakers = speakers

    def check(self, request: GenerationRequest, recipe: Recipe) -> None:
        """Raise InvalidRequestError for the first thing that cannot be served."""
        params, main = request.params, self._speakers[recipe.main]
        check_ids("logit_bias", [token_id for token_id, _ in params.logit_bias], main.vocabulary)
        for name in _IDS:
            check_ids(name, getattr(params, name), main.vocabulary)
        _check_scoring(params, recipe)
        self.check_abilities(request, recipe)
        if not request.reserved:  # a council's models need not all of them reason
            self.check_reasoning(request, recipe.members, {recipe.main})

    def check_reasoning(self, request: GenerationRequest, members: Iterable[str], mains: Iterable[str]) -> None:
        """Raise where a request says how to reason and nobody would listen.

        members: whose templates read its messages. mains: who may write its answer.
        """
        effort = isinstance(request.prompt, Conversation) and request.prompt.variables.needs_reader
        if effort and not any(reads_effort(self._speakers[name].prompts.template) for name in members):
            raise InvalidRequestError(
                "reasoning_effort: no chat template of this model has a variable for it (reasoning_effort, "
                "enable_thinking); leave it out or send none",
                "reasoning_effort",
            )
        if request.params.budget is None:
            return
        if not isinstance(request.prompt, Conversation) or not any(self._speakers[m].thinking for m in mains):
            raise InvalidRequestError(
                "thinking_token_budget: this model's answers have no reasoning, since its main member has no markers "
                "for it (members.NAME.reasoning); leave it out or send -1",
                "thinking_token_budget",
            )

    def check_abilities(self, request: GenerationRequest, recipe: Recipe) -> None:
        """Raise where the request needs more than a member can do.

        A remote member may limit its candidates, answer only at the last position of a prompt, or know no salts.
        """
        self._check_widths(request, recipe)
        self._check_positions(request.params, recipe)
        self._check_also(request.params, recipe)
        for member in recipe.members if request.salt else ():
            if not self._speakers[member].abilities.salts:
                raise InvalidRequestError(
                    f"cache_salt: member {member!r} cannot keep what it has cached apart by a salt; leave it out",
                    "cache_salt",
                )

    def _check_widths(self, request: GenerationRequest, recipe: Recipe) -> None:
        """Whole distributions, where the fusion or a constraint needs them."""
        whole = recipe.members if recipe.fusion is not None and recipe.fusion.full_vocabulary else ()
        param, form = "ensemble.fusion", request.params.form
        if tools_of(request) is not None or form is not None:
            whole = (*whole, recipe.main)
            param = "tools" if form is None else form.field
        for member in whole:
            if (most := self._speakers[member].abilities.max_k) is not None:
                raise InvalidRequestError(
                    f"{param} needs whole distributions, and member {member!r} answers with {most} candidates at "
                    "most; leave it out",
                    param,
                )

    def _check_positions(self, params: SamplingParams, recipe: Recipe) -> None:
        """Every position of the prompt, where it is scored or weighed."""
        param = scoring(params)[1] if params.scores_prompt else "ensemble.weighting"
        for member in recipe.members if params.scores_prompt or recipe.tau is not None else ():
            if not self._speakers[member].abilities.every_position:
                raise InvalidRequestError(
                    f"{param} needs every position of the prompt, and member {member!r} answers at its last one "
                    "alone; leave it out",
                    param,
                )

    def _check_also(self, params: SamplingParams, recipe: Recipe) -> None:
        """Ids that main must tell of whatever their rank."""
        most = self._speakers[recipe.main].abilities.max_also
        num = len(params.asked_ids) + (params.budget is not None)  # the end marker that it may force
        if most is not None and num > most:
            names = ("allowed_token_ids", "logprob_token_ids", "logit_bias", "thinking_token_budget")
            param = next(name for name in names if getattr(params, name))
            raise InvalidRequestError(
                f"{param}: {num} ids must be among the candidates, and member {recipe.main!r} can be asked for "
                f"{most} at most; send fewer",
                param,
            )


def tools_of(request: GenerationRequest) -> ToolUse | None:
    """The tools that the answer may call."""
    tools = request.prompt.tools if isinstance(request.prompt, Conversation) else None
    return tools if tools is not None and tools.binds else None


def scoring(params: SamplingParams) -> tuple[str, str]:
    """What asks for the prompt's log-probabilities, in words, and its field."""
    return ("echo with logprobs", "echo") if params.prompt_logprobs is None else ("prompt_logprobs",) * 2


def _check_scoring(params: SamplingParams, recipe: Recipe) -> None:
    what, param = scoring(params)
    if params.scores_prompt and recipe.fusion is not None and recipe.fusion.full_vocabulary:
        raise InvalidRequestError(f"{what} works on candidates; ask for a fusion with `support: closed`", param)
    if params.scores_prompt and recipe.tau is not None:
        raise InvalidRequestError(
            f"{what} scores the prompt, but weights by perplexity are known only after it; send "
            "`ensemble: {weighting: fixed}`, or leave one of them out",
            param,
        )


def check_ids(param: str, token_ids: Iterable[int], vocabulary: Vocabulary) -> None:
    """Raise InvalidRequestError for the first id that the vocabulary does not have."""
    known = range(len(vocabulary))
    for token_id in token_ids:
        if token_id not in known:
            raise InvalidRequestError(
                f"{param}: id {token_id} is outside the main member's vocabulary, which has ids 0 to "
                f"{len(vocabulary) - 1}",
                param,
            )
