from __future__ import annotations

import itertools
import subprocess
import threading

import pytest
from fake_runtime import MODELS
from fakes import FakeMember, ensemble, fake_engine, sequence
from processes import tool
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.stats import (
    CacheStats,
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
    Record,
    RequestStats,
    StepStats,
    TokenStats,
)
from server.edge import buckets
from server.edge.metrics import PrometheusMetrics


def fed() -> PrometheusMetrics:
    metrics = PrometheusMetrics()
    member = MemberStats("a", "prefill", 0.02, 0.001, 7, 2, 3)
    fusion = FusionStats("duo", "relative", 0.0002, {"b": [0.1, 0.3]}, {"a": (1, 1), "b": (2, 0)}, 1)
    metrics.record(StepStats("lockstep", 2, 0.03, 0.0001, 0.0003, [member], [fusion]))
    metrics.record(TokenStats("duo", 0.03))
    metrics.record(RequestStats("duo", "stop", 5, 9, 0.1, 0.2, 0.5))
    metrics.record(RequestStats("duo", "abort", 5, 0, 0.1, None, 0.5))
    metrics.record(QueueStats(2, 1))
    metrics.record(PrefixStats("a", 40))
    metrics.record(CacheStats("a", 3, 4, {"cpu": 1000}))
    metrics.record(HealthStats("c", "timeout"))
    metrics.record(DropStats("duo", "c", "timeout"))
    metrics.record(PreemptionStats("duo"))
    metrics.record(
        DraftStats(
            "duo", drafted=7, accepted=5, guessed=4, confirmed=3, consulted=6, agreed=3, certified=1, alone=2
        )
    )
    metrics.record(DrawStats("duo", {"a": 3, "b": 2}))
    metrics.record(CouncilStats("poll", "a", 2, 0.75, 1.5, ("a", "a", "b")))
    metrics.rejected("queue_full")
    metrics.answered("/v1/completions", 200, "duo")
    metrics.answered(None, None)
    metrics.state(MODELS, True, True)
    return metrics


def samples(metrics: PrometheusMetrics) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of label names ...) -> value."""
    return {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(metrics.render()[0].decode())
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (("requests_total", "stop", "duo"), 1),
        (("requests_total", "abort", "duo"), 1),
        (("requests_rejected_total", "queue_full"), 1),
        (("accepted_requests_total", "duo"), 1),
        (("accepted_requests_total", "a"), 0),
        (("http_requests_total", "/v1/completions", "200"), 1),
        (("http_requests_total", "none", "none"), 1),
        (("num_requests_running",), 2),
        (("num_requests_waiting",), 1),
        (("prompt_tokens_total", "duo"), 10),
        (("generation_tokens_total", "duo"), 9),
        (("time_to_first_token_seconds_count", "duo"), 1),
        (("time_to_first_token_seconds_sum", "duo"), 0.2),
        (("inter_token_latency_seconds_sum", "duo"), 0.03),
        (("e2e_request_latency_seconds_sum", "duo"), 1.0),
        (("request_queue_time_seconds_count", "duo"), 2),
        (("decided_tokens_total", "fusion", "duo"), 6),
        (("decided_tokens_total", "consent", "duo"), 3),
        (("decided_tokens_total", "certificate", "duo"), 1),
        (("decided_tokens_total", "main", "duo"), 2),
        (("step_seconds_sum", "lockstep"), 0.03),
        (("forwards_seconds_sum",), 0.021),
        (("fusion_seconds_sum", "relative"), 0.0002),
        (("alignment_seconds_sum",), 0.0001),
        (("sampling_seconds_sum",), 0.0003),
        (("step_batch_size_sum",), 2),
        (("member_forward_seconds_sum", "a", "prefill"), 0.02),
        (("member_wait_seconds_sum", "a"), 0.001),
        (("member_tokens_total", "a", "prefill"), 7),
        (("member_tokens_total", "a", "decode"), 2),
        (("member_rollback_tokens_total", "a"), 3),
        (("prefix_cache_hit_tokens_total", "a"), 40),
        (("member_kv_usage_ratio", "a"), 0.75),
        (("member_memory_bytes", "cpu", "a"), 1000),
        (("member_up", "b"), 1),
        (("member_failures_total", "timeout", "c"), 1),
        (("member_failures_total", "exception", "a"), 0),
        (("member_dropped_requests_total", "c", "duo", "timeout"), 1),
        (("preemptions_total", "duo"), 1),
        (("agreement_total", "true", "b", "duo"), 2),
        (("agreement_total", "false", "a", "duo"), 1),
        (("main_overruled_total", "duo"), 1),
        (("draft_tokens_total", "duo"), 7),
        (("draft_accepted_total", "duo"), 5),
        (("guess_tokens_total", "duo"), 4),
        (("guess_confirmed_total", "duo"), 3),
        (("draws_total", "b", "duo"), 2),
        (("consulted_steps_total", "true", "duo"), 6),
        (("consulted_steps_total", "false", "duo"), 6),
        (("unmapped_mass_count", "b", "duo"), 2),
        (("unmapped_mass_sum", "b", "duo"), 0.4),
        (("council_calls_total", "a", "poll"), 2),
        (("council_answers_total", "poll", "a"), 1),
        (("council_agreement_ratio_sum", "poll"), 0.75),
        (("council_rounds_sum", "poll"), 2),
        (("council_seconds_sum", "poll"), 1.5),
    ],
)
def test_every_number_comes_out_under_its_name(key: tuple[str, ...], value: float) -> None:
    assert samples(fed())[f"unisono_{key[0]}", *key[1:]] == pytest.approx(value)


def test_every_registered_metric_is_fed() -> None:
    families = list(text_string_to_metric_families(fed().render()[0].decode()))
    own = [family for family in families if family.name.startswith("unisono_")]
    assert [family.name for family in own if not any(s.value for s in family.samples)] == []
    others = {family.name for family in families} - {family.name for family in own}
    assert all(name.startswith(("process_", "python_")) for name in others)
    assert {"process_resident_memory_bytes", "process_cpu_seconds", "process_open_fds", "python_info"} <= others


@pytest.mark.parametrize(
    ("name", "first"), [("fusion", "0.0001"), ("alignment", "0.0001"), ("sampling", "0.0001"), ("step", "0.001")]
)
def test_buckets_start_where_the_contract_says(name: str, first: str) -> None:
    edges = [key for key in samples(fed()) if key[0] == f"unisono_{name}_seconds_bucket"]
    assert first in edges[0]


@pytest.mark.parametrize("name", ["step_seconds", "inter_token_latency_seconds", "time_to_first_token_seconds"])
@pytest.mark.parametrize(("first", "last", "widest"), [(0.02, 0.06, 0.01), (0.001, 0.01, 0.002)])
def test_buckets_are_fine_where_medians_lie(name: str, first: float, last: float, widest: float) -> None:
    edges = sorted({float(key[1]) for key in samples(fed()) if key[0] == f"unisono_{name}_bucket"})
    inside = [edge for edge in edges if first <= edge <= last]
    assert (inside[0], inside[-1]) == (first, last)
    assert all(high - low <= widest + 1e-9 for low, high in itertools.pairwise(inside))


@pytest.mark.parametrize("edges", [buckets.STEP, buckets.FIRST, buckets.REQUEST, buckets.PART])
def test_edges_that_were_there_stay(edges: tuple[float, ...]) -> None:
    assert list(edges) == sorted(set(edges))
    assert set(edges) >= {0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0}


def test_openmetrics_says_the_same() -> None:
    text, content_type = fed().render("application/openmetrics-text;version=1.0.0;q=0.6,text/plain;q=0.3")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith(b"# EOF\n")
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in openmetrics_families(text.decode())
        for sample in family.samples
    }
    plain = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(fed().render("text/plain, */*;q=0.1")[0].decode())
        for sample in family.samples
        if sample.name.startswith("unisono_")
    }
    assert plain.items() <= found.items()


def test_a_member_is_down_while_it_fails() -> None:
    metrics = PrometheusMetrics()

    def up() -> tuple[float, float]:
        metrics.state(MODELS, True, True)
        found = samples(metrics)
        return found["unisono_member_up", "a"], found["unisono_member_up", "b"]

    assert up() == (1, 1)
    for _ in range(2):
        metrics.record(HealthStats("a", "exception"))
    assert up() == (0, 1)
    metrics.record(HealthStats("a", None))
    assert up() == (1, 1)
    assert samples(metrics)["unisono_member_failures_total", "exception", "a"] == 2
    metrics.state(MODELS, False, False)
    assert samples(metrics)["unisono_member_up", "a"] == 0


def test_metricss_do_not_mix() -> None:
    fed()
    assert ("unisono_requests_total", "stop", "duo") not in samples(PrometheusMetrics())


def test_metrics_take_in_every_record() -> None:
    record: Record = PrometheusMetrics().record
    record(QueueStats(0, 0))


def test_promtool_accepts_the_output() -> None:
    done = subprocess.run([tool("promtool"), "check", "metrics"], input=fed().render()[0], capture_output=True)
    assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()
    assert done.stderr == b""


def test_forwards_that_overlap_are_not_counted_twice() -> None:
    slow, fast = MemberStats("a", "decode", 0.03, 0.0, 0, 1, 0), MemberStats("b", "decode", 0.02, 0.01, 0, 1, 0)
    assert StepStats("lockstep", 1, 0.05, 0.0, 0.0, [slow, fast], []).forwards_seconds == 0.03


def test_a_request_whose_first_step_hangs_counts_as_waiting() -> None:
    """So the alert for a stalled engine looks at both gauges, and does without the counter of steps."""
    metrics, member = PrometheusMetrics(), FakeMember("a")
    engine = fake_engine([member], metrics.record)
    member.gate.clear()
    engine.add([sequence(1, "abc", [member], ensemble([member]), SamplingParams(max_tokens=1))])
    step = threading.Thread(target=engine.step)
    step.start()
    try:
        found = samples(metrics)
        assert found["unisono_num_requests_running",] + found["unisono_num_requests_waiting",] == 1
        assert not any(name.startswith("unisono_step_seconds") for name, *_ in found)
    finally:
        member.gate.set()
        step.join()
