"""The YAML configuration: every file in configs/ loads; a wrong one gets a message with the field's path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

from ensemble_core import factory  # noqa: F401  (registers the fusions that configs/ name)
from ensemble_core.config import DEFAULT_TAU, Config, EnsembleConfig
from ensemble_core.config_file import load_config
from ensemble_core.errors import ConfigError
from ensemble_core.fusion.base import FUSIONS
from ensemble_core.limits import LimitsConfig, OverridesConfig
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.loading.demo_models import demo_model
from ensemble_core.section import parse_size
from ensemble_core.server_config import ServerConfig

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))

SMALL: dict[str, Any] = {
    "members": {"a": {"model": "demo:gemma-3-270m"}, "b": {"model": "org/b"}},
    "ensembles": {"ab": {"members": {"a": 3, "b": 1}, "main": "b"}},
}


def changed(path: str, value: object) -> dict[str, Any]:
    """SMALL with one field set; `path` is dotted."""
    raw: dict[str, Any] = yaml.safe_load(yaml.safe_dump(SMALL))
    section = raw
    *parents, last = path.split(".")
    for name in parents:
        section = section.setdefault(name, {})
    section[last] = value
    return raw


def written(tmp_path: Path, raw: object) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw), encoding="utf-8")
    return path


def message(tmp_path: Path, raw: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, raw))
    return str(caught.value)


def test_every_scenario_is_found() -> None:
    assert {file.stem for file in FILES} >= {"demo", "one-gpu", "two-gpus", "folders", "family", "trio"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_loads_with_options_that_its_fusions_know(file: Path) -> None:
    config = load_config(file)
    assert config.ensembles
    for name, ensemble in config.ensembles.items():
        FUSIONS.parse(ensemble.fusion.name, ensemble.fusion.options, f"ensembles.{name}.fusion")


def test_the_demo_holds_32_sequences_of_both_members() -> None:
    config = load_config(CONFIGS / "demo.yaml")
    bytes_per_token = {"smollm2": 30 * 2 * 3 * 64 * 2, "gemma3": 18 * 2 * 1 * 256 * 2}
    for name, member in config.members.items():
        assert demo_model(member.model)
        assert member.kv_memory == 32 * member.max_len * bytes_per_token[name]


def test_the_demo_has_its_three_recipes() -> None:
    ensembles = load_config(CONFIGS / "demo.yaml").ensembles
    assert ensembles["duet"].weights == pytest.approx({"gemma3": 0.7, "smollm2": 0.3})
    assert ensembles["duet"].fusion.options["solver"] == "em"
    assert ensembles["duet-smollm2"].main == "smollm2"
    assert ensembles["duet-search"].fusion.options["solver"] == "search"


def test_the_demo_file_names_every_field() -> None:
    text = (CONFIGS / "demo.yaml").read_text(encoding="utf-8")
    sections = [Config.model_fields[name].annotation for name in ("matrices", "scheduler", "server")]
    for section in (MemberConfig, EnsembleConfig, LimitsConfig, OverridesConfig, *sections):
        for field in section.model_fields:  # type: ignore[union-attr]
            assert f"{field}:" in text, f"{field} is not in demo.yaml"


def test_weights_sum_to_one_with_main_first(tmp_path: Path) -> None:
    weights = load_config(written(tmp_path, SMALL)).ensembles["ab"].weights
    assert list(weights.items()) == [("b", 0.25), ("a", 0.75)]


@pytest.mark.parametrize("value", ["perplexity", {"by": "perplexity"}, {"by": "perplexity", "tau": DEFAULT_TAU}])
def test_weighting_is_named_or_spelt_out(tmp_path: Path, value: object) -> None:
    ensemble = load_config(written(tmp_path, changed("ensembles.ab.weighting", value))).ensembles["ab"]
    assert (ensemble.weighting.by, ensemble.weighting.tau) == ("perplexity", DEFAULT_TAU)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("members.a.modle", "x", "members.a.modle: Extra inputs"),
        ("servers", {}, "servers: Extra inputs"),
        ("ensembles.ab.fusion", {"nam": "relative"}, "ensembles.ab.fusion.nam: Extra inputs"),
        ("members.a.dtype", "int3", "members.a.dtype: Input should be 'auto', 'bfloat16'"),
        ("members.a.kv_memory", "much", "members.a.kv_memory: 'much' is not a size"),
        ("members.a.kv_memory", 5, "members.a.kv_memory: Input should be greater than or equal to"),
        ("members.a.max_len", 1, "members.a.max_len: Input should be greater"),
        ("members.a.max_memory", {0: "1GiB"}, "members.a: max_memory only acts with device_map"),
        ("members.b", {"model": "x", "device": "cpu", "device_map": "auto"}, "members.b: device and device_map"),
        ("members.b", {}, "members.b.model: Field required"),
        ("members.-x", {"model": "x"}, "members.-x"),
        ("ensembles.ab.members.a", -1, "ensembles.ab.members.a: Input should be greater"),
        ("ensembles.ab.members.a", float("nan"), "ensembles.ab.members.a: "),
        ("ensembles.ab.members", {"b": 0}, "ensembles.ab: members: at least one weight"),
        ("ensembles.ab.main", "c", "ensembles.ab: main 'c' is not one of the members ['a', 'b']"),
        ("ensembles.ab.members.ghost", 1, "ensembles.ab.members: ['ghost'] are not declared under members"),
        ("ensembles.a", {"members": {"b": 1}, "main": "b"}, "ensembles.a: a member has this name already"),
        (
            "ensembles.ab.weighting",
            "best",
            "ensembles.ab.weighting.by: Input should be 'fixed', 'perplexity' or 'gate'",
        ),
        ("ensembles.ab.weighting", "gate", "ensembles.ab.weighting: `by: gate` needs artefact"),
        (
            "ensembles.ab.weighting",
            {"by": "fixed", "artefact": "x.safetensors"},
            "ensembles.ab.weighting: artefact only acts with `by: gate`",
        ),
        ("ensembles.ab.weighting", {"tau": 1.0}, "ensembles.ab.weighting: tau only acts with `by: perplexity`"),
        ("ensembles.ab.weighting", {"by": "perplexity", "tau": 0}, "ensembles.ab.weighting.tau: Input should be"),
        ("ensembles.ab.mode", ["lockstep"], "ensembles.ab.mode: Input should be a valid dictionary"),
        ("matrices.recipe", "own", "matrices.recipe: Input should be 'centred', 'deepen' or 'spelling'"),
        ("matrices.min_retained", 2, "matrices.min_retained: "),
        ("scheduler.max_running", 0, "scheduler.max_running: "),
        ("server.port", 70000, "server.port: Input should be less than or equal to 65535 (given: 70000)"),
        ("server.max_body_bytes", "4 parsecs", "server.max_body_bytes: '4 parsecs' is not a size"),
        ("server.root_path", "llm", "server.root_path: String should match"),
        ("server.root_path", "/llm/", "server.root_path: String should match"),
        ("server.api_key_env", "", "server.api_key_env: "),
        ("server.tls_cert_file", "cert.pem", "server: tls_cert_file and tls_key_file go together"),
        ("server.tls_key_password_env", "X", "server: tls_key_password_env only acts with tls_key_file"),
        ("server.cors_origins", "https://a.org", "server.cors_origins: "),
    ],
)
def test_a_wrong_field_is_named_by_its_path(tmp_path: Path, path: str, value: object, expected: str) -> None:
    text = message(tmp_path, changed(path, value))
    assert expected in text
    assert str(tmp_path / "own.yaml") in text
    assert "\n" not in text


def test_several_wrong_fields_are_all_named(tmp_path: Path) -> None:
    raw = changed("server.port", -1) | {"typo": 1}
    text = message(tmp_path, raw)
    assert "server.port: " in text
    assert "typo: " in text


@pytest.mark.parametrize("raw", [{}, {"members": {}}])
def test_members_are_required(tmp_path: Path, raw: dict[str, Any]) -> None:
    assert "members: " in message(tmp_path, raw)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read .*--config"):
        load_config(tmp_path / "none.yaml")


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_bytes(b"members: \xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "own.yaml")


def test_bad_yaml_is_told_with_its_line(tmp_path: Path) -> None:
    text = message(tmp_path, "members:\n  a: [1,\nserver: {}")
    assert "not valid YAML" in text
    assert "line 3" in text


@pytest.mark.parametrize("raw", ["", "just text", "- a\n- b"])
def test_a_file_without_sections_is_told(tmp_path: Path, raw: str) -> None:
    assert "expected sections (members, ensembles, ...)" in message(tmp_path, raw)


def test_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    raw = changed("matrices.folder", "../built") | {
        "members": {"a": {"model": "./models/a"}, "b": {"model": "~/b"}}
    }
    (tmp_path / "sub").mkdir()
    config = load_config(written(tmp_path / "sub", raw))
    assert config.matrices.folder == (tmp_path / "built").resolve()
    assert config.members["a"].model == str((tmp_path / "sub/models/a").resolve())
    assert config.members["b"].model == str(Path.home() / "b")


def test_the_servers_files_start_at_the_file(tmp_path: Path) -> None:
    files = {"api_key_file": "keys", "tls_cert_file": "../cert.pem", "tls_key_file": "/etc/key.pem"}
    (tmp_path / "sub").mkdir()
    server = load_config(written(tmp_path / "sub", SMALL | {"server": files})).server
    assert server.api_key_file == (tmp_path / "sub/keys").resolve()
    assert server.tls_cert_file == (tmp_path / "cert.pem").resolve()
    assert server.tls_key_file == Path("/etc/key.pem")


@pytest.mark.parametrize("keys", ["sk-secret", {"a": "sk-secret"}, [{"key": "sk-secret"}], ["ok", ["sk-secret"]]])
def test_a_wrong_key_is_named_and_not_quoted(tmp_path: Path, keys: object) -> None:
    text = message(tmp_path, changed("server.api_keys", keys))
    assert "server.api_keys" in text
    assert "sk-secret" not in text


def test_a_key_in_broken_yaml_is_not_quoted(tmp_path: Path) -> None:
    text = message(tmp_path, "server:\n  api_keys: [sk-secret, }\n")
    assert "line 2" in text
    assert "sk-secret" not in text


def test_keys_are_hidden_in_the_configuration(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, changed("server.api_keys", ["sk-secret"])))
    assert config.server.api_keys[0].get_secret_value() == "sk-secret"
    assert "sk-secret" not in f"{config} {config!r} {config.model_dump()}"


def test_replaced_fields_are_checked() -> None:
    server = ServerConfig(port=5, api_keys=(SecretStr("x"),))
    assert server.replaced(host="h") == ServerConfig(host="h", port=5, api_keys=(SecretStr("x"),))
    with pytest.raises(
        ConfigError, match=r"^server\.root_path: .*; server\.port: |^server\.port: .*; server\.root_path: "
    ):
        server.replaced(port=-1, root_path="x")
    with pytest.raises(ConfigError, match=r"^server: tls_cert_file and tls_key_file go together"):
        server.replaced(tls_key_file="key.pem")


@pytest.mark.parametrize("model", ["org/name", "gpt2", "demo:gemma-3-270m", "/abs/folder"])
def test_hub_ids_and_absolute_folders_stay_as_they_are(tmp_path: Path, model: str) -> None:
    config = load_config(written(tmp_path, changed("members.a.model", model)))
    assert config.members["a"].model == model


@pytest.mark.parametrize(
    ("text", "size"),
    [(7, 7), ("2GiB", 2 * 2**30), ("500 MB", 5 * 10**8), ("1.5kib", 1536), ("3 b", 3), ("1TB", 10**12)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 GiB more", "1e3MB", "12"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
