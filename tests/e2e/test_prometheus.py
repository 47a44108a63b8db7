"""The real Prometheus scrapes the real server under load, and every panel of the dashboard has data."""

from __future__ import annotations

import concurrent.futures
import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from processes import free_port, tool

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "unisono.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {"$__rate_interval": "20s", "$instance": ".*", "$model": ".*", "$member": ".*"}
CONFIG = """
global: {{scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 1s}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: unisono
    static_configs: [{{targets: ["{target}"]}}]
"""


@pytest.fixture(scope="module")
def prometheus(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that scrapes the server."""
    program = tool("prometheus")
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    rules = ROOT / "docker" / "prometheus" / "alerts.yml"
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(rules=rules, target=urlsplit(server_url).netloc))
    options = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, *options, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
    base = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: httpx.get(f"{base}/-/ready").status_code == 200, (folder / "log").read_text)
        yield base
    finally:
        process.terminate()
        process.wait(timeout=20)


def wait_for(met: Any, told: Any = str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if met():
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    pytest.fail(f"not met within {seconds:g} s: {told()}")


def values(prometheus: str, expression: str, at: float | None = None) -> list[float]:
    """at: Unix time; None: now."""
    moment = {} if at is None else {"time": str(at)}
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression, **moment}).json()
    assert answer["status"] == "success", f"{expression}: {answer}"
    result = answer["data"]["result"]
    return [float(each["value"][1]) for each in result]


@pytest.fixture(scope="module")
def loaded(server_url: str, prometheus: str) -> str:
    """Prometheus after some seconds of load: every model, streams, shared prefixes, a refusal, a client that goes."""
    wait_for(lambda: values(prometheus, "unisono_ready") == [1.0])
    long = "The history of the lighthouse, told by its keeper, begins in a winter of storms. " * 4

    def ask(number: int) -> None:
        model = ("duet", "duet-smollm2", "duet-search", "gemma3", "smollm2")[number % 5]
        body = {"model": model, "prompt": long + str(number // 10), "max_tokens": 8, "stream": number % 2 == 0}
        httpx.post(f"{server_url}/v1/completions", json=body, timeout=60)

    def draft() -> None:
        """A text that repeats itself, so that guesses are fed, too."""
        body = {"model": "duet-verify", "prompt": "one two three, " * 6, "max_tokens": 40, "temperature": 0}
        httpx.post(f"{server_url}/v1/completions", json=body | {"ignore_eos": True}, timeout=60)

    def vote() -> None:
        body = {"model": "poll", "prompt": "6 + 7 =", "max_tokens": 6}
        httpx.post(f"{server_url}/v1/completions", json=body, timeout=60)

    def go_away() -> None:
        body = {"model": "duet", "prompt": "Once", "max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{server_url}/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        work = [pool.submit(ask, number) for number in range(20)]
        work += [pool.submit(go_away), pool.submit(draft), pool.submit(vote)]
        httpx.post(f"{server_url}/v1/completions", json={"model": "nobody", "prompt": "x"})
        for each in work:
            each.result()
    time.sleep(1.5)  # two more scrapes
    return prometheus


@pytest.fixture(scope="module")
def end_of_load(loaded: str) -> float:
    """When the load had just ended: rates look back from there, however long the tests take."""
    return time.time()


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_has_data(loaded: str, end_of_load: float, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        expression = target["expr"]
        for name, value in VARIABLES.items():
            expression = expression.replace(name, value)
        assert "$" not in expression
        found = values(loaded, expression, end_of_load)
        assert found, expression
        assert any(math.isfinite(value) for value in found), f"{expression}: {found}"


def test_shares_are_shares(loaded: str) -> None:
    """Of all counts since the start: rate() guesses at both ends of its window, for each series on its own."""
    for panel in PANELS:
        for target in panel["targets"] if panel["fieldConfig"]["defaults"]["unit"] == "percentunit" else ():
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            expression, num_rates = re.subn(r"rate\((\w+\{[^}]*\})\[20s\]\)", r"(\1)", expression)
            assert num_rates == expression.count("_total{") + expression.count("_sum{") + expression.count(
                "_count{"
            )
            known = [value for value in values(loaded, expression) if math.isfinite(value)]
            assert all(-0.01 <= value <= 1.01 for value in known), f"{expression}: {known}"


def test_no_alert_is_raised_on_a_server_that_works(loaded: str) -> None:
    rules = httpx.get(f"{loaded}/api/v1/rules").json()["data"]["groups"]
    assert sum(len(group["rules"]) for group in rules) == 8
    assert all(rule["health"] == "ok" for group in rules for rule in group["rules"])
    alerts = httpx.get(f"{loaded}/api/v1/alerts").json()["data"]["alerts"]  # pending ones too
    names = {alert["labels"]["alertname"] for alert in alerts}
    assert names <= {"UnisonoSlowFirstToken", "UnisonoSlowTokens"}, "only the machine may be slow"
