"""Learns a gate's numbers from positions at which the true token is known.

The loss is that of a linear pool, -log sum_i w_i s_i, where s_i is what member i gives the true token; so a step
costs no fusion. A gate begins as one weight at every place (g = 0, the output layer is zero) and is kept as it was
where it did best on documents held out for that, so it is never worse than one weight there. Several gates, each with
other documents held out, are averaged in their logits, which makes one wider gate. Seeded: the same positions give
the same gate. Knows numbers alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ensemble_core.fusion.gate import GateNumbers

HIDDEN = 16
_RATE, _DECAY = 1e-2, 0.1
_BATCH, _MOST_ROUNDS, _PATIENCE = 1024, 300, 40
_HELD_OUT = 0.15  # of the documents
_LEAST = 1e-12  # what a true token is given at least


@dataclass(frozen=True, slots=True)
class GateExamples:
    """P positions at which the true token is known."""

    evidence: Tensor  # (P, M, F) float32
    shares: Tensor  # (P, M) what each member gives the true token
    documents: Tensor  # (P,) int64

    def at(self, kept: Tensor) -> GateExamples:
        """Some of them: (P,) bool, or places."""
        return GateExamples(self.evidence[kept], self.shares[kept], self.documents[kept])


def learn(examples: GateExamples, prior: tuple[float, ...], num_gates: int, seed: int) -> GateNumbers:
    """The average of several gates. prior: the weights that a gate multiplies, one for each member."""
    spread = examples.evidence.std(dim=0).clamp_min(1e-3)
    start = _blank(examples.evidence.mean(dim=0), spread)
    ready = replace(examples, evidence=start.standardised(examples.evidence))
    log_prior = torch.tensor(prior).log()
    return _averaged([_learnt(ready, start, log_prior, seed + number) for number in range(num_gates)])


def _blank(mean: Tensor, spread: Tensor) -> GateNumbers:
    """A gate that leaves the weights as they are, without an inner layer."""
    num, width = mean.shape
    hidden = torch.zeros(num, HIDDEN)
    return GateNumbers(mean, spread, torch.zeros(num, width, HIDDEN), hidden, hidden.clone(), torch.zeros(num))


def _learnt(examples: GateExamples, start: GateNumbers, log_prior: Tensor, seed: int) -> GateNumbers:
    draw = torch.Generator().manual_seed(seed)
    held = _held_out(examples.documents, draw)
    seen, unseen = examples.at(~held), examples.at(held)
    inner = torch.randn(start.inner.shape, generator=draw) / math.sqrt(start.inner.shape[1])
    now = _trainable(replace(start, inner=inner))
    layers = [{"params": [now.inner, now.outer], "weight_decay": _DECAY}]
    optimiser = torch.optim.AdamW([*layers, {"params": [now.shift, now.bias], "weight_decay": 0.0}], lr=_RATE)
    best, least, since = _copied(now), _loss(now, unseen, log_prior).item(), 0
    for _ in range(_MOST_ROUNDS):
        for part in torch.split(torch.randperm(len(seen.documents), generator=draw), _BATCH):
            optimiser.zero_grad()
            _loss(now, seen.at(part), log_prior).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        value, since = _loss(now, unseen, log_prior).item(), since + 1
        if value < least:
            best, least, since = _copied(now), value, 0
        elif since > _PATIENCE:
            break
    return best


def _held_out(documents: Tensor, draw: torch.Generator) -> Tensor:
    """(P,) bool: positions of the documents that say when to stop."""
    names = torch.unique(documents)
    count = max(int(len(names) * _HELD_OUT), 1)
    return torch.isin(documents, names[torch.randperm(len(names), generator=draw)[:count]])


def _loss(numbers: GateNumbers, examples: GateExamples, log_prior: Tensor) -> Tensor:
    """Mean -log of the pool. A product in place of the gate's own sums: as good here, and faster."""
    inside = torch.einsum("pmf,mfh->pmh", examples.evidence, numbers.inner) + numbers.shift
    logits = (inside.tanh() * numbers.outer).sum(dim=2) + numbers.bias
    weights = (logits + log_prior).log_softmax(dim=1)
    return -(weights + examples.shares.clamp_min(_LEAST).log()).logsumexp(dim=1).mean()


def _trainable(numbers: GateNumbers) -> GateNumbers:
    learnt = {
        name: getattr(numbers, name).clone().requires_grad_() for name in ("inner", "shift", "outer", "bias")
    }
    return replace(numbers, **learnt)


def _copied(numbers: GateNumbers) -> GateNumbers:
    learnt = {name: getattr(numbers, name).detach().clone() for name in ("inner", "shift", "outer", "bias")}
    return replace(numbers, **learnt)


def _averaged(gates: list[GateNumbers]) -> GateNumbers:
    """One gate whose logits are the mean of all: their inner layers side by side."""
    return replace(
        gates[0],
        inner=torch.cat([gate.inner for gate in gates], dim=2),
        shift=torch.cat([gate.shift for gate in gates], dim=1),
        outer=torch.cat([gate.outer for gate in gates], dim=1) / len(gates),
        bias=torch.stack([gate.bias for gate in gates]).mean(dim=0),
    )
