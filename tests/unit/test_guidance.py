"""Constrained text over byte vocabularies and tiny tokenizers: it parses, it fits its schema, it ends in time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
from fakes import byte_vocabulary, pair_vocabulary
from tiny_models import byte_level, metaspace, replacing

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.guidance import Constraint, Grammars
from ensemble_core.errors import InvalidRequestError, UnisonoError
from ensemble_core.text.vocabulary import Vocabulary, from_tokenizer

PERSON = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "kind": {"enum": ["cat", "dog"]},
            "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
            "tame": {"type": "boolean"},
        },
        "required": ["name", "kind", "ages", "tame"],
        "additionalProperties": False,
    }
)


def of_schema(schema: str) -> TextForm:
    return TextForm("json", schema, field="response_format")


def is_person(value: object) -> bool:
    """The schema by hand."""
    return (
        isinstance(value, dict)
        and value.keys() == {"name", "kind", "ages", "tame"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and value["kind"] in ("cat", "dog")
        and len(value["ages"]) <= 3
        and all(isinstance(age, int) and 0 <= age <= 99 for age in value["ages"])
        and isinstance(value["tame"], bool)
    )


def of(tokenizer: object, size: int, stop: int) -> Vocabulary:
    return from_tokenizer(tokenizer, size, [stop], "m")


VOCABULARIES: dict[str, Callable[[], Vocabulary]] = {
    "bytes": byte_vocabulary,
    "pairs": pair_vocabulary,
    "byte level": lambda: of(byte_level(397, "<eos>", ("<|im_end|>",)), 400, 0),
    "metaspace": lambda: of(metaspace(477), 480, 2),
    "replace": lambda: of(replacing(637), 640, 2),
}
SCHEMAS: list[tuple[str, Callable[[object], bool]]] = [
    (PERSON, is_person),
    ('{"enum": ["é中😀", 7, null]}', lambda value: value in ("é中😀", 7, None)),
    ('{"type": "integer", "minimum": 5, "maximum": 1200}', lambda v: isinstance(v, int) and 5 <= v <= 1200),
]


def write(vocabulary: Vocabulary, schema: str, rng: random.Random, limit: int = 600) -> list[int]:
    """A random walk over what is allowed, which ends at a stop token."""
    constraint = Grammars(vocabulary).compile(of_schema(schema))
    ids: list[int] = []
    for _ in range(limit):
        allowed = constraint.allowed()
        assert allowed.shape == (len(vocabulary),)
        choices = allowed.nonzero().flatten().tolist()
        assert choices, "nothing is allowed"
        ends = [token_id for token_id in choices if token_id in vocabulary.stop_ids]
        # Free strings and spaces could go on for ever: the end is taken wherever it is offered, quotes often.
        short = [i for i in choices if vocabulary.tokens[i] in (b'"', b"}", b"]", b",")]
        ids.append(rng.choice(ends or (short if short and rng.random() < 0.5 else choices)))
        if ids[-1] in vocabulary.stop_ids:
            return ids
        constraint.accept(ids[-1])
    raise AssertionError("the text does not end")


@pytest.mark.parametrize("kind", VOCABULARIES)
@pytest.mark.parametrize("schema", range(len(SCHEMAS)))
def test_any_walk_is_json_of_the_schema(kind: str, schema: int) -> None:
    vocabulary, (text, fits) = VOCABULARIES[kind](), SCHEMAS[schema]
    for seed in range(8):
        ids = write(vocabulary, text, random.Random(seed))
        assert not set(ids[:-1]) & (vocabulary.special_ids | vocabulary.stop_ids)
        assert fits(json.loads(b"".join(vocabulary.tokens[i] for i in ids[:-1])))


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_a_mask_is_what_the_grammar_engine_says_of_each_token(kind: str) -> None:
    vocabulary, rng = VOCABULARIES[kind](), random.Random(1)
    constraint = Grammars(vocabulary).compile(of_schema(PERSON))
    for _ in range(40):
        matcher, mask = constraint._matcher.deep_copy(), constraint.allowed()
        stops = sorted(vocabulary.stop_ids)
        assert mask[stops].tolist() == [matcher.is_accepting()] * len(stops)
        mask[stops] = False
        allowed = mask.nonzero().flatten().tolist()
        said = matcher.compute_logit_bias()[: len(vocabulary)]  # a byte for each token
        assert allowed == [i for i, byte in enumerate(said) if byte and i not in stops]
        assert matcher.validate_tokens(allowed[:1]) == len(allowed[:1])
        if not allowed:
            break
        constraint.accept(rng.choice(allowed))


def test_no_schema_is_any_object() -> None:
    vocabulary = byte_vocabulary()
    constraint = Grammars(vocabulary).compile(of_schema(""))
    allowed = constraint.allowed()
    assert allowed[ord("{")]
    assert not allowed[[ord("["), ord('"'), ord("1"), len(vocabulary) - 1]].any()
    for byte in b'{"a":[1]}':
        assert constraint.allowed()[byte]
        constraint.accept(byte)
    assert constraint.allowed()[len(vocabulary) - 1]


def test_every_stop_token_ends_and_only_a_complete_text() -> None:
    plain = byte_vocabulary()
    ends = frozenset({256, 257})
    two = Vocabulary([*plain.tokens, b"<end>"], ends, ends, plain.encode)
    constraint = Grammars(two).compile(of_schema('{"enum": [7]}'))
    assert constraint.allowed().nonzero().flatten().tolist() == [ord("7")]
    constraint.accept(ord("7"))
    assert constraint.allowed()[[256, 257]].all()


def test_constraints_of_one_vocabulary_stand_apart() -> None:
    grammars = Grammars(byte_vocabulary())
    first, second = (
        grammars.compile(of_schema('{"enum": ["ab"]}')),
        grammars.compile(of_schema('{"enum": ["ab"]}')),
    )
    first.accept(ord('"'))
    assert first.allowed().nonzero().flatten().tolist() == [ord("a")]
    assert second.allowed().nonzero().flatten().tolist() == [ord('"')]


@pytest.mark.parametrize(
    "schema",
    ["{", "[]", '"text"', '{"type": "nonsense"}', '{"$ref": "#/nowhere"}', '{"pattern": "(", "type": "string"}'],
)
def test_a_schema_that_cannot_be_used_is_refused(schema: str) -> None:
    with pytest.raises(InvalidRequestError, match="response_format") as caught:
        Grammars(byte_vocabulary()).compile(of_schema(schema))
    assert caught.value.param == "response_format"


ENDLESS = [
    '{"$ref": "#"}',
    '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}',
    '{"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}',
    '{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}',
    '{"type": "array", "items": {"$ref": "#"}, "minItems": 1}',
    '{"type": "array", "prefixItems": [{"type": "null"}, {"$ref": "#"}], "minItems": 2}',
]
CHOICES = {"anyOf": [{"type": "object", "properties": {f"p{i}_{j}": {} for j in range(5)}} for i in range(150)]}


@pytest.mark.parametrize("schema", [*ENDLESS, json.dumps(CHOICES)])
@pytest.mark.parametrize("kind", VOCABULARIES)
def test_a_schema_that_nothing_satisfies_or_that_costs_too_much_is_refused(kind: str, schema: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^response_format") as caught:
        Grammars(VOCABULARIES[kind]()).compile(of_schema(schema))
    assert caught.value.param == "response_format"
    assert len(str(caught.value)) < 500


def test_a_pattern_that_costs_too_much_is_refused() -> None:
    pattern = "|".join(f".*{letter}.{{20}}" for letter in "abcdefghijklmnop")
    rng, plain = random.Random(0), byte_vocabulary()
    tokens = [*plain.tokens, *(bytes(rng.choices(range(97, 123), k=rng.randrange(2, 12))) for _ in range(5000))]
    long_tokens = Vocabulary(tokens, plain.special_ids, plain.stop_ids, plain.encode)
    with pytest.raises(InvalidRequestError, match="too many"):
        Grammars(long_tokens).compile(of_schema(json.dumps({"type": "string", "pattern": pattern})))


def test_a_grammar_that_fails_on_the_way_raises_and_lets_no_stop_token_through() -> None:
    late = {"type": "array", "prefixItems": [{"const": "abcdefgh"}, CHOICES], "minItems": 2}
    vocabulary = byte_vocabulary()
    constraint, text = Grammars(vocabulary).compile(of_schema(json.dumps(late))), b'["abcdefgh",{'
    for byte in text[:-1]:
        allowed = constraint.allowed()
        assert allowed[byte]
        assert not allowed[list(vocabulary.stop_ids)].any()
        constraint.accept(byte)
    with pytest.raises(UnisonoError, match=r"cannot follow its JSON schema.*simplify"):
        follow(constraint, text[-1])
    with pytest.raises(UnisonoError):  # and it stays so
        constraint.allowed()
    with pytest.raises(UnisonoError):
        constraint.accept(ord("}"))


def follow(constraint: Constraint, byte: int) -> None:
    assert constraint.allowed()[byte]
    constraint.accept(byte)
    constraint.allowed()


def test_a_token_that_was_not_allowed_ends_the_constraint() -> None:
    constraint = Grammars(byte_vocabulary()).compile(of_schema('{"enum": [7]}'))
    with pytest.raises(UnisonoError):
        constraint.accept(ord("8"))
    with pytest.raises(UnisonoError):
        constraint.allowed()


@pytest.mark.parametrize(
    "schema",
    [
        '{"type": "object", "properties": {"a": {"$ref": "#"}}}',
        '{"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["a"]}',
        '{"anyOf": [{"$ref": "#"}, {"type": "integer"}]}',
        '{"type": "array", "items": {"$ref": "#"}}',
        '{"$ref": "#/$defs/z", "$defs": {"z": {"enum": [1]}}}',
    ],
)
def test_a_schema_that_comes_back_to_itself_may_end(schema: str) -> None:
    vocabulary = byte_vocabulary()
    for seed in range(4):
        json.loads(b"".join(vocabulary.tokens[i] for i in write(vocabulary, schema, random.Random(seed))[:-1]))


def test_choices_of_a_prompt_share_a_grammar_and_stand_apart() -> None:
    grammars = Grammars(byte_vocabulary())
    first, second = (grammars.compile(of_schema('{"enum": ["ab", "cd"]}')) for _ in range(2))
    other = grammars.compile(of_schema('{"enum": [7]}'))
    first.accept(ord('"'))
    first.accept(ord("a"))
    second.accept(ord('"'))
    assert first.allowed().nonzero().flatten().tolist() == [ord("b")]
    assert second.allowed().nonzero().flatten().tolist() == [ord("a"), ord("c")]
    assert other.allowed().nonzero().flatten().tolist() == [ord("7")]


def test_a_member_that_cannot_stop_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="no stop token") as caught:
        Grammars(byte_vocabulary(eos=False)).compile(of_schema(""))
    assert caught.value.param == "response_format"


def test_white_space_comes_to_an_end() -> None:
    constraint = Grammars(byte_vocabulary()).compile(of_schema('{"type": "array"}'))
    constraint.accept(ord("["))
    written = 0
    while constraint.allowed()[[ord(" "), ord("\n")]].any():
        constraint.accept(ord("\n") if constraint.allowed()[ord("\n")] else ord(" "))
        written += 1
        assert written < 50
    assert constraint.allowed()[ord("]")]
