"""Answers flow along a graph: each node reads the question and the answers of those before it.

Heterogeneous Swarms (arXiv 2502.04510): messages in topological order, "Previous response k: ...", and the answer of
the node that nobody follows. Mixture-of-Agents (arXiv 2406.04692) is the same with layers. Knows texts; does not know
how answers come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ensemble_core.council_config import GraphConfig
from ensemble_core.councils.base import (
    NOTHING,
    Answer,
    Call,
    CallCost,
    CostOf,
    Notes,
    Plan,
    Round,
    Speak,
    asking,
    drafting,
    question_of,
    seeded,
)
from ensemble_core.councils.wording import worded
from ensemble_core.decoding.requests import GenerationRequest


def layers(config: GraphConfig) -> list[tuple[str, ...]]:
    """Nodes that can speak at the same time, in order; the end alone in the last."""
    depth: dict[str, int] = {}
    for node in config.order:
        depth[node] = 1 + max((depth[name] for name in config.before(node)), default=-1)
    found = [
        tuple(n for n in config.order if depth[n] == level and n != config.end) for level in range(len(depth))
    ]
    return [layer for layer in found if layer] + [(config.end,)]


def graph_cost(config: GraphConfig, cost_of: CostOf) -> CallCost:
    """Every node once, a layer at the same time."""
    whole = NOTHING
    for layer in layers(config):
        level = NOTHING
        for node in layer:
            level = level.beside(cost_of(config.nodes[node].model))
        whole = whole + level
    return whole


def graph_plan(config: GraphConfig, request: GenerationRequest) -> Plan:
    """Layer by layer; a node that failed is as if it were not there."""
    said: dict[str, str] = {}
    levels = layers(config)
    for rank, layer in enumerate(levels[:-1]):
        answers = yield Round(tuple(_call(config, node, request, said, rank) for node in layer))
        said |= _texts(answers)
    notes = Notes({"responses": dict(said), "order": list(config.order)}, rounds=len(levels))
    return Speak((_call(config, config.end, request, said, len(levels) - 1),), notes)


def _texts(answers: Sequence[Answer]) -> Mapping[str, str]:
    return {each.call.node: each.text for each in answers if each.output is not None}


def _call(config: GraphConfig, node: str, request: GenerationRequest, said: Mapping[str, str], rank: int) -> Call:
    own = config.nodes[node]
    read = [said[name] for name in config.before(node) if name in said]
    question = question_of(request.prompt)
    text = worded("graph_node", question=question, responses=read) if read else question
    is_end = node == config.end
    params = seeded(request.params if is_end else drafting(request.params), node, rank)
    changed = bool(read or own.role)
    prompt = asking(request.prompt, text, own.role) if changed else request.prompt
    return Call(node, own.model, prompt, params, round=rank, final=is_end, clipped=changed)
