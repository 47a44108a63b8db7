"""The kinds of `ensembles:` that are whole conversations between models: route, vote, discuss, graph. No torch.

A council's models are members, token-level ensembles or other councils. What can be said of one council alone is
checked here; that its models exist and lead back to no council twice is checked by the configuration. Does not know
how a council is run, nor whether its artefact fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ensemble_core.section import Section

ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
AnswerKind = Literal["choice", "number", "exact", "math"]

MOST_SAMPLES = 64  # of one model in a vote
MOST_MODELS = 16  # of a council


class CouncilLimits(Section):
    """What one request to a council may use. A request may lower them and never raise them."""

    max_calls: int = Field(16, ge=1, le=1024, description="Calls to models, those of councils within it included.")
    max_tokens: int = Field(8000, ge=1, description="Tokens that all calls may generate, together.")
    seconds: Positive = Field(60.0, description="From arrival to the last token.")
    min_answers: int = Field(1, ge=1, description="With fewer answers in a round, the request fails.")
    on_error: Literal["drop", "fail"] = Field(
        "drop", description="When a call fails. drop: the others go on without it. fail: the request fails."
    )


class _CouncilSection(Section):
    """What all kinds share."""

    limits: CouncilLimits = Field(default_factory=lambda: CouncilLimits())

    @property
    def called(self) -> tuple[str, ...]:
        """Every model that the council may call, each once."""
        raise NotImplementedError


def _distinct(models: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(models)) != len(models):
        raise ValueError(f"each model once, got {list(models)}")
    return models


class SelectConfig(Section):
    """How many of a router's models answer."""

    max: int = Field(1, ge=1, le=MOST_MODELS, description="Models at most. More than 1 need `into`.")
    threshold: Share = Field(0.0, description="Models with a smaller share of the gate are left out.")
    temperature: Positive = Field(
        0.1, description="The gate is the softmax of the scores over this; small: nearly all for the best."
    )


class CostConfig(Section):
    """Quality against price, as in AvengersPro: alpha x quality + (1 - alpha) x saving, both scaled to 0..1."""

    alpha: Share = Field(description="1: quality alone. 0: price alone.")
    prices: Mapping[ModelName, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] = Field(
        description="Model -> what an answer costs, in any unit. Every model needs one."
    )


class RouteConfig(_CouncilSection):
    """The model that is best for a question answers it."""

    kind: Literal["route"]
    models: tuple[ModelName, ...] = Field(min_length=1, max_length=MOST_MODELS, description="What may answer.")
    by: Literal["linear", "clusters", "perplexity", "fixed"] = Field(
        description="linear, clusters: as `unisono fit` has learnt. perplexity: who finds the prompt likeliest. "
        "fixed: the first model that works."
    )
    select: SelectConfig = Field(default_factory=lambda: SelectConfig())
    into: ModelName | None = Field(
        None,
        description="A token-level ensemble: its members and weights are what was selected, where that is several.",
    )
    cost: CostConfig | None = Field(None, description="None: prices do not count.")
    fallback: ModelName | None = Field(
        None, description="Who answers where the best leads by less than `margin`, or does not work."
    )
    margin: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = Field(
        0.0, description="Lead of the best score over the next; with a smaller one `fallback` answers."
    )
    tau: Positive = Field(0.25, description="For perplexity: nats per byte; scores are exp(-NLL / tau).")
    artefact: Path | None = Field(None, description="Folder that `unisono fit` wrote, relative to this file's.")

    _models = field_validator("models")(_distinct)

    @property
    def called(self) -> tuple[str, ...]:
        """Every model that the council may call, each once."""
        more = (name for name in (self.into, self.fallback) if name is not None)
        return tuple(dict.fromkeys((*self.models, *more)))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.select.max > 1) != (self.into is not None):
            raise ValueError("select.max over 1 and into go together: several models answer as that ensemble")
        if self.margin > 0 and self.fallback is None:
            raise ValueError("margin only acts with fallback; name a model or drop it")
        fitted = self.by in ("linear", "clusters")
        if fitted != (self.artefact is not None):
            raise ValueError(
                f"by: {self.by} needs an artefact; name its folder and run `unisono fit`"
                if fitted
                else f"artefact only acts with by: linear or clusters, not {self.by}"
            )
        if self.cost is not None and (missing := sorted(set(self.models) - set(self.cost.prices))):
            raise ValueError(f"cost.prices: {missing} have no price; give every model one")
        if self.cost is not None and (unknown := sorted(set(self.cost.prices) - set(self.models))):
            raise ValueError(f"cost.prices: {unknown} are not among models")
        return self


class VoteConfig(_CouncilSection):
    """Several answers, and the one that most agree on, or that a judge prefers."""

    kind: Literal["vote"]
    models: Mapping[ModelName, Annotated[int, Field(ge=1, le=MOST_SAMPLES)]] = Field(
        min_length=1, max_length=MOST_MODELS, description="Model -> samples; a list means one of each."
    )
    by: Literal["majority", "judge"] = "majority"
    judge: ModelName | None = Field(None, description="With by: judge. Compares two answers at a time.")
    answer: AnswerKind = Field("exact", description="What two answers agree in: docs/councils.md has the rules.")
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = Field(
        None, description="Of the samples; None: the request's."
    )
    tie: Literal["first", "likeliest"] = Field(
        "first", description="first: the answer that was given first. likeliest: by mean token log-probability."
    )
    stop_early: bool = Field(False, description="End the other samples once the majority cannot change.")

    @field_validator("models", mode="before")
    @classmethod
    def _one_each(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        return dict.fromkeys(_distinct(tuple(map(str, value))), 1)

    @property
    def called(self) -> tuple[str, ...]:
        """Every model that the council may call, each once."""
        return tuple(dict.fromkeys((*self.models, *((self.judge,) if self.judge else ()))))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.by == "judge") != (self.judge is not None):
            raise ValueError("by: judge and judge: MODEL go together; set both or neither")
        ignored = {"answer", "tie", "stop_early"} & self.model_fields_set
        if self.by == "judge" and ignored:
            raise ValueError(f"{sorted(ignored)} only act with by: majority; drop them")
        return self


class DiscussConfig(_CouncilSection):
    """Models answer, read each other's reasons, and answer again; a vote weighted by confidence decides."""

    kind: Literal["discuss"]
    models: tuple[ModelName, ...] = Field(min_length=2, max_length=MOST_MODELS, description="Who takes part.")
    rounds: int = Field(2, ge=1, le=8, description="Discussions after the first answers, at most.")
    answer: Literal["choice", "number", "exact"] = Field("exact", description="What an answer is.")
    examples: Path | None = Field(
        None,
        description="JSONL of question, answer and explanation: samples that convince, shown in discussions.",
    )

    _models = field_validator("models")(_distinct)

    @property
    def called(self) -> tuple[str, ...]:
        """Every model that the council may call, each once."""
        return self.models


class NodeConfig(Section):
    """A node of a graph: who speaks, and in which role. A bare name is short for `{model: NAME}`."""

    model: ModelName
    role: str = Field("", max_length=4000, description="Said to the model before everything else.")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return {"model": value} if isinstance(value, str) else value


class GraphConfig(_CouncilSection):
    """Answers flow along a graph; the node that nobody follows answers (Heterogeneous Swarms, Mixture-of-Agents)."""

    kind: Literal["graph"]
    nodes: Mapping[ModelName, NodeConfig] = Field(min_length=1, max_length=64, description="Node -> who speaks.")
    edges: tuple[tuple[ModelName, ModelName], ...] = Field((), description="Pairs: the second reads the first.")

    @property
    def called(self) -> tuple[str, ...]:
        """Every model that the council may call, each once."""
        return tuple(dict.fromkeys(node.model for node in self.nodes.values()))

    @property
    def reads(self) -> dict[str, tuple[str, ...]]:
        """Node -> the nodes whose answers it reads. All follow what they read, the end is last; of nodes that are
        free, the first named comes first.
        """
        read: dict[str, set[str]] = {name: set() for name in self.nodes}
        for source, target in self.edges:
            read[target].add(source)
        order: list[str] = []
        placed: set[str] = set()
        end = self.end
        while len(order) < len(read):
            ready = [name for name in read if name not in placed and read[name] <= placed]
            if not ready:
                left = [name for name in read if name not in placed]
                raise ValueError(f"edges: {left} wait for each other in a circle; take an edge out")
            order.append(next((name for name in ready if name != end), ready[0]))
            placed.add(order[-1])
        return {name: tuple(other for other in order if other in read[name]) for name in order}

    @property
    def order(self) -> tuple[str, ...]:
        """The nodes so that each follows all that it reads, the end last."""
        return tuple(self.reads)

    @property
    def end(self) -> str:
        """The node whose answer is sent."""
        sources = {a for a, _ in self.edges}
        (end,) = (name for name in self.nodes if name not in sources)
        return end

    def before(self, node: str) -> tuple[str, ...]:
        """The nodes whose answers a node reads, in their order."""
        return self.reads[node]

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if unknown := sorted({name for edge in self.edges for name in edge} - set(self.nodes)):
            raise ValueError(f"edges: {unknown} are not nodes; nodes are {list(self.nodes)}")
        if len(set(self.edges)) != len(self.edges):
            raise ValueError("edges: each edge once")
        sources = {a for a, _ in self.edges}
        ends = [name for name in self.nodes if name not in sources]
        if len(ends) > 1:
            raise ValueError(f"edges: the answer must come from one node, but nobody reads {ends}; add edges")
        if ends:
            _ = self.reads
        else:
            raise ValueError(f"edges: {list(self.nodes)} wait for each other in a circle; take an edge out")
        return self


CouncilConfig = Annotated[RouteConfig | VoteConfig | DiscussConfig | GraphConfig, Field(discriminator="kind")]
COUNCIL_KINDS = ("route", "vote", "discuss", "graph")


def circle_of(councils: Mapping[str, Any]) -> list[str] | None:
    """Councils that call each other in a circle, in the order of their calls; None if there are none."""
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done or name not in councils:
            return None
        for called in councils[name].called:
            if found := follow(called, [*path, name]):
                return found
        done.add(name)
        return None

    return next((found for name in councils if (found := follow(name, []))), None)
