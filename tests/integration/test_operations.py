"""docs/operations.md: its figures are those of the code and the demo, and Prometheus takes its expressions."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import torch
from processes import tool
from transformers import AutoConfig

from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.loading.checkpoints import resolve_folder
from ensemble_core.transfer.store import _DTYPES

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.yaml"
DOCUMENT = (ROOT / "docs" / "operations.md").read_text()


def section(name: str) -> str:
    """The text under a heading of the second level."""
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def size_row(name: str) -> str:
    return next(line for line in section("Sizing").splitlines() if line.startswith(f"| {name} "))


def test_the_caches_are_those_of_the_demo_configuration() -> None:
    members = load_config(DEMO).members
    sizes = [members[name].kv_memory for name in ("gemma3", "smollm2")]
    assert " + ".join(f"{int(size) // 2**20}" for size in sizes) + " MiB" in size_row("KV cache")


def test_a_token_takes_what_the_document_says(demo_config: Config) -> None:
    """2 x layers x KV heads x head size x bytes, from the checkpoints; and the demo's caches hold 32 x 2,048."""
    for member in demo_config.members.values():
        size = _token_bytes(member)
        assert f"{size:,} bytes in" in section("Sizing") or f" {size:,} in" in section("Sizing")
        assert member.kv_memory == size * 32 * 2048


def _token_bytes(member: MemberConfig) -> int:
    model = AutoConfig.from_pretrained(resolve_folder(member))
    head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return int(2 * model.num_hidden_layers * model.num_key_value_heads * head * torch.bfloat16.itemsize)


def test_weights_and_matrices_have_the_size_that_the_document_says(demo_config: Config) -> None:
    folders = [resolve_folder(demo_config.members[name]) for name in ("gemma3", "smollm2")]
    weights = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in folders]
    assert " + ".join(f"{size / 1e9:.2f}" for size in weights) + " GB" in size_row("weights")
    entry = _DTYPES["col_indices"].itemsize + _DTYPES["values"].itemsize
    rows = [AutoConfig.from_pretrained(folder).vocab_size for folder in folders]
    matrices = [entry * demo_config.matrices.top_k * vocabulary for vocabulary in rows]
    assert f"| {entry} bytes x `top_k` x vocabulary" in size_row("matrices")
    assert " + ".join(f"{size / 1e6:.1f}" for size in matrices) + " MB" in size_row("matrices")


def test_prometheus_takes_every_expression_of_the_metrics_table(tmp_path: Path) -> None:
    examples = [row.split(" | ")[-1].strip(" |`") for row in section("Metrics").splitlines() if row[:3] == "| `"]
    expressions = [each for each in examples if each]
    assert len(expressions) > 8
    rules = [f"  - record: example:{rank}\n    expr: '{each}'\n" for rank, each in enumerate(expressions)]
    (tmp_path / "rules.yml").write_text("groups:\n- name: examples\n  rules:\n" + "".join(rules))
    done = subprocess.run(
        [tool("promtool"), "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(expressions)} rules found" in done.stdout


def test_code_of_a_checkpoint_runs_only_where_it_is_asked_for() -> None:
    assert MemberConfig(model="any").trust_remote_code is False
    for path in (ROOT / "configs").glob("*.yaml"):
        assert not [name for name, member in load_config(path).members.items() if member.trust_remote_code], path


def test_the_commands_that_the_document_shows_exist() -> None:
    from typer.main import get_command

    from server.cli import app

    commands = set(getattr(get_command(app), "commands", {}))
    shown = set(re.findall(r"^unisono (\w+)", section("Install"), re.MULTILINE))
    assert shown == {"pull", "build", "serve"}
    assert shown <= commands
