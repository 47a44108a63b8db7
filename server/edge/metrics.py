"""The engine's statistics as Prometheus metrics. The only file that knows Prometheus.

Invariants: every metric here is updated somewhere. Each instance has its own registry, so two apps in one process
do not mix. Durations are in seconds, sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, assert_never, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    gc_collector,
    generate_latest,
    platform_collector,
    process_collector,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from ensemble_core.decoding.requests import FinishReason
from ensemble_core.stats import (
    MIXED,
    CacheStats,
    Cause,
    CouncilStats,
    DraftStats,
    DrawStats,
    DropStats,
    FusionStats,
    HealthStats,
    MemberStats,
    PreemptionStats,
    PrefixStats,
    QueueStats,
    Reason,
    RequestStats,
    Stats,
    StepStats,
    TokenStats,
)
from server.edge import buckets
from server.edge.reasons import REASONS

if TYPE_CHECKING:
    from ensemble_core.runtime import ModelInfo


class PrometheusMetrics:
    """Collects the engine's records. Safe to call from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        process_collector.ProcessCollector(registry=self._registry)
        platform_collector.PlatformCollector(registry=self._registry)
        gc_collector.GCCollector(registry=self._registry)
        self._requests = _RequestMetrics(self._registry)
        self._engine = _EngineMetrics(self._registry)
        self._members = _MemberMetrics(self._registry)
        self._ensembles = _EnsembleMetrics(self._registry)
        self._councils = _CouncilMetrics(self._registry)
        self._down: frozenset[str] = frozenset()  # members whose last forward failed

    def record(self, stats: Stats) -> None:
        """Add one record of the engine; see `ensemble_core.stats.Record`."""
        match stats:
            case StepStats():
                self._step(stats)
            case TokenStats():
                self._requests.gap.labels(stats.model).observe(stats.inter_token_seconds)
            case RequestStats():
                self._requests.finished(stats)
            case QueueStats():
                self._requests.queues(stats)
            case CacheStats():
                self._members.cache(stats)
            case PrefixStats():
                self._members.prefix_hits.labels(stats.member).inc(stats.num_tokens)
            case HealthStats():
                self._health(stats)
            case DropStats():
                self._ensembles.drops.labels(stats.model, stats.member, stats.reason).inc()
            case PreemptionStats():
                self._engine.preemptions.labels(stats.model).inc()
            case DraftStats():
                self._ensembles.draft(stats)
            case DrawStats():
                self._ensembles.draws(stats)
            case CouncilStats():
                self._councils.answered(stats)
            case _:
                assert_never(stats)

    def _step(self, stats: StepStats) -> None:
        self._engine.step(stats)
        for member in stats.members:
            self._members.step(member)
        for fusion in stats.fusions:
            self._engine.fusion_seconds.labels(fusion.fusion).observe(fusion.seconds)
            self._ensembles.fused(fusion)

    def _health(self, stats: HealthStats) -> None:
        if stats.failure is None:
            self._down -= {stats.member}
        else:
            self._down |= {stats.member}
            self._members.failures.labels(stats.member, stats.failure).inc()

    def rejected(self, reason: str) -> None:
        """Count one HTTP request that was refused."""
        self._requests.rejected.labels(reason).inc()

    def answered(self, route: str | None, status: int | None, model: str | None = None) -> None:
        """Count one HTTP request that is over. status None: the client left. model: that took it, if one did."""
        self._requests.answers.labels(route or "none", status or "none").inc()
        if model is not None:
            self._requests.accepted.labels(model).inc()

    def state(self, models: Iterable[ModelInfo], up: bool, ready: bool) -> None:
        """Set what a scrape asks for: readiness, and whether members are up. Counters of known labels begin at 0.

        A member whose last forward failed stays down.
        """
        self._engine.ready.set(ready)
        self._engine.step_seconds.labels(MIXED)
        for model in models:
            self._requests.accepted.labels(model.name)
            if model.kind == "council":  # its calls count as requests to the models that it calls
                self._councils.begin(model.name)
                continue
            self._requests.begin(model.name)
            self._engine.preemptions.labels(model.name)
            if model.kind == "member":
                self._members.up.labels(model.name).set(up and model.name not in self._down and not model.lacks)
                self._members.begin(model.name)
            if model.recipe is not None:
                self._engine.step_seconds.labels(model.recipe["mode"])
                self._ensembles.begin(model.name, set(model.recipe["members"]) - {model.recipe["main"]})

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics and their content type: OpenMetrics if the Accept header asks for it, else Prometheus' text."""
        shown = _WithoutCreated(self._registry)
        if "application/openmetrics-text" in accept:
            text: bytes = openmetrics.generate_latest(shown)  # type: ignore[no-untyped-call]
            return text, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(shown), CONTENT_TYPE_PLAIN_0_0_4


class _WithoutCreated(Collector):
    """Leaves out the `_created` series that the client adds to every counter and histogram."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [each for each in metric.samples if not each.name.endswith("_created")]
            yield metric


class _Family:
    """Creates metrics in one registry, under one prefix."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"unisono_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"unisono_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"unisono_{name}", text, labels, buckets=buckets, registry=self._registry)


class _RequestMetrics(_Family):
    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.requests = self._counter("requests_total", "Finished choices.", "model", "finish_reason")
        self.accepted = self._counter(
            "accepted_requests_total", "HTTP requests that a model took, whatever the number of choices.", "model"
        )
        self.answers = self._counter("http_requests_total", "HTTP requests.", "route", "status")
        self.rejected = self._counter("requests_rejected_total", "Refused HTTP requests.", "reason")
        self.running = self._gauge("num_requests_running", "Sequences that are running.")
        self.waiting = self._gauge("num_requests_waiting", "Sequences in the queue.")
        self.prompt = self._counter("prompt_tokens_total", "Prompt tokens of finished choices.", "model")
        self.generated = self._counter("generation_tokens_total", "Tokens of finished choices.", "model")
        self.gap = self._histogram(
            "inter_token_latency_seconds", "Time between consecutive tokens of a choice.", buckets.STEP, "model"
        )
        self.ttft = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", buckets.FIRST, "model"
        )
        self.e2e = self._latency("e2e_request_latency_seconds", "From arrival to the last token.")
        self.queued = self._latency("request_queue_time_seconds", "From arrival to admission.")
        for reason in REASONS:
            self.rejected.labels(reason)

    def begin(self, model: str) -> None:
        for reason in get_args(FinishReason):
            self.requests.labels(model, reason)
        for counter in (self.prompt, self.generated):
            counter.labels(model)

    def _latency(self, name: str, text: str) -> Histogram:
        return self._histogram(name, text, buckets.REQUEST, "model")

    def queues(self, stats: QueueStats) -> None:
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting)

    def finished(self, stats: RequestStats) -> None:
        self.requests.labels(stats.model, stats.finish_reason).inc()
        self.prompt.labels(stats.model).inc(stats.prompt_tokens)
        self.generated.labels(stats.model).inc(stats.generation_tokens)
        self.e2e.labels(stats.model).observe(stats.e2e_seconds)
        self.queued.labels(stats.model).observe(stats.queue_seconds)
        if stats.ttft_seconds is not None:
            self.ttft.labels(stats.model).observe(stats.ttft_seconds)


class _EngineMetrics(_Family):
    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.step_seconds = self._histogram("step_seconds", "One step of the engine.", buckets.STEP, "mode")
        self.forwards_seconds = self._histogram(
            "forwards_seconds", "From the start of a step's first forward to the end of its last.", buckets.STEP
        )
        self.fusion_seconds = self._histogram("fusion_seconds", "One fused group of rows.", buckets.PART, "fusion")
        self.alignment_seconds = self._histogram("alignment_seconds", "Retokenisation in one step.", buckets.PART)
        self.sampling_seconds = self._histogram("sampling_seconds", "Sampling in one step.", buckets.PART)
        self.batch = self._histogram("step_batch_size", "Sequences that got a token.", buckets.BATCH)
        self.ready = self._gauge("ready", "1 while requests are accepted: loaded, not draining, not dead.")
        self.preemptions = self._counter(
            "preemptions_total",
            "Sequences sent back to the queue for a full cache, or for another's first place.",
            "model",
        )

    def step(self, stats: StepStats) -> None:
        self.step_seconds.labels(stats.mode).observe(stats.seconds)
        self.forwards_seconds.observe(stats.forwards_seconds)
        self.alignment_seconds.observe(stats.alignment_seconds)
        self.sampling_seconds.observe(stats.sampling_seconds)
        self.batch.observe(stats.batch_size)


class _MemberMetrics(_Family):
    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.forward = self._histogram(
            "member_forward_seconds", "One forward of a member.", buckets.STEP, "member", "phase"
        )
        self.wait = self._histogram(
            "member_wait_seconds", "Wait for the step's slowest member.", buckets.PART, "member"
        )
        self.tokens = self._counter("member_tokens_total", "Tokens fed to a member.", "member", "phase")
        self.rollback = self._counter(
            "member_rollback_tokens_total", "Cached tokens that retokenisation rolled back.", "member"
        )
        self.prefix_hits = self._counter(
            "prefix_cache_hit_tokens_total", "Prompt tokens that a member had cached already.", "member"
        )
        self.kv_usage = self._gauge("member_kv_usage_ratio", "Used share of the cache's pages.", "member")
        self.memory = self._gauge("member_memory_bytes", "Weights and cache.", "member", "device")
        self.up = self._gauge(
            "member_up", "1 if it can serve, 0 while it is not loaded or after a failed forward.", "member"
        )
        self.failures = self._counter(
            "member_failures_total", "Steps in which a member failed, in all rows or in some.", "member", "cause"
        )

    def begin(self, member: str) -> None:
        self.prefix_hits.labels(member)
        for cause in get_args(Cause):
            self.failures.labels(member, cause)

    def step(self, stats: MemberStats) -> None:
        self.forward.labels(stats.member, stats.phase).observe(stats.forward_seconds)
        self.wait.labels(stats.member).observe(stats.wait_seconds)
        self.tokens.labels(stats.member, "prefill").inc(stats.prefill_tokens)
        self.tokens.labels(stats.member, "decode").inc(stats.decode_tokens)
        self.rollback.labels(stats.member).inc(stats.rollback_tokens)

    def cache(self, stats: CacheStats) -> None:
        self.kv_usage.labels(stats.member).set(stats.used_pages / max(stats.num_pages, 1))
        for device, num_bytes in stats.memory_bytes.items():
            self.memory.labels(stats.member, device).set(num_bytes)


class _CouncilMetrics(_Family):
    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.calls = self._counter("council_calls_total", "Calls that a council made.", "model", "called")
        self.answers = self._counter(
            "council_answers_total", "Answers of a council by the model that wrote them.", "model", "served_by"
        )
        self.agreement = self._histogram(
            "council_agreement_ratio", "Share of the votes that the answer had.", buckets.SHARE, "model"
        )
        self.rounds = self._histogram("council_rounds", "Rounds before an answer.", buckets.ROUND, "model")
        self.seconds = self._histogram(
            "council_seconds", "From a council's first call to its last token.", buckets.REQUEST, "model"
        )

    def begin(self, model: str) -> None:
        for histogram in (self.agreement, self.rounds, self.seconds):
            histogram.labels(model)

    def answered(self, stats: CouncilStats) -> None:
        self.answers.labels(stats.model, stats.served_by).inc()
        self.rounds.labels(stats.model).observe(stats.rounds)
        self.seconds.labels(stats.model).observe(stats.seconds)
        if stats.agreement is not None:
            self.agreement.labels(stats.model).observe(stats.agreement)
        for called in stats.calls:
            self.calls.labels(stats.model, called).inc()


class _EnsembleMetrics(_Family):
    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.agreement = self._counter(
            "agreement_total", "Steps by whether a member's likeliest token is the chosen one.",
            "model", "member", "agrees",
        )  # fmt: skip
        self.overruled = self._counter("main_overruled_total", "Steps whose token was not main's first.", "model")
        self.unmapped = self._histogram(
            "unmapped_mass", "Mass that maps to no token of main's vocabulary.", buckets.MASS, "model", "member"
        )
        self.drafted = self._counter(
            "draft_tokens_total", "Tokens that were decided after main drafted them.", "model"
        )
        self.accepted = self._counter("draft_accepted_total", "Drafted tokens that stayed.", "model")
        self.guessed = self._counter("guess_tokens_total", "Guesses that main was fed behind its draft.", "model")
        self.confirmed = self._counter("guess_confirmed_total", "Guesses that main chose itself.", "model")
        self.consulted = self._counter(
            "consulted_steps_total", "Final tokens by whether a fusion decided them.", "model", "consulted"
        )
        self.decided = self._counter(
            "decided_tokens_total",
            "Final tokens by what decided them: fusion, the assistants' consent, a certificate, or main alone.",
            "model",
            "by",
        )
        self.drawn = self._counter(
            "draws_total", "Final tokens by the member from whose distribution they were drawn.", "model", "member"
        )
        self.drops = self._counter(
            "member_dropped_requests_total", "Choices that went on without a member.", "model", "member", "reason"
        )

    def begin(self, model: str, assistants: Iterable[str]) -> None:
        for counter in (self.overruled, self.drafted, self.accepted, self.guessed, self.confirmed):
            counter.labels(model)
        for consulted in ("true", "false"):
            self.consulted.labels(model, consulted)
        for way in ("fusion", "consent", "certificate", "main"):
            self.decided.labels(model, way)
        for member in assistants:
            for agrees in ("true", "false"):
                self.agreement.labels(model, member, agrees)
            for reason in get_args(Reason):
                self.drops.labels(model, member, reason)

    def draft(self, stats: DraftStats) -> None:
        self.drafted.labels(stats.model).inc(stats.drafted)
        self.accepted.labels(stats.model).inc(stats.accepted)
        self.guessed.labels(stats.model).inc(stats.guessed)
        self.confirmed.labels(stats.model).inc(stats.confirmed)
        self.consulted.labels(stats.model, "true").inc(stats.consulted)
        self.consulted.labels(stats.model, "false").inc(stats.alone + stats.agreed + stats.certified)
        self.decided.labels(stats.model, "fusion").inc(stats.consulted)
        self.decided.labels(stats.model, "consent").inc(stats.agreed)
        self.decided.labels(stats.model, "certificate").inc(stats.certified)
        self.decided.labels(stats.model, "main").inc(stats.alone)

    def draws(self, stats: DrawStats) -> None:
        for member, count in stats.drawn.items():
            self.drawn.labels(stats.model, member).inc(count)

    def fused(self, stats: FusionStats) -> None:
        self.overruled.labels(stats.model).inc(stats.overruled)
        for member, (agreeing, others) in stats.agreed.items():
            self.agreement.labels(stats.model, member, "true").inc(agreeing)
            self.agreement.labels(stats.model, member, "false").inc(others)
        for member, masses in stats.unmapped.items():
            histogram = self.unmapped.labels(stats.model, member)
            for mass in masses:
                histogram.observe(mass)
