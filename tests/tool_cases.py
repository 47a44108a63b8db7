"""Tools for tests: random ones with their schemas, and what a chat template of a known kind makes of calls."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema_rs

from ensemble_core.text.tools import Tool, ToolCall, ToolUse

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
}
CHATML_TOOLS = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{% if m.role == 'tool' %}<tool_response>
{{ m.content }}
</tool_response>{% else %}{{ m.content }}{% endif %}{% for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA_TOOLS = """{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}
{{ raise_exception('single calls only') }}{% endif %}<|a|>
{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}
{% else %}<|{{ m.role }}|>
{{ m.content }}{% endif %}<|e|>{% endfor %}{% if add_generation_prompt %}<|a|>
{% endif %}"""
MISTRAL_TOOLS = """{%- if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.role == 'tool' -%}
{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif -%}
[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}{{ (call.function | tojson)[:-1] -}}
, "id": "{{ call.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]</s>{% else %} {{ m.content }}</s>
{%- endif %}{% endfor %}"""
ARGS_TOOLS = MISTRAL_TOOLS.replace(
    "[TOOL_CALLS] [{% for call in m.tool_calls %}{{ (call.function | tojson)[:-1] -}}\n"
    ', "id": "{{ call.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]</s>',
    "{% for call in m.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[ARGS]"
    "{{ call.function.arguments | tojson }}{% endfor %}</s>",
)
BARE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """The schema of some value that ends soon."""
    kinds = ["integer", "string", "boolean", "enum", "null"] + (["array", "object"] if depth else [])
    match rng.choice(kinds):
        case "integer":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 900)}
        case "string":
            return {"type": "string", "maxLength": rng.randint(0, 6)}
        case "enum":
            return {"enum": rng.sample(["a", 'quo"te', "}{", "é中😀", 7, None, "</tool_call>", "\\"], 3)}
        case "array":
            return {"type": "array", "items": random_schema(rng, depth - 1), "maxItems": rng.randint(0, 3)}
        case "object":
            return random_object(rng, depth - 1)
        case kind:
            return {"type": kind}


def random_object(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """The schema of an object."""
    names = rng.sample(["a", "b_2", "the-third", 'ke"y', "é", "description"], rng.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


def random_tools(rng: random.Random) -> tuple[Tool, ...]:
    """One to five tools."""
    names = rng.sample(["get", "get_more", "a-b", "X9", "search", "tool"], rng.randint(1, 5))
    return tuple(Tool(name, "does " + name, json.dumps(random_object(rng))) for name in names)


def check_call(call: ToolCall, use: ToolUse) -> None:
    """The call is of a tool that may be called, and its arguments follow the schema."""
    allowed = {tool.name: tool for _, tool in use.callable}
    assert call.name in allowed
    assert call.call_id.startswith("call_")
    arguments = json.loads(call.arguments)
    assert isinstance(arguments, dict)
    assert jsonschema_rs.is_valid(allowed[call.name].arguments(), arguments), (call, allowed[call.name])
