"""Tools for members whose chat template knows none: the same conversation in system, user and assistant messages.

The tools become a system message, calls become text in the plain form, results become a message of the user. Pure;
knows no templates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ensemble_core.text.call_forms import PLAIN
from ensemble_core.text.tools import Message, ToolUse

_INTRODUCTION = """You can call functions. Each of these lines describes one in JSON:
{tools}

To call a function, write its name and its arguments as JSON between <tool_call> and </tool_call>:
{example}
What a function returns comes back between <tool_response> and </tool_response>."""
_EXAMPLE = PLAIN.write([("the name", {"an argument": "its value"})])


def introduction(use: ToolUse) -> str:
    """The words that explain a request's tools to a model."""
    tools = "\n".join(json.dumps(tool.described()["function"], ensure_ascii=False) for tool in use.tools)
    return _INTRODUCTION.format(tools=tools, example=_EXAMPLE)


def plain_messages(
    messages: Sequence[Message], use: ToolUse | None, *, system: bool = True
) -> list[dict[str, Any]]:
    """The conversation without tool calls, tool messages and tools. system: the template takes system messages."""
    turns: list[dict[str, Any]] = []
    merges = False  # the next message of the user belongs to the results before it
    for message in messages:
        turn = _plain(message)
        is_result = message["role"] == "tool"
        if turns and turns[-1]["role"] == "user" == turn["role"] and (merges or is_result):
            turns[-1]["content"] += "\n" + turn["content"]
        else:
            turns.append(turn)
        merges = is_result
    return turns if use is None else _introduced(turns, introduction(use), system)


def _plain(message: Message) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    content = message["content"]
    if calls := message.get("tool_calls"):
        functions = [call["function"] for call in calls]
        written = PLAIN.write([(each["name"], each["arguments"]) for each in functions])
        content = f"{content}\n{written}" if content else written
    kept = {name: message[name] for name in ("reasoning", "reasoning_content") if name in message}
    return {"role": message["role"], "content": content, **kept}


def _introduced(turns: list[dict[str, Any]], words: str, system: bool) -> list[dict[str, Any]]:
    """With the words in the system message, or else at the head of what the user says first."""
    if not turns or (system and turns[0]["role"] != "system"):
        return [{"role": "system" if system else "user", "content": words}, *turns]
    rank = 0 if system else next((i for i, turn in enumerate(turns) if turn["role"] == "user"), 0)
    said = turns[rank]["content"]
    content = f"{said}\n\n{words}" if system else f"{words}\n\n{said}"
    return [*turns[:rank], turns[rank] | {"content": content}, *turns[rank + 1 :]]
