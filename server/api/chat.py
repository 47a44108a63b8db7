"""/v1/chat/completions: turns bodies into jobs and outputs into answers. Nothing here knows HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from ensemble_core.decoding.requests import Alternative, Conversation, Output, TokenLogprob
from ensemble_core.decoding.sampling_params import PARAMETERS, SamplingParams
from ensemble_core.errors import InvalidRequestError
from ensemble_core.text.tools import CallPiece, folded
from ensemble_core.text.variables import TemplateVariables
from server.api.jobs import ChoiceJob, end_of, finite, token_name, trace_steps
from server.api.tickets import Ticket, check_count, check_named, make_ticket, sampling_params
from server.api.words import named
from server.schema.chat import (
    AssistantMessage,
    ChatAlternative,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatPiece,
    ChatRequest,
    ChatToken,
    Delta,
    to_conversation,
)
from server.schema.tools import FunctionReply, ToolCallDelta, ToolCallReply, to_tool_use


def chat_words(body: ChatRequest) -> AbstractContextManager[None]:
    """Rename the fields in the engine's InvalidRequestError to the names that this endpoint uses."""
    names = {"prompt": "messages"}
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    return named(lambda param: names.get(param, param))


def conversation(body: ChatRequest) -> Conversation:
    """The messages in the engine's form. Raises InvalidRequestError."""
    opens_turn = body.add_generation_prompt is not False
    tools = to_tool_use(body.tools or (), body.tool_choice, body.parallel_tool_calls)
    variables = TemplateVariables(body.chat_template_kwargs or {}, body.reasoning_effort)
    return to_conversation(body.messages, bool(body.continue_final_message), opens_turn, tools, variables)


def length_limit(body: ChatRequest) -> int | None:
    """The client's length limit, sent under either name. Raises InvalidRequestError."""
    newer, older = body.max_completion_tokens, body.max_tokens
    if newer is not None and older is not None and newer != older:
        raise InvalidRequestError(
            f"max_tokens is the older name of max_completion_tokens; send one of them, got {older} and {newer}",
            "max_tokens",
        )
    return older if newer is None else newer


def room_left(num_prompt_tokens: int, max_model_len: int) -> int:
    """The length limit if the client set none. Raises InvalidRequestError if the context is full."""
    if num_prompt_tokens >= max_model_len:
        raise InvalidRequestError(
            f"this model's context is {max_model_len} tokens and the messages have {num_prompt_tokens}; "
            "shorten them",
            "messages",
        )
    return max_model_len - num_prompt_tokens


def plan(body: ChatRequest, prompt: Conversation, max_tokens: int, max_choices: int) -> ChatJob:
    """The job that a body asks for. Raises InvalidRequestError. Bounds n before it allocates anything."""
    num_choices = check_count("n", 1 if body.n is None else body.n, 1, max_choices)
    params = _params(body, max_tokens)
    return ChatJob(make_ticket(body, "chatcmpl-", [prompt], params, (num_choices, num_choices)), body)


def _params(body: ChatRequest, max_tokens: int) -> SamplingParams:
    return sampling_params(
        body,
        max_tokens=max_tokens,
        logprobs=_num_logprobs(body),
        thinking_token_budget=body.thinking_token_budget,
    )


def _num_logprobs(body: ChatRequest) -> int | None:
    wanted = body.top_logprobs or 0
    PARAMETERS["logprobs"].check("top_logprobs", wanted)
    check_named(body.logprob_token_ids, asked=bool(body.logprobs), needs="logprobs: true")
    if wanted and not body.logprobs:
        raise InvalidRequestError("top_logprobs is only allowed with logprobs: true", "top_logprobs")
    return wanted if body.logprobs else None


def _num_told(body: ChatRequest) -> int | None:
    """How many alternatives a token is sent with, at most; None: no log-probabilities."""
    if not body.logprobs:
        return None
    return len(body.logprob_token_ids) + 1 if body.logprob_token_ids else body.top_logprobs or 0


class ChatJob(ChoiceJob):
    """One body of /v1/chat/completions."""

    def __init__(self, ticket: Ticket, body: ChatRequest) -> None:
        super().__init__(ticket, body)
        self._num_top = _num_told(body)
        self._sends_trace = bool(body.ensemble and body.ensemble.trace)
        self._sends_reasoning = body.include_reasoning is not False

    def piece(self, index: int, output: Output, *, first: bool) -> ChatChunk:
        """A chunk with one choice; the first chunk of each choice has the role."""
        piece = ChatPiece(
            index=index,
            delta=to_delta(output, first=first, reasoning=self._sends_reasoning),
            logprobs=self._logprobs(output),
            finish_reason=end_of(output),
            stop_reason=output.stop_reason,
        )
        self._extend(piece, output)
        chunk = self._chunk([piece])
        if first:
            chunk.prompt_token_ids = list(output.prompt_token_ids) if self._sends_ids else None
        return chunk

    def usage_chunk(self) -> ChatChunk:
        """A chunk without choices."""
        return self._chunk([])

    def whole(self, outputs: Sequence[Output]) -> ChatCompletion:
        """The answer with all choices."""
        ticket = self.ticket
        answer = ChatCompletion(
            id=ticket.id,
            object="chat.completion",
            created=ticket.created,
            model=ticket.model,
            choices=[self._choice(index, output) for index, output in enumerate(outputs)],
            prompt_logprobs=self._prompt_logprobs(outputs[0]),
        )
        answer.prompt_token_ids = list(outputs[0].prompt_token_ids) if self._sends_ids else None
        return answer

    def _chunk(self, pieces: list[ChatPiece]) -> ChatChunk:
        ticket = self.ticket
        return ChatChunk(
            id=ticket.id,
            object="chat.completion.chunk",
            created=ticket.created,
            model=ticket.model,
            choices=pieces,
        )

    def _choice(self, index: int, output: Output) -> ChatChoice:
        choice = ChatChoice(
            index=index,
            message=to_message(output, reasoning=self._sends_reasoning),
            logprobs=self._logprobs(output),
            finish_reason=end_of(output),
            stop_reason=output.stop_reason,
        )
        self._extend(choice, output)
        return choice

    def _says_something(self, output: Output) -> bool:
        return super()._says_something(output) or bool(self._sends_reasoning and output.reasoning)

    def _extend(self, choice: ChatChoice | ChatPiece, output: Output) -> None:
        """Add the fields that are sent only on request."""
        if self._sends_ids:
            choice.token_ids = list(output.token_ids)
        if self._sends_trace:
            choice.trace = trace_steps(output.traces)
            if output.report is not None:
                choice.council = dict(output.report.trace)

    def _logprobs(self, output: Output) -> ChatLogprobs | None:
        if self._num_top is None:
            return None
        return ChatLogprobs(content=[self._token(token, self._num_top) for token in output.logprobs])

    def _token(self, token: TokenLogprob, num_top: int) -> ChatToken:
        return to_chat_token(token, num_top, as_ids=self._names_ids)


def to_delta(output: Output, *, first: bool, reasoning: bool = True) -> Delta:
    """The news of one output: reasoning, text, pieces of calls. first: of the choice, which says the role."""
    delta = Delta(role="assistant") if first else Delta()
    if reasoning and output.reasoning:
        delta.reasoning = delta.reasoning_content = output.reasoning
    if output.text or not (output.calls or (reasoning and output.reasoning)):
        delta.content = output.text
    if output.calls:
        delta.tool_calls = [_call_delta(piece) for piece in output.calls]
    return delta


def _call_delta(piece: CallPiece) -> ToolCallDelta:
    if piece.name is None:
        return ToolCallDelta(index=piece.index, function=FunctionReply(arguments=piece.arguments))
    function = FunctionReply(name=piece.name, arguments=piece.arguments)
    return ToolCallDelta(index=piece.index, id=piece.call_id, type="function", function=function)


def to_message(output: Output, *, reasoning: bool = True) -> AssistantMessage:
    """The whole answer of one choice."""
    calls = folded(output.calls)
    is_text = output.text or not (calls or output.reasoning)
    message = AssistantMessage(role="assistant", content=output.text if is_text else None)
    if reasoning and output.reasoning:
        message.reasoning = message.reasoning_content = output.reasoning
    if calls:
        message.tool_calls = [
            ToolCallReply(
                id=call.call_id,
                type="function",
                function=FunctionReply(name=call.name, arguments=call.arguments),
            )
            for call in calls
        ]
    return message


def to_chat_token(token: TokenLogprob, num_top: int, *, as_ids: bool = False) -> ChatToken:
    """A token and its `num_top` likeliest alternatives, best first. as_ids: they are named by their ids."""
    assert token.logprob is not None  # only a prompt's first token has none
    own = _alternative(Alternative(token.token_id, token.spelling, token.logprob), as_ids)
    top = sorted(token.top, key=lambda each: -each.logprob)[:num_top]
    alternatives = [_alternative(each, as_ids) for each in top]
    return ChatToken(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=alternatives)


def _alternative(each: Alternative, as_ids: bool) -> ChatAlternative:
    """The bytes are those that the token adds to a text; of a control token those of its name."""
    return ChatAlternative(token=token_name(each, as_ids), logprob=finite(each.logprob), bytes=list(each.spelling))
