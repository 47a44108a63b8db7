"""Dockerfile, compose, Kubernetes and Prometheus files: checked by their makers' tools and against each other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_runtime import FakeRuntime
from processes import tool

from ensemble_core.config_file import load_config
from ensemble_core.server_config import ServerConfig
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
BASE = DOCKER / "kubernetes" / "base"
UNPICKLES = r"^\s*(import|from) (pickle|marshal|shelve|joblib|dill)\b|torch\.load\(|allow_pickle"
MANIFESTS = ["data", "prepare", "deployment", "service"]


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def read(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


def container() -> dict[str, Any]:
    return dict(read(BASE / "deployment.yaml")["spec"]["template"]["spec"]["containers"][0])


def test_hadolint_finds_nothing() -> None:
    assert run(tool("hadolint"), ROOT / "Dockerfile") == ""


def test_compose_follows_its_schema() -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml")


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_takes_the_manifest(name: str) -> None:
    run(tool("kubernetes-validate"), "--strict", BASE / f"{name}.yaml")


def test_the_ray_cluster_follows_its_schema(tmp_path: Path) -> None:
    """Its own fields by a schema of ours, its pods by Kubernetes' own."""
    folder = DOCKER / "kubernetes" / "ray"
    run(tool("check-jsonschema"), "--schemafile", folder / "schema.json", folder / "raycluster.yaml")
    run(tool("kubernetes-validate"), "--strict", folder / "networkpolicy.yaml")
    spec = read(folder / "raycluster.yaml")["spec"]
    templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    for number, template in enumerate(templates):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {**template["metadata"], "name": f"pod-{number}"}
        path = tmp_path / f"pod-{number}.yaml"
        path.write_text(yaml.safe_dump(pod))
        run(tool("kubernetes-validate"), "--strict", path)
        assert pod["spec"]["securityContext"]["runAsUser"] == 10001
    locked = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert locked is not None
    assert spec["rayVersion"] == locked[1]


def test_prometheus_takes_its_files() -> None:
    run(tool("promtool"), "check", "config", DOCKER / "prometheus" / "prometheus.yml")


def test_every_alert_fires_and_is_silent() -> None:
    folder = DOCKER / "prometheus"
    run(tool("promtool"), "test", "rules", folder / "alerts_test.yml")
    alerts = {rule["alert"] for group in read(folder / "alerts.yml")["groups"] for rule in group["rules"]}
    cases = read(folder / "alerts_test.yml")["tests"]
    assert {each["alertname"] for each in cases[0]["alert_rule_test"]} == alerts
    fired = {re.findall(r'"(\w+)"', each["labels"])[0] for each in cases[-1]["promql_expr_test"][0]["exp_samples"]}
    assert fired == alerts


def test_every_alert_has_its_runbook() -> None:
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    for group in read(DOCKER / "prometheus" / "alerts.yml")["groups"]:
        for rule in group["rules"]:
            assert rule["alert"] in headings
            assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_the_dashboard_is_what_its_program_writes() -> None:
    sys.path.insert(0, str(DOCKER / "grafana"))
    try:
        import dashboard
    finally:
        sys.path.remove(str(DOCKER / "grafana"))
    assert json.loads(dashboard.TARGET.read_text()) == dashboard.dashboard()


def test_every_resource_is_there_and_none_is_forgotten() -> None:
    named = set(read(BASE / "kustomization.yaml")["resources"])
    files = {path.name for path in BASE.glob("*.yaml")} - {"kustomization.yaml", "config.yaml"}
    assert named == files
    assert {path.removesuffix(".yaml") for path in named} == {*MANIFESTS, "servicemonitor"}


def test_the_service_monitor_finds_the_service() -> None:
    """Its kind is the operator's, which no schema here knows."""
    monitor, service = read(BASE / "servicemonitor.yaml"), read(BASE / "service.yaml")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {each["port"] for each in monitor["spec"]["endpoints"]} <= {p["name"] for p in service["spec"]["ports"]}
    deployment = read(BASE / "deployment.yaml")["spec"]
    assert service["spec"]["selector"] == deployment["selector"]["matchLabels"]
    assert deployment["selector"]["matchLabels"].items() <= deployment["template"]["metadata"]["labels"].items()


def test_the_gpu_overlay_changes_the_server() -> None:
    patch = read(DOCKER / "kubernetes" / "gpu" / "gpu.yaml")
    assert patch["metadata"]["name"] == read(BASE / "deployment.yaml")["metadata"]["name"]
    (server,) = patch["spec"]["template"]["spec"]["containers"]
    assert server["name"] == container()["name"]
    assert server["resources"]["limits"] == {"nvidia.com/gpu": 1}


def test_the_configurations_load_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = load_config(ROOT / "configs" / "container.yaml"), load_config(BASE / "config.yaml")
    assert ours.model_dump() == theirs.model_dump()
    assert ours.server.host == "0.0.0.0"
    assert str(ours.matrices.folder).startswith("/data/")


def test_the_drain_ends_before_the_container_is_killed() -> None:
    """Drain, then 5 s to flush and 10 s for the step that runs."""
    needed = load_config(ROOT / "configs" / "container.yaml").server.drain_seconds + 15
    compose = read(DOCKER / "compose.yaml")["x-server"]["stop_grace_period"]
    assert needed < int(compose.removesuffix("s"))
    assert needed < read(BASE / "deployment.yaml")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


def test_ports_and_probes_are_the_servers() -> None:
    port = load_config(ROOT / "configs" / "container.yaml").server.port
    assert container()["ports"] == [{"name": "http", "containerPort": port}]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"EXPOSE {port}" in dockerfile
    (target,) = read(DOCKER / "prometheus" / "prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == f"unisono:{port}"
    app = create_app(FakeRuntime(), ServerConfig(), PrometheusMetrics())  # type: ignore[arg-type]
    routes = app.openapi()["paths"]
    probes = {container()[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    health = re.findall(rf"127\.0\.0\.1:{port}(/\w+)", dockerfile)
    assert {*probes, *health, "/metrics"} <= set(routes)
    assert container()["livenessProbe"]["httpGet"]["path"] == "/health"


def test_nothing_runs_as_root_or_as_latest() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    user = re.search(r"^USER (\d+)$", dockerfile, re.MULTILINE)
    assert user is not None
    for name in ("deployment", "prepare"):
        pod = read(BASE / f"{name}.yaml")["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsUser"] == int(user[1])
        assert pod["securityContext"]["runAsNonRoot"]
    services = read(DOCKER / "compose.yaml")["services"]
    assert all(":" in each["image"] and not each["image"].endswith(":latest") for each in services.values())
    assert "python:3.11-slim" in dockerfile


def test_the_image_gets_what_it_needs_and_no_more() -> None:
    sys.path.insert(0, str(DOCKER))
    try:
        import rehearse
    finally:
        sys.path.remove(str(DOCKER))
    copied = {
        name.split("/")[0]
        for word, rest in rehearse.instructions((ROOT / "Dockerfile").read_text())
        if word == "COPY" and not rest.startswith("--from")
        for name in rest.split()[:-1]
    }
    assert copied == rehearse.context()
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.slow
def test_the_dockerfiles_steps_run_in_a_clean_folder(tmp_path: Path) -> None:
    """No engine builds images here, so its steps are run as they stand."""
    run_long = [sys.executable, str(DOCKER / "rehearse.py"), str(tmp_path)]
    done = subprocess.run(run_long, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1].startswith("unisono ")


def test_messages_in_the_troubleshooting_table_exist() -> None:
    document = (ROOT / "docs" / "operations.md").read_text()
    rows = document.partition("## Troubleshooting")[2].splitlines()
    quoted = [
        words for row in rows if row.startswith("| `") for words in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    source = "".join(
        path.read_text() for name in ("server", "ensemble_core") for path in (ROOT / name).rglob("*.py")
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message over several lines
    assert len(quoted) > 10
    assert [words for words in quoted if words not in source] == []


def test_the_metrics_table_is_whole() -> None:
    document = (ROOT / "docs" / "operations.md").read_text()
    table = document.partition("## Metrics")[2].partition("## Alerts")[0]
    named = set(
        re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines() if row[:3] == "| `"))
    )
    declared = set(
        re.findall(
            r'_(?:counter|gauge|histogram|latency)\(\s*"(\w+)"', (ROOT / "server/edge/metrics.py").read_text()
        )
    )
    assert named == declared


def test_nothing_is_unpickled() -> None:
    """Weights and matrices are safetensors; `torch.load` and pickle run what a file says."""
    for name in ("server", "ensemble_core"):
        for path in (ROOT / name).rglob("*.py"):
            assert not re.search(UNPICKLES, path.read_text(), re.MULTILINE), path
