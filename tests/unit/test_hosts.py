"""The `host` of a member: what is accepted, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemble_core.config import FAR_TIMEOUT, Config
from ensemble_core.config_file import load_config
from ensemble_core.errors import ConfigError


def load(folder: Path, far: dict[str, Any], **more: Any) -> Config:
    path = folder / "config.yaml"
    members = {"near": {"model": "org/a"}, "far": {"model": "org/b", **far}, **more.pop("members", {})}
    path.write_text(yaml.safe_dump({"members": members, **more}))
    return load_config(path)


def test_the_forms(tmp_path: Path) -> None:
    ray = load(
        tmp_path,
        {"host": {"ray": {"num_gpus": 2, "resources": {"node_b": 1}, "group": "g", "strategy": "SPREAD"}}},
    )
    assert ray.members["far"].host is not None
    assert ray.members["far"].host.ray is not None
    assert ray.members["far"].host.ray.address == "auto"
    assert load(tmp_path, {"host": {"process": {}}}).members["far"].host is not None
    served = load(
        tmp_path, {"host": {"server": {"kind": "vllm", "url": "https://n3:8000/v", "ca_file": "ca.pem"}}}
    )
    assert served.members["far"].host is not None
    assert served.members["far"].host.server is not None
    assert served.members["far"].host.server.ca_file == tmp_path / "ca.pem"


def test_members_elsewhere_have_a_time_out(tmp_path: Path) -> None:
    far = {"host": {"process": {}}}
    assert load(tmp_path, {}).member_timeout is None
    assert load(tmp_path, far).member_timeout == FAR_TIMEOUT
    assert load(tmp_path, far, scheduler={"member_timeout": 2.5}).member_timeout == 2.5


SERVER = {"kind": "vllm", "url": "http://n3:8000"}


@pytest.mark.parametrize(
    ("far", "says"),
    [
        ({"host": {}}, "exactly one of ray, process and server is needed, found none"),
        ({"host": {"process": {}, "ray": {}}}, "found ray, process"),
        (
            {"host": {"server": SERVER | {"kind": "ollama"}}},
            "ollama cannot be a member: its log-probabilities come as",
        ),
        ({"host": {"server": SERVER | {"kind": "openai"}}}, "openai cannot be a member: it tells at most 20"),
        ({"host": {"server": SERVER | {"kind": "other"}}}, "members.far.host.server.kind"),
        ({"host": {"server": SERVER | {"url": "n3:8000"}}}, "members.far.host.server.url"),
        ({"host": {"server": SERVER | {"timeout": 0}}}, "members.far.host.server.timeout"),
        ({"host": {"server": SERVER}, "dtype": "float32", "kv_memory": "2GiB"}, "dtype, kv_memory only act where"),
        ({"host": {"ray": {"strategy": "SPREAD"}}}, "strategy only acts with `group`"),
        ({"host": {"ray": {"num_gpus": -1}}}, "members.far.host.ray.num_gpus"),
        ({"host": {"process": {"num_threads": 0}}}, "members.far.host.process.num_threads"),
    ],
)
def test_what_is_refused(tmp_path: Path, far: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, far)
    assert says in str(caught.value)


def test_one_cluster_a_process(tmp_path: Path) -> None:
    other = {"other": {"model": "org/c", "host": {"ray": {"address": "n1:6379"}}}}
    with pytest.raises(ConfigError, match="one process can join one Ray cluster"):
        load(tmp_path, {"host": {"ray": {}}}, members=other)


def test_one_strategy_a_group(tmp_path: Path) -> None:
    other = {"other": {"model": "org/c", "host": {"ray": {"group": "g", "strategy": "SPREAD"}}}}
    with pytest.raises(ConfigError, match="strategy differs within the groups"):
        load(tmp_path, {"host": {"ray": {"group": "g"}}}, members=other)


def test_no_promise_for_other_servers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="deterministic: no promise can be made"):
        load(tmp_path, {"host": {"server": SERVER}}, deterministic=True)
