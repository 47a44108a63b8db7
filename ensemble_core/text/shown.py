"""What a client sees of an answer: its content, its reasoning and its calls, out of one text.

Reasoning comes first and is text whatever it holds; what follows is content and calls. Stop strings act on content
alone. Invariant: the pieces join to the same answer, whatever the tokens that it came in.
"""

from __future__ import annotations

from collections.abc import Sequence

from ensemble_core.text.call_forms import CallForm
from ensemble_core.text.calls import CallReader
from ensemble_core.text.detokenizer import Detokenizer
from ensemble_core.text.reasoning import ReasoningReader
from ensemble_core.text.tools import CallPiece, merged


class AnswerText(Detokenizer):
    """A text with reasoning, with calls, or with both: `feed` and `flush` return its content.

    text, stop: of the content. exact: content begins right behind reasoning; else behind the white space there.
    """

    def __init__(
        self,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        calls: CallForm | None = None,
        reasoning: ReasoningReader | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__(stops, include_stop=include_stop)
        self._whole = Detokenizer()  # reasoning, content, markers and calls
        self._calls = None if calls is None else CallReader(calls)
        self._reasoning = reasoning
        self._pieces: list[CallPiece] = []
        self._thoughts = ""
        self._in_layout = reasoning is not None and not exact  # no content has come behind reasoning

    @property
    def mid_character(self) -> bool:
        """True while the last character is incomplete."""
        return self._whole.mid_character

    @property
    def num_reasoning(self) -> int | None:
        """Tokens of reasoning so far; None: there can be none."""
        return None if self._reasoning is None else self._reasoning.num_tokens

    def foresee(self, data: bytes) -> tuple[str, bool]:
        """See `Detokenizer.foresee`; here of the text with its reasoning and calls."""
        return self._whole.foresee(data)

    def feed(self, data: bytes, *, armed: bool = True) -> str:
        """Take in one token's bytes; the content that can be shown now. armed: see `Detokenizer.feed`."""
        return self._show(self._whole.feed(data), armed, num_tokens=1)

    def flush(self) -> str:
        """The end: everything that was held back."""
        shown = self._show(self._whole.flush(), True, num_tokens=0)
        if self._reasoning is not None:
            thought, content = self._reasoning.end()
            self._thoughts += thought
            shown += self._show_content(content, True)
        held = "" if self._calls is None else self._calls.end()
        return shown + self._show_plain(held, True) + super().flush()

    def take_calls(self) -> tuple[CallPiece, ...]:
        """The pieces of calls since the last time."""
        pieces, self._pieces = self._pieces, []
        return tuple(merged(pieces))

    def take_reasoning(self) -> str:
        """Reasoning since the last time."""
        thoughts, self._thoughts = self._thoughts, ""
        return thoughts

    def _show(self, text: str, armed: bool, num_tokens: int) -> str:
        if self._reasoning is not None:
            within = self._whole.mid_character
            thought, text = self._reasoning.feed(text, num_tokens, within_character=within)
            self._thoughts += thought
        return self._show_content(text, armed)

    def _show_content(self, text: str, armed: bool) -> str:
        """The text behind reasoning, without its calls."""
        if self._calls is None:
            return self._show_plain(text, armed)
        content, pieces = self._calls.feed(text)
        shown = self._show_plain(content, armed)
        if self._calls.in_calls and self.stop is None:
            shown += self.release()
            self._pieces += pieces
            self.called = self.called or bool(pieces)
        return shown

    def _show_plain(self, text: str, armed: bool) -> str:
        if self._in_layout and self._reasoning is not None and self._reasoning.begun:
            text = text.lstrip()
        self._in_layout = self._in_layout and not text
        return super().feed(text.encode(), armed=armed)


def shown_text(
    stops: Sequence[str],
    include_stop: bool,
    calls: CallForm | None,
    reasoning: ReasoningReader | None,
    exact: bool,
) -> Detokenizer:
    """What a client sees of an answer. calls: the form of those that it may have. exact: see `AnswerText`."""
    if calls is None and reasoning is None:
        return Detokenizer(stops, include_stop=include_stop)
    return AnswerText(stops, include_stop=include_stop, calls=calls, reasoning=reasoning, exact=exact)
