"""Which JSON schemas the grammar compiler can keep to in full.

xgrammar leaves out what it cannot express and goes on; an output would then break the schema
unnoticed. Such schemas are refused here, with the place and the keyword. Pure; no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.errors import VLLMValidationError

__all__ = ["check_json_schema"]

_NOT_EXPRESSIBLE = (
    "$dynamicRef",
    "contains",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "else",
    "if",
    "maxContains",
    "minContains",
    "not",
    "then",
    "unevaluatedItems",
)
_NUMBER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_STRING = ("minLength", "maxLength", "pattern", "format")
_ARRAY = ("items", "prefixItems", "minItems", "maxItems", "additionalItems")
_OBJECT = (
    "properties",
    "required",
    "additionalProperties",
    "patternProperties",
    "propertyNames",
    "minProperties",
    "maxProperties",
    "unevaluatedProperties",
)
_CONSTRAINTS = frozenset((*_NUMBER, *_STRING, *_ARRAY, *_OBJECT))
# Of two of these in one schema only one would count; all of them rule out other constraints.
_WHOLE = ("$ref", "allOf", "anyOf", "oneOf", "enum", "const")
_PAIRS = (
    ("pattern", "format"),
    ("pattern", "minLength"),
    ("pattern", "maxLength"),
    ("format", "minLength"),
    ("format", "maxLength"),
    ("propertyNames", "properties"),
    *(("multipleOf", name) for name in _NUMBER[:4]),
)


# The compiler's time grows faster than the square of the depth: 300 levels take it 15 seconds.
_MAX_LEVELS = 64
# It follows a pattern by recursion, and one of 100,000 brackets or quantifiers ends the process.
_MAX_PATTERN = 4096
# Larger divisors it leaves out.
_MAX_DIVISOR = 1024


def check_json_schema(schema: Any, where: str = "structured_outputs.json") -> None:
    """Refuse a schema that the output could break.

    ``oneOf`` counts as ``anyOf`` where its branches overlap.

    Args:
        where: the field that the schema comes from, for the message.

    Raises:
        VLLMValidationError: naming the place in the schema, and what to leave out.
    """
    stack = [(schema, "#", 0)]
    while stack:
        node, path, level = stack.pop()
        if level > _MAX_LEVELS:
            raise VLLMValidationError(
                f"{where} is nested more than {_MAX_LEVELS} schemas deep; make it flatter, or let "
                "it refer to itself with $ref",
                parameter="structured_outputs",
            )
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            raise VLLMValidationError(
                f"{where} at {path} must be a JSON schema, an object or a boolean, not "
                f"{type(node).__name__}",
                parameter="structured_outputs",
            )
        problem = _problem(node)
        if problem is not None:
            raise VLLMValidationError(
                f"{where} at {path}: {problem}", parameter="structured_outputs"
            )
        stack.extend((child, at, level + 1) for child, at in _subschemas(node, path))


def _problem(node: dict[str, Any]) -> str | None:
    """What in this schema, apart from its subschemas, an output could break; None for nothing."""
    for keyword in _NOT_EXPRESSIBLE:
        if keyword in node:
            return f"{keyword} cannot be enforced; leave it out"
    if node.get("uniqueItems"):
        return "uniqueItems cannot be enforced; leave it out"
    reference = node.get("$ref")
    if reference is not None and not str(reference).startswith("#"):
        return f"$ref {reference!r} is not inside the schema; copy it under $defs"
    if isinstance(node.get("allOf"), list) and len(node["allOf"]) > 1:
        return "allOf of several schemas cannot be enforced; merge them into one"
    whole = [keyword for keyword in _WHOLE if keyword in node]
    beside = sorted(_CONSTRAINTS.intersection(node))
    if whole and (len(whole) > 1 or beside):
        both = (*whole, *beside)
        return f"{both[0]} and {both[1]} in one schema cannot be enforced together; merge them"
    for first, second in _PAIRS:
        if first in node and second in node:
            return f"{first} and {second} cannot be enforced together; leave one out"
    kinds = node.get("type")
    if "multipleOf" in node:
        divisor = node["multipleOf"]
        if kinds != "integer" or type(divisor) is not int or not 0 < divisor <= _MAX_DIVISOR:
            return (
                'multipleOf can be enforced for "type": "integer" only, and for whole numbers from '
                f"1 to {_MAX_DIVISOR}"
            )
    longest = max(map(len, _patterns(node)), default=0)
    if longest > _MAX_PATTERN:
        return f"a pattern may have at most {_MAX_PATTERN} characters, and this has {longest}"
    if kinds is None:
        needs_type = sorted(set(beside) & {*_NUMBER, *_STRING, "minItems", "maxItems"})
        if needs_type:
            return f'{needs_type[0]} needs a "type" beside it'
    return None


def _patterns(node: dict[str, Any]) -> Iterator[str]:
    if isinstance(node.get("pattern"), str):
        yield node["pattern"]
    if isinstance(node.get("patternProperties"), dict):
        yield from node["patternProperties"]


def _subschemas(node: dict[str, Any], path: str) -> Iterator[tuple[Any, str]]:
    for keyword in ("properties", "patternProperties", "$defs", "definitions"):
        children = node.get(keyword)
        if isinstance(children, dict):
            for name, child in children.items():
                yield child, f"{path}/{keyword}/{name}"
    for keyword in ("anyOf", "oneOf", "allOf", "prefixItems"):
        children = node.get(keyword)
        if isinstance(children, list):
            for index, child in enumerate(children):
                yield child, f"{path}/{keyword}/{index}"
    for keyword in ("items", "additionalProperties", "unevaluatedProperties", "propertyNames"):
        if keyword in node:
            yield node[keyword], f"{path}/{keyword}"
