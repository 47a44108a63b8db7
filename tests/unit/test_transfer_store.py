"""Matrices on disk: what is written comes back, and nothing damaged or foreign is taken."""

import dataclasses
import json
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ensemble_core.errors import TransferMatrixError
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer import store
from ensemble_core.transfer.matrix import Anchors, TransferMatrix, common_anchors
from ensemble_core.transfer.rows import Quality, RowRecipe, build_matrix
from ensemble_core.transfer.store import Origin, load_matrix, matrix_path, read_metadata, save_matrix

REBUILD = "unisono build --config configs/tiny.yaml"
RECIPE = RowRecipe("centred", 4, 20.0)
ORIGIN = Origin("hub/tiny", "abc")


def vocabulary(num_tokens=20):
    tokens = [b"%d" % i for i in range(num_tokens)] + [b"<s>", b"</s>"]
    specials = frozenset({num_tokens, num_tokens + 1})
    return Vocabulary(tokens, specials, frozenset({num_tokens + 1}), encode=lambda text: [])


@pytest.fixture
def fits():
    """What the stored matrix is loaded for."""
    member = vocabulary()
    anchors = common_anchors([member, vocabulary(12)])
    return {
        "member": "tiny",
        "vocabulary": member,
        "anchors": anchors,
        "recipe": RECIPE,
        "rebuild": REBUILD,
        "origin": ORIGIN,
    }


@pytest.fixture
def stored(tmp_path, fits):
    """A path with a matrix, and the matrix."""
    table = torch.randn(22, 6, generator=torch.Generator().manual_seed(0))
    matrix, quality = build_matrix(fits["vocabulary"], table, fits["anchors"], RECIPE, progress=False)
    path = matrix_path(tmp_path, ["tiny", "other"], "tiny", "centred")
    made_from = {key: value for key, value in fits.items() if key != "rebuild"}
    size = save_matrix(path, matrix, quality, **made_from)
    assert size == path.stat().st_size
    return path, matrix, quality


def rewrite(path, *, tensors=None, metadata=None, sign=True):
    """Change tensors or metadata in the file; `sign` gives it the right sha256, as a faulty writer would."""
    with safe_open(path, framework="pt") as reader:
        found = reader.metadata()
    data = load_file(path) | (tensors or {})
    if sign:
        found["sha256"] = store.data_sha256(data)
    save_file(data, path, metadata=found | (metadata or {}))


def refusal(path, fits):
    with pytest.raises(TransferMatrixError) as caught:
        load_matrix(path, **fits)
    message = str(caught.value)
    assert message.startswith("member 'tiny': transfer matrix ")
    assert str(path) in message
    assert message.endswith(f"rebuild it with: {REBUILD}")
    return message


def test_round_trip_is_exact(stored, fits):
    path, matrix, _ = stored
    loaded = load_matrix(path, **fits)
    assert torch.equal(loaded.columns, matrix.columns)
    assert torch.equal(loaded.values, matrix.values)
    assert torch.equal(loaded.anchor_ids, matrix.anchor_ids)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no partial file stays


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.dictionaries(st.integers(0, 7), st.integers(1, 9), max_size=8), min_size=1, max_size=9))
def test_any_rows_come_back(tmp_path_factory, rows):
    """Empty rows, full rows, rows of different width."""
    width = max(1, max(len(row) for row in rows))
    columns = torch.zeros(len(rows), width, dtype=torch.int32)
    values = torch.zeros(len(rows), width, dtype=torch.float16)
    for index, row in enumerate(rows):
        for place, column in enumerate(sorted(row)):
            columns[index, place] = column
            values[index, place] = row[column] / sum(row.values())
    member = Vocabulary([b"%d" % i for i in range(len(rows))], frozenset(), frozenset(), encode=lambda t: [])
    anchors = Anchors(tuple(member.tokens[:1]) * 7)
    matrix = TransferMatrix(columns, values, anchors.ids(member))
    path = tmp_path_factory.mktemp("any") / "tiny.centred.safetensors"
    fits = {"member": "tiny", "vocabulary": member, "anchors": anchors, "recipe": RECIPE, "origin": ORIGIN}
    save_matrix(path, matrix, Quality((1.0,), (1.0,)), **fits)
    loaded = load_matrix(path, **fits, rebuild=REBUILD)
    assert torch.equal(loaded.columns, columns)
    assert torch.equal(loaded.values, values)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_layout_is_valid_csr_without_padding(stored):
    path, matrix, _ = stored
    data = load_file(path)
    assert {name: tensor.dtype for name, tensor in data.items()} == {
        "crow_indices": torch.int64,
        "col_indices": torch.int32,
        "values": torch.float16,
    }
    assert (data["values"] > 0).all()
    shape = (len(matrix.columns), matrix.num_anchors)
    compressed = torch.sparse_csr_tensor(
        data["crow_indices"].int(), data["col_indices"], data["values"].float(), shape, check_invariants=True
    )
    expected = torch.zeros(shape).scatter_add(1, matrix.columns.long(), matrix.values.float())
    assert torch.equal(compressed.to_dense(), expected)


def test_metadata_tells_what_it_was_made_from(stored, fits):
    path, _, quality = stored
    metadata = read_metadata(path)
    assert (metadata.member, metadata.model, metadata.revision) == ("tiny", "hub/tiny", "abc")
    assert metadata.vocabulary == fits["vocabulary"].fingerprint
    assert metadata.anchors == fits["anchors"].fingerprint
    assert metadata.num_anchors == str(len(fits["anchors"])) == "13"
    assert json.loads(metadata.recipe) == {"name": "centred", "top_k": 4, "temperature": 20.0}
    assert metadata.quality == quality
    assert metadata.unisono_version
    assert metadata.created.endswith("+00:00")


def test_path_does_not_depend_on_the_order_of_members(tmp_path):
    path = matrix_path(tmp_path, ["b", "a"], "b", "deepen")
    assert path == matrix_path(tmp_path, ["a", "b"], "b", "deepen") == tmp_path / "a+b" / "b.deepen.safetensors"


def test_a_failed_write_leaves_the_old_matrix(stored, fits, monkeypatch):
    path, matrix, quality = stored
    before = path.read_bytes()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", disk_full)
    made_from = {key: value for key, value in fits.items() if key != "rebuild"}
    with pytest.raises(TransferMatrixError, match=r"'tiny'.*No space left"):
        save_matrix(path, matrix, quality, **made_from)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_that_may_not_grow_leaves_nothing_half_written(tmp_path, stored, fits):
    """The kernel itself refuses, after the first bytes."""
    _path, matrix, quality = stored
    made_from = {key: value for key, value in fits.items() if key != "rebuild"}
    path = tmp_path / "new" / "tiny.centred.safetensors"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(TransferMatrixError, match="File too large"):
            save_matrix(path, matrix, quality, **made_from)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(path.parent.iterdir()) == []


def test_refuses_a_missing_file(tmp_path, fits):
    assert "expected a file, found none" in refusal(tmp_path / "tiny.centred.safetensors", fits)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_refuses_a_truncated_file(stored, fits, keep):
    path, _, _ = stored
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged" in refusal(path, fits)


def test_refuses_any_flipped_byte_of_the_data(stored, fits):
    path, _, _ = stored
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for position in range(start, len(whole), 37):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert "sha256 of the data: expected" in refusal(path, fits)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("format_version", "0", "format version: expected 1, found 0"),
        ("member", "other", "member: expected tiny, found other"),
        ("model", "hub/else", "model: expected hub/tiny, found hub/else"),
        ("revision", "def", "revision: expected abc, found def"),
        ("vocabulary", "00", "vocabulary fingerprint: expected "),
        ("anchors", "00", "anchor fingerprint: expected "),
        ("num_anchors", "12", "number of anchors: expected 13, found 12"),
        ("sha256", "00", "sha256 of the data: expected "),
        ("surplus", "x", "metadata: expected "),
    ],
)
def test_refuses_foreign_metadata(stored, fits, field, value, said):
    path, _, _ = stored
    rewrite(path, metadata={field: value})
    message = refusal(path, fits)
    assert said in message
    assert value in message


def test_refuses_a_file_that_is_no_matrix(tmp_path, fits):
    path = tmp_path / "tiny.centred.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    assert "format version: expected 1, found none" in refusal(path, fits)


def test_refuses_another_use(stored, fits):
    path, _, _ = stored
    wider = dataclasses.replace(RECIPE, top_k=5)
    assert "vocabulary fingerprint" in refusal(path, fits | {"vocabulary": vocabulary(21)})
    assert '"top_k": 5' in refusal(path, fits | {"recipe": wider})
    assert "anchor fingerprint" in refusal(path, fits | {"anchors": common_anchors([vocabulary(11)])})
    assert "recipe" in refusal(path, fits | {"recipe": RowRecipe("deepen", 4, 20.0)})
    assert "recipe" in refusal(path, fits | {"recipe": dataclasses.replace(RECIPE, temperature=10.0)})
    load_matrix(path, **(fits | {"origin": None}))


def structural_damage(data):
    """What is broken -> the tensors that break it, and what must be said."""
    crow, columns, values = data["crow_indices"], data["col_indices"], data["values"]

    def changed(tensor, place, value):
        copy = tensor.clone()
        copy[place] = value
        return copy

    return {
        "crow not monotone": ({"crow_indices": changed(crow, 3, int(crow[2]) - 1)}, "ascending"),
        "crow starts late": ({"crow_indices": changed(crow, 0, 1)}, "first and last of crow_indices"),
        "crow ends late": ({"crow_indices": changed(crow, -1, len(values) + 1)}, "first and last"),
        "a row too few": ({"crow_indices": crow[1:] * 1}, "rows (entries of crow_indices): expected 23, found 22"),
        "a column too many": ({"col_indices": torch.cat([columns, columns[:1]])}, "as many as values"),
        "column too large": ({"col_indices": changed(columns, -1, 13)}, "expected 0 to 12, found 0 to 13"),
        "column below 0": ({"col_indices": changed(columns, 0, -1)}, "expected 0 to 12, found -1"),
        "column twice": ({"col_indices": changed(columns, 1, columns[0])}, "ascending within a row"),
        "NaN": ({"values": changed(values, 2, float("nan"))}, "found NaN or infinity"),
        "infinity": ({"values": changed(values, 2, float("inf"))}, "found NaN or infinity"),
        "negative": ({"values": changed(values, 2, -0.25)}, "found a negative one"),
        "sum": ({"values": changed(values, 0, float(values[0]) + 0.01)}, "row sums: expected 1"),
        "dtype": ({"values": values.float()}, "dtype of values: expected torch.float16"),
        "dimensions": ({"values": values[:, None]}, "number of dimensions of values"),
        "tensors": ({"surplus": values}, "tensors: expected"),
    }


DAMAGES = list(structural_damage(dict.fromkeys(["crow_indices", "col_indices", "values"], torch.ones(9))))


@pytest.mark.parametrize("damage", DAMAGES)
def test_refuses_a_wrong_structure_with_a_right_sum(stored, fits, damage):
    path, _, _ = stored
    tensors, said = structural_damage(load_file(path))[damage]
    rewrite(path, tensors=tensors)
    assert said in refusal(path, fits)


def test_row_sums_may_be_off_by_rounding_only(stored, fits):
    """Half a row is refused; rows that are all empty are not."""
    path, _, _ = stored
    data = load_file(path)
    rewrite(path, tensors={"values": data["values"] * 0.5})
    assert "row sums: expected 1 (or an empty row), found 0." in refusal(path, fits)
    empty = {"crow_indices": data["crow_indices"] * 0}
    empty |= {"col_indices": data["col_indices"][:0] * 1, "values": data["values"][:0] * 1}
    rewrite(path, tensors=empty)
    assert load_matrix(path, **fits).row_mass.tolist() == [0.0] * 22
