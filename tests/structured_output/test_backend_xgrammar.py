"""Whatever tokens are drawn, what a grammar lets through is what was asked for."""

import json
import random
import re

import numpy as np
import pytest

from tests.structured_output.conftest import VOCAB_SIZE
from vllm.errors import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "address": {"anyOf": [{"$ref": "#/$defs/address"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
    "$defs": {
        "address": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
        }
    },
}


def is_person(text: str) -> bool:
    value = json.loads(text)
    address = value["address"]
    return (
        value.keys() == {"name", "age", "tags", "address"}
        and len(value["name"]) <= 8
        and 0 <= value["age"] <= 120
        and len(value["tags"]) <= 2
        and set(value["tags"]) <= {"a", "b"}
        and (address is None or bool(re.fullmatch("[0-9]{5}", address["zip"])))
    )


def random_output(backend, tokenizer, rng: random.Random, limit: int = 400, **params) -> str:
    """Text of randomly drawn allowed tokens, up to the stop token."""
    stop = tokenizer.eos_token_id
    grammar = backend.compile(StructuredOutputsParams(**params), [stop])
    bitmask = np.zeros((1, -(-VOCAB_SIZE // 32)), dtype=np.int32)
    tokens: list[int] = []
    while len(tokens) < limit:
        backend.fill_bitmask([grammar], bitmask)
        allowed = np.flatnonzero(np.unpackbits(bitmask.view(np.uint8), bitorder="little"))
        # Stop where that is allowed, half of the time.
        token = stop if stop in allowed and rng.random() < 0.5 else int(rng.choice(allowed))
        assert grammar.accept_tokens([token])
        if token == stop:
            assert grammar.is_terminated()
            return tokenizer.decode(tokens)
        assert not grammar.is_terminated()
        tokens.append(token)
    pytest.fail("the grammar never came to an end")


@pytest.mark.parametrize("seed", range(6))
def test_json_schema(backend, tokenizer, seed):
    assert is_person(random_output(backend, tokenizer, random.Random(seed), json=PERSON))


def test_json_schema_as_text_without_whitespace(backend, tokenizer):
    for seed in range(3):
        text = random_output(
            backend,
            tokenizer,
            random.Random(seed),
            json=json.dumps(PERSON),
            disable_any_whitespace=True,
        )
        assert is_person(text)
        assert "\n" not in text.replace("\\n", "")


def test_regex(backend, tokenizer):
    for seed in range(5):
        text = random_output(backend, tokenizer, random.Random(seed), regex=r"[a-c]{2,5}-\d+\.x")
        assert re.fullmatch(r"[a-c]{2,5}-\d+\.x", text)


@pytest.mark.parametrize(
    "choices", [["yes", "no"], ['say "hi"', "a\\b", "two\nlines", "é漢", "nul\0"]]
)
def test_choice(backend, tokenizer, choices):
    rng = random.Random(0)
    seen = {random_output(backend, tokenizer, rng, choice=choices) for _ in range(20)}
    assert seen <= set(choices) and len(seen) > 1


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "x" digit+ ("," digit+)*\ndigit ::= [0-9]',
        'start: "x" DIGITS ("," DIGITS)*\nDIGITS: /[0-9]+/',
    ],
)
def test_grammar_in_ebnf_and_lark(backend, tokenizer, grammar):
    text = random_output(backend, tokenizer, random.Random(1), grammar=grammar)
    assert re.fullmatch(r"x\d+(,\d+)*", text)


def test_json_object_is_an_object(backend, tokenizer):
    grammar = backend.compile(StructuredOutputsParams(json_object=True), [])
    assert grammar.accept_tokens(tokenizer.encode('{"a": [1, {"b": null}]}'))
    array = backend.compile(StructuredOutputsParams(json_object=True), [])
    assert not array.accept_tokens(tokenizer.encode("[1]"))


@pytest.mark.parametrize(
    "tag",
    [
        {
            "type": "structural_tag",
            "format": {
                "type": "triggered_tags",
                "triggers": ["<f"],
                "tags": [
                    {
                        "begin": "<f>",
                        "content": {
                            "type": "json_schema",
                            "json_schema": {"type": "integer", "minimum": 5},
                        },
                        "end": "</f>",
                    }
                ],
            },
        },
        {
            "structures": [
                {"begin": "<f>", "schema": {"type": "integer", "minimum": 5}, "end": "</f>"}
            ],
            "triggers": ["<f"],
        },
    ],
)
def test_structural_tags_in_both_forms(backend, tokenizer, tag):
    params = StructuredOutputsParams(structural_tag=json.dumps(tag))
    assert backend.compile(params, []).accept_tokens(tokenizer.encode("free <f>7</f> text"))
    assert not backend.compile(params, []).accept_tokens(tokenizer.encode("free <f>1</f> text"))
    assert not backend.compile(params, []).accept_tokens(tokenizer.encode("free <f>no"))


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"json": "{"}, "json"),
        ({"json": "[" * 100_000}, "json"),
        ({"json": {"type": "bogus"}}, "bogus"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"regex": "("}, "regex"),
        ({"regex": r"(a)\1"}, "regex"),
        ({"grammar": 'root ::= "a" | missing'}, "missing"),
        ({"grammar": "start: ("}, "grammar"),
        # Unbounded, these end the process that compiles them.
        ({"json": {"type": "string", "pattern": "(" * 100_000 + ")" * 100_000}}, "pattern"),
        ({"grammar": 'start: %json {"type": "string", "pattern": "' + "a?" * 9000 + '"}'}, "patt"),
        ({"grammar": "start: %json " + '{"items":' * 65 + "{}" + "}" * 65}, "schemas deep"),
        ({"grammar": "start: %json ["}, "%json must stand before a JSON schema"),
        ({"grammar": "root ::= root"}, "nothing can fulfil"),
        ({"json": {"$ref": "#"}}, "nothing can fulfil"),
        ({"regex": "a" * 300_000}, "at most 262144 characters"),
        ({"choice": [f"choice {i}" for i in range(30_000)]}, "at most 262144 characters"),
        ({"json": {"enum": [f"value {i}" for i in range(30_000)]}}, "at most 262144 characters"),
        ({"structural_tag": "{"}, "structural_tag"),
        ({"structural_tag": '{"structures": 5}'}, "list of objects"),
        ({"structural_tag": '{"structures": [5]}'}, "list of objects"),
        ({"structural_tag": '{"type": "structural_tag"}'}, "structural_tag"),
        (
            {"structural_tag": '{"structures": [{"begin": "<", "schema": {"not": {}}}]}'},
            "not",
        ),
    ],
)
def test_what_cannot_be_compiled_is_the_clients_error(backend, params, word):
    with pytest.raises(VLLMValidationError, match=word) as caught:
        backend.compile(StructuredOutputsParams(**params), [])
    message = str(caught.value)
    assert caught.value.parameter == "structured_outputs"
    assert "\n" not in message and ".cc" not in message and len(message) < 450


def test_a_refused_token_changes_nothing(backend, tokenizer):
    grammar = backend.compile(StructuredOutputsParams(choice=["abc"]), [])
    a, b = tokenizer.encode("a") + tokenizer.encode("b")
    assert not grammar.accept_tokens([a, a])
    assert grammar.accept_tokens([a, b])
    grammar.rollback(1)
    assert grammar.accept_tokens(tokenizer.encode("bc"))


def test_ordinary_stop_tokens_may_still_be_part_of_the_output(backend, tokenizer):
    (brace,) = tokenizer.encode("}")
    params = StructuredOutputsParams(json={"type": "object", "properties": {}})
    grammar = backend.compile(params, [brace, tokenizer.eos_token_id])
    assert grammar.accept_tokens([*tokenizer.encode("{"), brace])
    assert not grammar.is_terminated()
    assert grammar.accept_tokens([tokenizer.eos_token_id])
    assert grammar.is_terminated()


def test_blanks_come_to_an_end(backend, tokenizer):
    grammar = backend.compile(StructuredOutputsParams(json={"type": "object"}), [])
    (newline,) = tokenizer.encode("\n")
    assert grammar.accept_tokens(tokenizer.encode("{"))
    count = 0
    while grammar.accept_tokens([newline]):
        count += 1
        assert count < 100
    assert count >= 16
