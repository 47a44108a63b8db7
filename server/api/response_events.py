"""From outputs to the events of a response: items open, grow and close, one after the other.

Invariants: events are numbered from 0 without gaps; an item is closed before the next one opens; the last event has
the whole response, which is also the answer without a stream. Does not know bodies, HTTP or the engine.
"""

from __future__ import annotations

import secrets
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count
from typing import Literal

from ensemble_core.decoding.requests import Output
from ensemble_core.text.tools import CallPiece
from server.api.chat import to_chat_token
from server.edge.errors import ApiError
from server.schema.chat import ChatToken
from server.schema.response_replies import (
    ArgumentsDelta,
    ArgumentsDone,
    ContentPartEvent,
    ErrorEvent,
    FunctionCallItem,
    IncompleteDetails,
    ItemStatus,
    LifecycleEvent,
    OutputItem,
    OutputItemEvent,
    OutputMessage,
    OutputText,
    OutputTextDelta,
    OutputTextDone,
    ReasoningItem,
    ReasoningText,
    ReasoningTextDelta,
    ReasoningTextDone,
    ResponseEvent,
    ResponseFailure,
    ResponseObject,
)

_PADDED = 32  # characters; with obfuscation a delta and its padding have a multiple of them


class _OpenItem(ABC):
    """An item that is being written."""

    def __init__(self, prefix: str, index: int) -> None:
        self.id = f"{prefix}_{uuid.uuid4().hex}"
        self.index = index

    @abstractmethod
    def item(self, status: ItemStatus) -> OutputItem:
        """The item as it is now."""

    def opening(self) -> Iterator[ResponseEvent]:
        """The events before its first text."""
        yield OutputItemEvent(
            type="response.output_item.added", output_index=self.index, item=self.item("in_progress")
        )

    def closing(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        """The events after its last text."""
        yield OutputItemEvent(type="response.output_item.done", output_index=self.index, item=self.item(status))


class _OpenText(_OpenItem):
    """An item with one text."""

    def __init__(self, prefix: str, index: int) -> None:
        super().__init__(prefix, index)
        self._pieces: list[str] = []  # of the text; joined once
        self._begun = False

    @abstractmethod
    def _part(self) -> OutputText | ReasoningText:
        """The text as it is now."""

    def opening(self) -> Iterator[ResponseEvent]:
        yield from super().opening()
        self._begun = True
        yield self._of_part("response.content_part.added")

    def closing(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        yield self._of_part("response.content_part.done")
        yield from super().closing(status)

    def _of_part(
        self, kind: Literal["response.content_part.added", "response.content_part.done"]
    ) -> ContentPartEvent:
        return ContentPartEvent(
            type=kind, item_id=self.id, output_index=self.index, content_index=0, part=self._part()
        )


class _OpenMessage(_OpenText):
    """A message."""

    def __init__(self, index: int) -> None:
        super().__init__("msg", index)
        self._logprobs: list[ChatToken] = []

    def item(self, status: ItemStatus) -> OutputMessage:
        content = [self._part()] if self._begun else []
        return OutputMessage(id=self.id, type="message", status=status, role="assistant", content=content)

    def grow(self, text: str, logprobs: list[ChatToken], padding: str | None) -> OutputTextDelta:
        """Add text."""
        self._pieces.append(text)
        self._logprobs += logprobs
        delta = OutputTextDelta(
            type="response.output_text.delta",
            item_id=self.id,
            output_index=self.index,
            content_index=0,
            delta=text,
            logprobs=logprobs,
        )
        if padding is not None:
            delta.obfuscation = padding
        return delta

    def closing(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        part = self._part()
        yield OutputTextDone(
            type="response.output_text.done",
            item_id=self.id,
            output_index=self.index,
            content_index=0,
            text=part.text,
            logprobs=part.logprobs,
        )
        yield from super().closing(status)

    def _part(self) -> OutputText:
        text = "".join(self._pieces)
        return OutputText(type="output_text", text=text, annotations=[], logprobs=list(self._logprobs))


class _OpenReasoning(_OpenText):
    """What the model thinks."""

    def __init__(self, index: int) -> None:
        super().__init__("rs", index)

    def item(self, status: ItemStatus) -> ReasoningItem:
        content = [self._part()] if self._begun else []
        return ReasoningItem(id=self.id, type="reasoning", status=status, summary=[], content=content)

    def grow(self, text: str, padding: str | None) -> ReasoningTextDelta:
        """Add reasoning."""
        self._pieces.append(text)
        delta = ReasoningTextDelta(
            type="response.reasoning_text.delta",
            item_id=self.id,
            output_index=self.index,
            content_index=0,
            delta=text,
        )
        if padding is not None:
            delta.obfuscation = padding
        return delta

    def closing(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        yield ReasoningTextDone(
            type="response.reasoning_text.done",
            item_id=self.id,
            output_index=self.index,
            content_index=0,
            text=self._part().text,
        )
        yield from super().closing(status)

    def _part(self) -> ReasoningText:
        return ReasoningText(type="reasoning_text", text="".join(self._pieces))


class _OpenCall(_OpenItem):
    """A call of a function."""

    def __init__(self, index: int, piece: CallPiece) -> None:
        super().__init__("fc", index)
        self._name, self._call_id = piece.name or "", piece.call_id or ""
        self._pieces: list[str] = []  # of the arguments

    def item(self, status: ItemStatus) -> FunctionCallItem:
        return FunctionCallItem(
            id=self.id,
            type="function_call",
            status=status,
            call_id=self._call_id,
            name=self._name,
            arguments="".join(self._pieces),
        )

    def grow(self, arguments: str, padding: str | None) -> ArgumentsDelta:
        """Add to the arguments."""
        self._pieces.append(arguments)
        delta = ArgumentsDelta(
            type="response.function_call_arguments.delta",
            item_id=self.id,
            output_index=self.index,
            delta=arguments,
        )
        if padding is not None:
            delta.obfuscation = padding
        return delta

    def closing(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        yield ArgumentsDone(
            type="response.function_call_arguments.done",
            item_id=self.id,
            output_index=self.index,
            name=self._name,
            arguments="".join(self._pieces),
        )
        yield from super().closing(status)


class EventWriter:
    """Writes the events of one response.

    response: as it begins, with all that repeats the request. num_top: alternatives of each token; None: no
    log-probabilities. pads: deltas get padding.
    """

    def __init__(self, response: ResponseObject, num_top: int | None, pads: bool) -> None:
        self._response = response
        self._num_top, self._pads = num_top, pads
        self._numbers = count()
        self._begun = False
        self._done: list[OutputItem] = []
        self._open: _OpenItem | None = None
        self._logprobs: list[ChatToken] = []  # of text that is not out yet

    def add(self, output: Output) -> Iterator[ResponseEvent]:
        """The events of one output."""
        yield from self._begin()
        if self._num_top is not None:
            self._logprobs += [to_chat_token(token, self._num_top) for token in output.logprobs]
        if output.reasoning:
            yield from self._reasoning(output.reasoning)
        if output.text:
            yield from self._text(output.text)
        for piece in output.calls:
            yield from self._call(piece)

    def end(self, response: ResponseObject, *, cut: bool) -> Iterator[ResponseEvent]:
        """The last events. response: as at first, with what is known only now. cut: by the length limit."""
        if self._open is None and not self._done:
            yield from self._switch(_OpenMessage(0))
        if self._logprobs and isinstance(self._open, _OpenMessage):
            yield from self._text("")
        status: Literal["incomplete", "completed"] = "incomplete" if cut else "completed"
        yield from self._close(status)
        whole = response.model_copy(
            update={
                "status": status,
                "output": self._done,
                "completed_at": None if cut else int(time.time()),
                "incomplete_details": IncompleteDetails(reason="max_output_tokens") if cut else None,
            }
        )
        yield self._numbered(LifecycleEvent(type=f"response.{status}", response=whole))

    def fail(self, error: ApiError) -> Iterator[ResponseEvent]:
        """The last events of a response that has failed. An item that is open stays cut."""
        yield from self._begin()
        told = {name: _encodable(value) for name, value in error.detail().items() if name != "type"}
        yield self._numbered(ErrorEvent.model_validate({"type": "error", **told}))
        left = [] if self._open is None else [self._open.item("incomplete")]
        code: Literal["invalid_prompt", "server_error"] = (
            "invalid_prompt" if error.status == 400 else "server_error"
        )
        failed = self._response.model_copy(
            update={
                "status": "failed",
                "output": [*self._done, *left],
                "error": ResponseFailure(code=code, message=told["message"] or ""),
            }
        )
        yield self._numbered(LifecycleEvent(type="response.failed", response=failed))

    def _begin(self) -> Iterator[ResponseEvent]:
        if not self._begun:
            self._begun = True
            yield self._numbered(LifecycleEvent(type="response.created", response=self._response))
            yield self._numbered(LifecycleEvent(type="response.in_progress", response=self._response))

    def _text(self, text: str) -> Iterator[ResponseEvent]:
        message = self._open
        if not isinstance(message, _OpenMessage):
            message = _OpenMessage(self._next_index)
            yield from self._switch(message)
        logprobs, self._logprobs = self._logprobs, []
        yield self._numbered(message.grow(text, logprobs, self._padding(text)))

    def _reasoning(self, text: str) -> Iterator[ResponseEvent]:
        self._logprobs = []  # reasoning has no place for them
        thought = self._open
        if not isinstance(thought, _OpenReasoning):
            thought = _OpenReasoning(self._next_index)
            yield from self._switch(thought)
        yield self._numbered(thought.grow(text, self._padding(text)))

    def _call(self, piece: CallPiece) -> Iterator[ResponseEvent]:
        self._logprobs = []  # a call has no place for them
        call = self._open
        if piece.name is not None or not isinstance(call, _OpenCall):
            call = _OpenCall(self._next_index, piece)
            yield from self._switch(call)
        if piece.arguments:
            yield self._numbered(call.grow(piece.arguments, self._padding(piece.arguments)))

    @property
    def _next_index(self) -> int:
        return len(self._done) + (self._open is not None)

    def _switch(self, item: _OpenItem) -> Iterator[ResponseEvent]:
        yield from self._close("completed")
        self._open = item
        yield from map(self._numbered, item.opening())

    def _close(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        if self._open is not None:
            yield from map(self._numbered, self._open.closing(status))
            self._done.append(self._open.item(status))
            self._open = None

    def _padding(self, text: str) -> str | None:
        size = -len(text) % _PADDED
        return secrets.token_hex(_PADDED)[:size] if self._pads else None

    def _numbered(self, event: ResponseEvent) -> ResponseEvent:
        event.sequence_number = next(self._numbers)
        return event


def _encodable(text: str | None) -> str | None:
    """A message may quote text that UTF-8 cannot encode."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
