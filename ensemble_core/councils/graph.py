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
    for node, read in config.reads.items():
        depth[node] = 1 + max((depth[name] for name in read), default=-1)
    found: dict[int, list[str]] = {}
    for node, level in depth.items():
        if node != config.end:
            found.setdefault(level, []).append(node)
    return [*(tuple(found[level]) for level in sorted(found)), (config.end,)]


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
    levels, reads, end = layers(config), config.reads, config.end
    for rank, layer in enumerate(levels[:-1]):
        answers = yield Round(
            tuple(_call(config, node, request, _heard(reads[node], said), rank) for node in layer)
        )
        said |= _texts(answers)
    notes = Notes({"responses": dict(said), "order": list(reads)}, rounds=len(levels))
    last = _call(config, end, request, _heard(reads[end], said), len(levels) - 1, is_end=True)
    return Speak((last,), notes)


def _heard(read: Sequence[str], said: Mapping[str, str]) -> list[str]:
    return [said[name] for name in read if name in said]


def _texts(answers: Sequence[Answer]) -> Mapping[str, str]:
    return {each.call.node: each.text for each in answers if each.output is not None}


def _call(
    config: GraphConfig,
    node: str,
    request: GenerationRequest,
    read: Sequence[str],
    rank: int,
    is_end: bool = False,
) -> Call:
    """read: the responses that the node reads. is_end: its text is the answer, so the client's parameters hold."""
    own = config.nodes[node]
    question = question_of(request.prompt)
    text = worded("graph_node", question=question, responses=read) if read else question
    params = seeded(request.params if is_end else drafting(request.params), node, rank)
    changed = bool(read or own.role)
    prompt = asking(request.prompt, text, own.role) if changed else request.prompt
    return Call(node, own.model, prompt, params, round=rank, final=is_end, clipped=changed)
