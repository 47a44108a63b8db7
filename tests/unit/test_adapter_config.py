"""Members that are adapters: what they have from their base, what they may have of their own, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.errors import ConfigError
from ensemble_core.member_config import MemberConfig
from ensemble_core.transfer.build import member_sets

BASE: dict[str, Any] = {"model": "org/base", "revision": "r1", "dtype": "float32", "device": "cpu", "max_len": 512}


def loaded(tmp_path: Path, members: dict[str, Any], **sections: Any) -> Config:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"members": members, **sections}), encoding="utf-8")
    return load_config(path)


def test_an_adapter_has_from_its_base_what_is_not_said_of_it(tmp_path: Path) -> None:
    own = {"base": "base", "adapter": "./poet", "max_len": 256, "kv_memory": "2MiB"}
    config = loaded(tmp_path, {"poet": own, "base": BASE | {"chat_template": "{{ x }}", "kv_cache": "paged"}})
    poet = config.members["poet"]
    assert (poet.model, poet.revision, poet.dtype, poet.device) == ("org/base", "r1", "float32", "cpu")
    assert (poet.chat_template, poet.kv_cache) == ("{{ x }}", "paged")
    assert (poet.max_len, poet.kv_memory, poet.adapter) == (256, 2 * 2**20, str(tmp_path / "poet"))
    assert config.owner("poet") == config.owner("base") == "base"
    assert config.owners(["poet", "base"]) == ("base",)


def test_what_is_shared_may_be_said_again(tmp_path: Path) -> None:
    own = BASE | {"base": "base", "adapter": "org/poet", "adapter_revision": "v2"}
    poet = loaded(tmp_path, {"base": BASE, "poet": own}).members["poet"]
    assert (poet.adapter, poet.adapter_revision, poet.revision) == ("org/poet", "v2", "r1")


def test_members_that_are_objects_are_filled_up_too() -> None:
    base = MemberConfig.model_validate(BASE)
    config = Config(
        members={"base": base, "poet": MemberConfig(model="org/base", base="base", adapter="org/poet")}
    )
    assert config.members["poet"].revision == "r1"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"base": "bass"}, "members.poet.base: 'bass' is not declared under members; a base is one of ['base']"),
        ({"base": "poet"}, "members.poet.base: 'poet' has no weights of its own to adapt"),
        ({"base": "critic"}, "' has no weights of its own to adapt; a base is one of ['base']"),
        ({"base": None}, "members.poet.adapter: needs `base`"),
        ({"base": 5}, "members.poet.base: Input should be a valid string"),
        ({"adapter": None}, "members.poet: adapter and base go together"),
        ({"adapter": ""}, "members.poet.adapter: String should have at least 1 character"),
        (
            {"model": "org/other"},
            "members.poet.model: 'org/other', but the weights are those of 'base', which has",
        ),
        ({"revision": "r2"}, "members.poet.revision: 'r2', but"),
        ({"dtype": "bfloat16"}, "members.poet.dtype: 'bfloat16', but"),
        ({"device": "cuda"}, "members.poet.device: 'cuda', but"),
        ({"forward": "transformers"}, "members.poet.forward: 'transformers', but"),
        ({"trust_remote_code": True}, "members.poet.trust_remote_code: True, but"),
        ({"max_len": 513}, "members.poet.max_len: 513 is more than the 512 of its base 'base'; lower it"),
        ({"host": {"process": {}}}, "members.poet: host: an adapter shares its base's memory"),
        ({"base": "far"}, "members.poet.base: 'far' has a host"),
    ],
)
def test_what_cannot_be_is_refused_with_its_path(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    poet = {"base": "base", "adapter": "./poet"} | changes
    members = {
        "base": BASE,
        "poet": {field: value for field, value in poet.items() if value is not None},
        "critic": {"base": "poet" if changes.get("base") == "critic" else "base", "adapter": "./critic"},
        "far": BASE | {"host": {"process": {}}},
    }
    if "far" not in changes.values():
        del members["far"]
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, members)
    assert expected in str(caught.value)


def test_a_revision_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"members\.base: adapter_revision only acts with `adapter`"):
        loaded(tmp_path, {"base": BASE | {"adapter_revision": "v2"}})


def test_matrices_are_made_for_bases(tmp_path: Path) -> None:
    members = {"base": BASE, "poet": {"base": "base", "adapter": "org/poet"}, "other": {"model": "org/other"}}
    ensembles = {
        "three": {"members": dict.fromkeys(members, 1), "main": "other"},
        "two": {"members": {"poet": 1, "other": 1}, "main": "poet"},
        "own": {"members": {"poet": 1, "base": 1}, "main": "poet"},
    }
    assert member_sets(loaded(tmp_path, members, ensembles=ensembles)) == [("base",), ("base", "other")]
