"""Writes dashboards/unisono.json: every panel in one line, so that the dashboard can be read and changed here.

`python docker/grafana/dashboard.py` after a change; a test compares the file. Variables: $instance, $model, $member.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "dashboards" / "unisono.json"
ON = 'instance=~"$instance"'
MODEL = f'{ON}, model=~"$model"'
MEMBER = f'{ON}, member=~"$member"'
WIDTH, HEIGHT = 8, 7  # three panels a row


def rate(metric: str, labels: str, by: str = "") -> str:
    """A counter's growth a second, summed."""
    return f"sum{f' by ({by})' if by else ''} (rate(unisono_{metric}{{{labels}}}[$__rate_interval]))"


def quantile(q: float, metric: str, labels: str, by: str) -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({q}, {rate(metric + '_bucket', labels, f'{by}, le')})"


def mean(metric: str, labels: str, by: str = "") -> str:
    """The mean of a histogram."""
    return f"{rate(metric + '_sum', labels, by)} / {rate(metric + '_count', labels, by)}"


def latency(metric: str) -> list[tuple[str, str]]:
    """Median and tail of each model."""
    return [(quantile(q, metric, MODEL, "model"), f"p{q * 100:g} {{{{model}}}}") for q in (0.5, 0.95, 0.99)]


HITS = rate("prefix_cache_hit_tokens_total", MEMBER, "member")
STEP_SHARE = f"/ scalar({rate('step_seconds_sum', ON)})"
PARTS = " + ".join(rate(f"{part}_seconds_sum", ON) for part in ("forwards", "fusion", "alignment", "sampling"))

# Row -> (title, what it says, unit, [(expression, legend)]).
Panel = tuple[str, str, str, list[tuple[str, str]]]
ROWS: dict[str, list[Panel]] = {
    "What clients see": [
        ("Time to first token", "From arrival to the first token, queue included.", "s",
         latency("time_to_first_token_seconds")),
        ("Inter-token latency", "Gap between two tokens of one choice.", "s", latency("inter_token_latency_seconds")),
        ("End-to-end latency", "From arrival to the last token.", "s", latency("e2e_request_latency_seconds")),
        ("Throughput", "Tokens of finished choices.", "short", [
            (rate("generation_tokens_total", MODEL, "model"), "written {{model}}"),
            (rate("prompt_tokens_total", MODEL, "model"), "read {{model}}"),
        ]),
        ("Finished choices", "By how they ended; abort: the client went away.", "reqps", [
            (rate("requests_total", MODEL, "finish_reason"), "{{finish_reason}}")]),
        ("Requests", "That models took; each may have several choices.", "reqps", [
            (rate("accepted_requests_total", MODEL, "model"), "{{model}}")]),
        ("Answers", "All HTTP requests, by status.", "reqps", [
            (rate("http_requests_total", ON, "status"), "{{status}}")]),
        ("Refused requests", "429 is queue_full; 503 is busy or not_ready.", "reqps", [
            (rate("requests_rejected_total", ON, "reason"), "{{reason}}")]),
    ],
    "Queue and cache": [
        ("Sequences", "A choice is one sequence.", "short", [
            (f"sum by (instance) (unisono_num_requests_running{{{ON}}})", "running {{instance}}"),
            (f"sum by (instance) (unisono_num_requests_waiting{{{ON}}})", "waiting {{instance}}"),
        ]),
        ("Time in the queue", "From arrival to admission.", "s", latency("request_queue_time_seconds")),
        ("Cache in use", "Used share of each member's pages.", "percentunit", [
            (f"max by (member) (unisono_member_kv_usage_ratio{{{MEMBER}}})", "{{member}}")]),
        ("Prefix hits", "Prompt tokens that a member had cached, as a share of all.", "percentunit", [
            (f"{HITS} / ({HITS} + on (member) {rate('member_tokens_total', MEMBER + ', phase=`prefill`', 'member')})",
             "{{member}}")]),
        ("Preemptions", "Sequences sent back to the queue.", "short", [
            (rate("preemptions_total", MODEL, "model"), "{{model}}")]),
        ("Memory", "Weights and cache.", "bytes", [
            (f"sum by (member, device) (unisono_member_memory_bytes{{{MEMBER}}})", "{{member}} on {{device}}")]),
    ],
    "The step": [
        ("Step time", "One step of all running sequences.", "s", [
            (quantile(q, "step_seconds", ON, "mode"), f"p{q * 100:g} {{{{mode}}}}") for q in (0.5, 0.99)]),
        ("Where a step's time goes", "Shares; over 1 in all where members overlap.", "percentunit", [
            (f"{rate('member_forward_seconds_sum', MEMBER, 'member')} {STEP_SHARE}", "{{member}}"),
            (f"{rate('fusion_seconds_sum', ON)} {STEP_SHARE}", "fusion"),
            (f"{rate('alignment_seconds_sum', ON)} {STEP_SHARE}", "alignment"),
            (f"{rate('sampling_seconds_sum', ON)} {STEP_SHARE}", "sampling"),
            (f"1 - ({PARTS}) {STEP_SHARE}", "rest"),
        ]),
        ("Who the others wait for", "Wait for the step's slowest member; the straggler itself waits 0.", "s", [
            (mean("member_wait_seconds", MEMBER, "member"), "{{member}}")]),
        ("Sequences a step", "That got a token.", "short", [(mean("step_batch_size", ON), "mean")]),
        ("Tokens fed", "To each member, by phase.", "short", [
            (rate("member_tokens_total", MEMBER, "member, phase"), "{{member}} {{phase}}")]),
        ("Rolled back", "Cached tokens that a new spelling of the text replaced.", "short", [
            (rate("member_rollback_tokens_total", MEMBER, "member"), "{{member}}")]),
    ],
    "The ensemble": [
        ("Agreement", "Steps in which a member's likeliest token is the one that was chosen.", "percentunit", [
            (f"{rate('agreement_total', f'{MODEL}, agrees=`true`', 'model, member')} / "
             f"{rate('agreement_total', MODEL, 'model, member')}", "{{member}} in {{model}}")]),
        ("Main overruled", "Steps in which the chosen token is not main's likeliest.", "percentunit", [
            (f"{rate('main_overruled_total', MODEL, 'model')} / on (model) max by (model) ("
             f"{rate('agreement_total', MODEL, 'model, member')})", "{{model}}")]),
        ("Drafts that stayed", "Mode verify: of the tokens that main drafted, and of the guesses that it was fed.",
         "percentunit", [
            (f"{rate('draft_accepted_total', MODEL, 'model')} / {rate('draft_tokens_total', MODEL, 'model')}",
             "drafts of {{model}}"),
            (f"{rate('guess_confirmed_total', MODEL, 'model')} / {rate('guess_tokens_total', MODEL, 'model')}",
             "guesses of {{model}}")]),
        ("What decides tokens", "A fusion, the assistants' consent, a certificate of the fusion, or main alone.",
         "short", [(rate("decided_tokens_total", MODEL, "model, by"), "{{by}} in {{model}}")]),
        ("Unmapped mass", "Of a member's distribution: what maps to no token of main.", "percentunit", [
            (mean("unmapped_mass", MODEL, "model, member"), "{{member}} in {{model}}")]),
    ],
    "Councils": [
        ("A council's answers", "From the first call to the last token.", "s", [
            (quantile(q, "council_seconds", ON, "model"), f"p{q * 100:g} {{{{model}}}}") for q in (0.5, 0.95)]),
        ("Calls of councils", "By the model that was called.", "reqps", [
            (rate("council_calls_total", ON, "model, called"), "{{called}} by {{model}}")]),
        ("Who answers for a council", "The model whose text was sent.", "reqps", [
            (rate("council_answers_total", ON, "model, served_by"), "{{served_by}} for {{model}}")]),
        ("Agreement of votes", "Share of the votes that the answer had.", "percentunit", [
            (mean("council_agreement_ratio", ON, "model"), "{{model}}")]),
        ("Rounds", "Of calls before an answer.", "short", [(mean("council_rounds", ON, "model"), "{{model}}")]),
    ],
    "Health": [
        ("Members up", "0: the member's last forward failed.", "short", [
            (f"min by (member) (unisono_member_up{{{MEMBER}}})", "{{member}}")]),
        ("Failures of members", "Steps in which a member failed, by cause.", "short", [
            (rate("member_failures_total", MEMBER, "member, cause"), "{{member}} {{cause}}")]),
        ("Process", "Its memory, and cores in use.", "short", [
            (f"process_resident_memory_bytes{{{ON}}} / 2 ^ 30", "GiB {{instance}}"),
            (f"rate(process_cpu_seconds_total{{{ON}}}[$__rate_interval])", "cores {{instance}}")]),
        ("Ready", "1 while requests are accepted.", "short", [(f"unisono_ready{{{ON}}}", "{{instance}}")]),
        ("Choices that went on without a member", "Only where on_member_failure is drop.", "short", [
            (rate("member_dropped_requests_total", MODEL, "model, member"), "{{member}} in {{model}}")]),
    ],
}  # fmt: skip


def variable(name: str, metric: str, label: str) -> dict[str, Any]:
    """A choice among the values of a label."""
    query = f"label_values({metric}, {label})"
    return {
        "name": name, "type": "query", "query": {"query": query, "refId": name}, "definition": query,
        "datasource": {"type": "prometheus", "uid": "${datasource}"}, "refresh": 2,
        "includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"},
    }  # fmt: skip


def panel(number: int, place: tuple[int, int], content: Panel) -> dict[str, Any]:
    """One time series. place: column and line of the grid."""
    title, description, unit, series = content
    return {
        "id": number, "type": "timeseries", "title": title, "description": description,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": place[0], "y": place[1], "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"showLegend": True, "displayMode": "list"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(65 + rank), "expr": expression, "legendFormat": legend}
            for rank, (expression, legend) in enumerate(series)
        ],
    }  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The whole dashboard, in Grafana's form."""
    panels: list[dict[str, Any]] = []
    line = 0
    for row, contents in ROWS.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": row, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": line, "w": 24, "h": 1}})  # fmt: skip
        line += 1
        for rank, content in enumerate(contents):
            place = (rank % 3 * WIDTH, line + rank // 3 * HEIGHT)
            panels.append(panel(len(panels) + 1, place, content))
        line += -(-len(contents) // 3) * HEIGHT
    return {
        "uid": "unisono", "title": "Unisono", "tags": ["unisono"], "schemaVersion": 41, "editable": True,
        "refresh": "10s", "time": {"from": "now-30m", "to": "now"}, "timezone": "browser",
        "templating": {"list": [
            {"name": "datasource", "type": "datasource", "query": "prometheus", "current": {}},
            variable("instance", "unisono_ready", "instance"),
            variable("model", "unisono_requests_total", "model"),
            variable("member", "unisono_member_up", "member"),
        ]},
        "panels": panels,
    }  # fmt: skip


if __name__ == "__main__":
    TARGET.write_text(json.dumps(dashboard(), indent=1) + "\n")
