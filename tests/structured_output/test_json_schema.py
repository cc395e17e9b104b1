"""Schemas that the compiler would only half keep to are refused, with the place and the keyword."""

import pytest

from vllm.errors import VLLMValidationError
from vllm.v1.structured_output.json_schema import check_json_schema

INTEGER = {"type": "integer"}


def nested(levels):
    schema = INTEGER
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
        {"title": "T", "description": "d", "$ref": "#/$defs/x", "$defs": {"x": INTEGER}},
        {"anyOf": [INTEGER, {"type": "null"}], "default": None},
        {"allOf": [{"$ref": "#/definitions/x"}], "definitions": {"x": INTEGER}},
        {"type": "integer", "minimum": 1, "exclusiveMaximum": 9},
        {"type": ["string", "null"], "maxLength": 4},
        {"type": "array", "items": INTEGER, "uniqueItems": False, "minItems": 1},
        {"enum": [{"not": 1}, {"if": 2}], "examples": [{"contains": 3}]},
        {"type": "object", "properties": {"not": INTEGER, "if": {"const": 1}}},
        {"type": "string", "pattern": "a" * 4096},
        {"type": "integer", "multipleOf": 1024},
        nested(64),
    ],
)
def test_schemas_that_can_be_kept_to(schema):
    check_json_schema(schema)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ([], ["#", "list"]),
        ({"type": "array", "uniqueItems": True}, ["#", "uniqueItems"]),
        ({"properties": {"a": {"not": INTEGER}}}, ["#/properties/a", "not"]),
        ({"items": {"anyOf": [INTEGER, {"if": {}, "then": {}}]}}, ["#/items/anyOf/1"]),
        ({"$defs": {"x": {"type": "array", "contains": INTEGER}}}, ["#/$defs/x", "contains"]),
        ({"$ref": "http://example.com/x"}, ["$ref", "example.com"]),
        ({"allOf": [INTEGER, {"type": "number"}]}, ["allOf"]),
        ({"anyOf": [INTEGER], "properties": {}}, ["anyOf", "properties"]),
        ({"$ref": "#/$defs/x", "minimum": 2, "$defs": {"x": INTEGER}}, ["$ref", "minimum"]),
        ({"type": "string", "pattern": "a+", "maxLength": 3}, ["pattern", "maxLength"]),
        ({"type": "integer", "multipleOf": 3, "minimum": 1}, ["multipleOf", "minimum"]),
        ({"type": "number", "multipleOf": 0.5}, ["multipleOf", "integer"]),
        ({"minLength": 3}, ["minLength", "type"]),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, ["dependentRequired"]),
        ({"prefixItems": [3]}, ["#/prefixItems/0", "int"]),
        ({"type": "integer", "multipleOf": 0}, ["multipleOf", "1024"]),
        ({"type": "integer", "multipleOf": 2000}, ["multipleOf", "1024"]),
        ({"items": {"type": "string", "pattern": "a?" * 4096}}, ["#/items", "4096", "8192"]),
        ({"patternProperties": {"(" * 5000 + ")" * 5000: {}}}, ["pattern", "4096"]),
        (nested(65), ["64 schemas deep"]),
    ],
)
def test_others_are_refused(schema, words):
    with pytest.raises(VLLMValidationError) as caught:
        check_json_schema(schema)
    assert caught.value.parameter == "structured_outputs"
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
