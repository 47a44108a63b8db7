"""The model that is best for a question answers it.

Who is best: a router's scores (Avengers, arXiv 2505.19797; RouteLLM, arXiv 2406.18665), the likelihood that each
model gives to the prompt, or the order of the configuration. Several that are good answer as one token-level ensemble
with the shares of a gate as weights (SelectLLM, arXiv 2408.08545). Knows texts; does not know how answers come.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ensemble_core.council_config import RouteConfig
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
    question_of,
)
from ensemble_core.councils.routers import Balance, Router, balance_of
from ensemble_core.decoding.requests import GenerationRequest, Output, Overrides
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import CouncilError

SCORING = SamplingParams(max_tokens=0, echo=True, logprobs=0, temperature=0.0)  # how likely is this prompt?


def route_cost(config: RouteConfig, cost_of: CostOf) -> CallCost:
    """The dearest of its models, and the one that answers in its place where it fails."""
    scoring = CallCost(len(config.models), 0, 0, len(config.models)) if config.by == "perplexity" else NOTHING
    tried = [cost_of(model) for model in config.called]
    in_turn = NOTHING
    for cost in tried if config.by == "fixed" else _dearest(config, cost_of):
        in_turn = in_turn + cost
    if all(cost == CallCost() for cost in tried):
        in_turn = replace(in_turn, writers=1)  # one that failed before its first text has written none
    return scoring + in_turn


def _dearest(config: RouteConfig, cost_of: CostOf) -> list[CallCost]:
    others = [cost_of(model) for model in config.called if model != config.fallback]
    found = [max(others, key=lambda cost: (cost.calls, cost.writers), default=CallCost())]
    return found if config.fallback is None else [*found, cost_of(config.fallback)]


def route_plan(config: RouteConfig, router: Router | None, main: str | None, request: GenerationRequest) -> Plan:
    """Score the models, then let the chosen one speak. main: of the ensemble `into`.

    Raises CouncilError if none can be scored.
    """
    if config.by == "fixed":
        models = (*config.models, *((config.fallback,) if config.fallback not in (None, *config.models) else ()))
        return Speak(tuple(_asked(model, request) for model in models if model is not None))
    if config.by == "perplexity":
        scores = yield from _by_likelihood(config, request)
    else:
        assert router is not None
        scores = router.scores(question_of(request.prompt), _balance(config))
    return _speak(config, scores, main, request)


def _balance(config: RouteConfig) -> Balance | None:
    return None if config.cost is None else balance_of(config.models, config.cost.alpha, config.cost.prices)


def _asked(model: str, request: GenerationRequest, overrides: Overrides | None = None) -> Call:
    """The request as it is: a text is the same as if the model had been asked for it."""
    return Call(model, model, request.prompt, request.params, overrides=overrides or Overrides(), final=True)


def _by_likelihood(config: RouteConfig, request: GenerationRequest) -> Generator[Round, Sequence[Answer], Tensor]:
    """(M,) exp(-NLL / tau) of the question, NLL in nats per byte; 0 for a model that could not say."""
    question = question_of(request.prompt)
    answers = yield Round(tuple(Call(model, model, question, SCORING) for model in config.models))
    costs = [math.inf if each.output is None else nats_per_byte(each.output, question) for each in answers]
    if all(math.isinf(cost) for cost in costs):
        raise CouncilError(
            f"no model could read the prompt: {next((str(a.error) for a in answers if a.error), '')}"
        )
    quality = torch.tensor([math.exp(-cost / config.tau) for cost in costs])
    balance = _balance(config)
    return quality if balance is None else balance.of(quality)


def nats_per_byte(output: Output, text: str) -> float:
    """Negative log-likelihood of a scored prompt over the bytes that were scored; the first token never is."""
    scored = [each for each in output.prompt_logprobs if each.logprob is not None]
    if not scored:
        return math.inf
    num_bytes = len(text[scored[0].text_offset :].encode("utf-8", "replace"))
    return -sum(each.logprob or 0.0 for each in scored) / max(num_bytes, 1)


def gate(scores: Tensor, config: RouteConfig) -> dict[str, float]:
    """Model -> share, best first: those over the threshold, `select.max` at most, scaled to sum to 1."""
    select = config.select
    shares = torch.softmax(scores.to(torch.float64) / select.temperature, 0)
    order = torch.argsort(shares, descending=True, stable=True).tolist()
    kept = [rank for rank in order[: select.max] if shares[rank] >= select.threshold] or order[:1]
    total = sum(float(shares[rank]) for rank in kept)
    return {config.models[rank]: float(shares[rank]) / total for rank in kept}


def _speak(config: RouteConfig, scores: Tensor, main: str | None, request: GenerationRequest) -> Speak:
    shares = gate(scores, config)
    best = scores.topk(min(2, len(scores))).values.tolist()
    lead = best[0] - best[1] if len(best) > 1 else math.inf
    notes = Notes({"scores": dict(zip(config.models, scores.tolist(), strict=True)), "selected": shares})
    if config.fallback is not None and lead < config.margin:
        return Speak((_asked(config.fallback, request),), notes)
    calls = [_chosen(config, shares, main, request)]
    if config.fallback is not None and config.fallback != calls[0].model:
        calls.append(_asked(config.fallback, request))
    return Speak(tuple(calls), notes)


def _chosen(config: RouteConfig, shares: dict[str, float], main: str | None, request: GenerationRequest) -> Call:
    """One model as it is; several as the ensemble `into`, whose main member takes part in any case."""
    if len(shares) == 1 or config.into is None:
        return _asked(next(iter(shares)), request)
    assert main is not None
    weights = {main: 0.0} | shares
    return _asked(config.into, request, Overrides(members=tuple(weights), weights=weights))
