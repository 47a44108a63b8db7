"""From a configuration to matrices on disk, with folders and vocabularies of the test's own."""

import pytest
import torch
from safetensors.torch import save_file

from ensemble_core.config import Config
from ensemble_core.errors import TransferMatrixError
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer import build, report
from ensemble_core.transfer.matrix import common_anchors
from ensemble_core.transfer.store import load_matrix, matrix_path, read_metadata

SIZES = {"a": 30, "b": 40, "c": 50}
VOCABULARIES = {
    name: Vocabulary(
        [b"%d" % i for i in range(size)] + [b"</s>"], frozenset({size}), frozenset({size}), encode=lambda t: []
    )
    for name, size in SIZES.items()
}


@pytest.fixture(autouse=True)
def checkpoints(tmp_path, monkeypatch):
    """A folder with embeddings for each member; its name is the configured model's."""
    for number, (name, size) in enumerate(SIZES.items()):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        table = torch.randn(size + 1, 8, generator=torch.Generator().manual_seed(number))
        save_file({"model.embed_tokens.weight": table}, folder / "model.safetensors")
    monkeypatch.setattr(build, "resolve_folder", lambda member: tmp_path / "models" / member.model[-1])
    monkeypatch.setattr(build, "load_vocabulary", lambda name, member: VOCABULARIES[name])


def configuration(folder, **matrices):
    def ensemble(members, fusion="relative"):
        return {"members": dict.fromkeys(members, 1), "main": members[0], "fusion": {"name": fusion}}

    return Config.model_validate(
        {
            "members": {name: {"model": f"hub/{name}", "revision": "r1"} for name in SIZES},
            "ensembles": {
                "pair": ensemble("ba"),
                "same-pair": ensemble("ab"),
                "alone": ensemble("c"),
                "direct": ensemble("ac", "projection"),
                "trio": ensemble("cab"),
            },
            "matrices": {"folder": folder, "top_k": 4, **matrices},
        }
    )


def test_builds_each_set_of_members_once(tmp_path):
    config = configuration(tmp_path)
    reports = build.build_matrices(config, force=False, only_missing=False)
    assert [(r.member, r.path.parent.name) for r in reports] == [
        ("a", "a+b"),
        ("b", "a+b"),
        ("a", "a+b+c"),
        ("b", "a+b+c"),
        ("c", "a+b+c"),
    ]
    for each in reports:
        assert not each.skipped
        assert each.num_bytes == each.path.stat().st_size
        assert each.quality == read_metadata(each.path).quality


def test_what_is_built_loads(tmp_path):
    config = configuration(tmp_path)
    build.build_matrices(config, force=False, only_missing=False)
    matrix = load_matrix(
        matrix_path(tmp_path, "ba", "b", "centred"),
        member="b",
        vocabulary=VOCABULARIES["b"],
        anchors=common_anchors([VOCABULARIES["a"], VOCABULARIES["b"]]),
        recipe=build.recipe_of(config.matrices),
        rebuild="unisono build",
        origin=build.origin_of(config.members["b"]),
    )
    assert matrix.columns.shape == (41, 4)
    assert matrix.num_anchors == 31


def test_a_refusal_names_the_command_with_the_file(tmp_path):
    config = configuration(tmp_path)
    with pytest.raises(TransferMatrixError, match=r"rebuild it with: unisono build --config c\.yaml$"):
        load_matrix(
            matrix_path(tmp_path, "ab", "a", "centred"),
            member="a",
            vocabulary=VOCABULARIES["a"],
            anchors=common_anchors([VOCABULARIES["a"]]),
            recipe=build.recipe_of(config.matrices),
            rebuild="unisono build --config c.yaml",
        )


def test_only_missing_leaves_what_fits(tmp_path):
    config = configuration(tmp_path)
    first = build.build_matrices(config, force=False, only_missing=False)
    first[1].path.unlink()
    first[2].path.write_bytes(b"damaged")
    again = build.build_matrices(config, force=False, only_missing=True)
    assert [report.skipped for report in again] == [True, False, False, True, True]
    assert [report.quality for report in again] == [report.quality for report in first]
    assert all(r.skipped for r in build.build_matrices(config, force=False, only_missing=True))
    sharper = configuration(tmp_path, temperature=30.0)
    assert not any(r.skipped for r in build.build_matrices(sharper, force=False, only_missing=True))


def test_other_weights_are_built_anew(tmp_path):
    config = configuration(tmp_path)
    build.build_matrices(config, force=False, only_missing=False)
    moved = config.members["a"].model_copy(update={"revision": "r2"})
    changed = config.model_copy(update={"members": {**config.members, "a": moved}})
    reports = build.build_matrices(changed, force=False, only_missing=True)
    assert [r.member for r in reports if not r.skipped] == ["a", "a"]


def test_refuses_too_little_unless_forced(tmp_path):
    config = configuration(tmp_path, top_k=1, temperature=0.1)
    with pytest.raises(TransferMatrixError, match=r"member 'a'.*min_retained is 0\.2.*--force"):
        build.build_matrices(config, force=False, only_missing=False)
    assert list(tmp_path.rglob("*.centred.safetensors")) == []
    reports = build.build_matrices(config, force=True, only_missing=False)
    assert all(report.path.is_file() and report.quality.median_anchors < 0.2 for report in reports)


def test_rows_by_spelling_need_no_embeddings(tmp_path, monkeypatch):
    config = configuration(tmp_path, recipe="spelling")
    for file in tmp_path.rglob("model.safetensors"):
        file.unlink()
    reports = build.build_matrices(config, force=False, only_missing=False)
    assert {each.path.name for each in reports if each.member == "b"} == {"b.spelling.safetensors"}
    assert all(r.skipped for r in build.build_matrices(config, force=False, only_missing=True))
    matrix = load_matrix(
        reports[1].path,
        member="b",
        vocabulary=VOCABULARIES["b"],
        anchors=common_anchors([VOCABULARIES["a"], VOCABULARIES["b"]]),
        recipe=build.recipe_of(config.matrices),
        rebuild="unisono build",
    )
    assert matrix.columns.shape == (41, 1)
    monkeypatch.setattr(report, "load_vocabulary", lambda name, member: VOCABULARIES[name])
    found = report.inspect_matrices(config, [reports[1].path], ["37"])[0]
    assert found.recipe == {"name": "spelling"}
    assert found.neighbours[0].anchors == (("3", 1.0),)
