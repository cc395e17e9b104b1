"""Grammars by xgrammar. The library is imported when the first request needs it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xgrammar as xgr

from vllm.errors import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.backend_types import (
    StructuredOutputBackend,
    StructuredOutputGrammar,
)
from vllm.v1.structured_output.json_schema import check_json_schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["XgrammarBackend", "XgrammarGrammar"]

# The threads that call us are several.
_COMPILE_THREADS = 1
_COMPILED_CACHE_BYTES = 256 << 20
# A small model may otherwise put out blanks until max_tokens; this leaves room to indent.
_MAX_WHITESPACE = 32
# Time and memory grow with the square of the length.
_MAX_CHARACTERS = 256 * 1024
# "[12:00:00] /path/file.cc:123: " before the compiler's own words.
_SOURCE_PREFIX = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
_LARK_JSON = re.compile(r"%json\s*")


class XgrammarGrammar(StructuredOutputGrammar):
    __slots__ = ("matcher",)

    def __init__(self, compiled: xgr.CompiledGrammar, stop_token_ids: Sequence[int]) -> None:
        self.matcher = xgr.GrammarMatcher(
            compiled, override_stop_tokens=list(stop_token_ids) or None
        )

    def accept_tokens(self, tokens: Sequence[int]) -> bool:
        for count, token in enumerate(tokens):
            if self.matcher.is_terminated() or not self.matcher.accept_token(token):
                if count:
                    self.matcher.rollback(count)
                return False
        return True

    def is_terminated(self) -> bool:
        return self.matcher.is_terminated()

    def rollback(self, num_tokens: int) -> None:
        self.matcher.rollback(num_tokens)


class XgrammarBackend(StructuredOutputBackend):
    """xgrammar for one tokenizer.

    Args:
        tokenizer: the model's; its vocabulary is read once.
        vocab_size: columns of the logits.
        disable_any_whitespace: JSON without optional whitespace, for every request.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        disable_any_whitespace: bool = False,
    ) -> None:
        info = xgr.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
        self._compiler = xgr.GrammarCompiler(
            info, max_threads=_COMPILE_THREADS, cache_limit_bytes=_COMPILED_CACHE_BYTES
        )
        self._vocab_size = vocab_size
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._own_stop_ids = tuple(info.stop_token_ids)
        self._disable_any_whitespace = disable_any_whitespace

    def compile(
        self, params: StructuredOutputsParams, stop_token_ids: Sequence[int]
    ) -> XgrammarGrammar:
        compiled = self._compile(params)
        # An ordinary token that the user stops at may be needed inside the output.
        special = {token for token in stop_token_ids if token in self._special_ids}
        grammar = XgrammarGrammar(compiled, sorted(special | set(self._own_stop_ids)))
        # The first mask may take long, too, and shows grammars such as ``root ::= root``.
        bitmask = np.zeros((1, -(-self._vocab_size // 32)), dtype=np.int32)
        self.fill_bitmask([grammar], bitmask)
        if not bitmask.any():
            raise VLLMValidationError(
                "structured_outputs: nothing can fulfil this constraint, not even an empty output",
                parameter="structured_outputs",
            )
        return grammar

    def fill_bitmask(
        self, grammars: Sequence[StructuredOutputGrammar], bitmask: np.ndarray
    ) -> None:
        for index, grammar in enumerate(grammars):
            assert isinstance(grammar, XgrammarGrammar)
            grammar.matcher.fill_next_token_bitmask(bitmask, index)

    def _compile(self, params: StructuredOutputsParams) -> xgr.CompiledGrammar:
        compiler = self._compiler
        if params.json is not None:
            schema = _parse_json("json", params.json)
            check_json_schema(schema)
            return self._compile_schema("json", schema, params)
        if params.json_object:
            return self._compile_schema("json_object", {"type": "object"}, params)
        if params.regex is not None:
            regex = _bounded("regex", params.regex)
            return _compiled("regex", lambda: compiler.compile_regex(regex))
        if params.choice is not None:
            rule = "root ::= " + " | ".join(_ebnf_literal(text) for text in params.choice)
            _bounded("choice", rule)
            return _compiled("choice", lambda: compiler.compile_grammar(rule))
        if params.grammar is not None:
            grammar = _bounded("grammar", params.grammar)
            return _compiled("grammar", lambda: self._compile_grammar(grammar))
        if params.structural_tag is not None:
            return self._compile_structural_tag(params.structural_tag)
        raise VLLMValidationError(
            "structured_outputs is empty: give json, json_object, regex, choice, grammar or "
            "structural_tag",
            parameter="structured_outputs",
        )

    def _compile_schema(
        self, field: str, schema: Any, params: StructuredOutputsParams
    ) -> xgr.CompiledGrammar:
        any_whitespace = not (params.disable_any_whitespace or self._disable_any_whitespace)
        return _compiled(
            field,
            lambda: self._compiler.compile_json_schema(
                _bounded(field, json.dumps(schema)),
                any_whitespace=any_whitespace,
                max_whitespace_cnt=_MAX_WHITESPACE if any_whitespace else None,
            ),
        )

    def _compile_grammar(self, grammar: str) -> xgr.CompiledGrammar:
        # EBNF and GBNF define rules with "::=", Lark with ":".
        if "::=" in grammar:
            return self._compiler.compile_grammar(grammar)
        _check_schemas_in_lark(grammar)
        return self._compiler.compile_lark(grammar)

    def _compile_structural_tag(self, text: str) -> xgr.CompiledGrammar:
        tag = _parse_json("structural_tag", _bounded("structural_tag", text))
        if isinstance(tag, dict) and "structures" in tag:
            tag = _modern_structural_tag(tag)
        _check_schemas_inside(tag)
        return _compiled("structural_tag", lambda: self._compiler.compile_structural_tag(tag))


def _compiled(field: str, compile_it: Callable[[], xgr.CompiledGrammar]) -> xgr.CompiledGrammar:
    """Call ``compile_it``; what xgrammar objects to is the client's to correct."""
    try:
        return compile_it()
    except VLLMValidationError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(_SOURCE_PREFIX.sub("", str(error)).split())
        raise VLLMValidationError(
            f"structured_outputs.{field} cannot be compiled: {reason[:300]}",
            parameter="structured_outputs",
        ) from error


def _bounded(field: str, text: str) -> str:
    if len(text) > _MAX_CHARACTERS:
        raise VLLMValidationError(
            f"structured_outputs.{field} is too large: it may have at most {_MAX_CHARACTERS} "
            f"characters, and this one has {len(text)}",
            parameter="structured_outputs",
        )
    return text


def _parse_json(field: str, value: str | dict[str, Any]) -> Any:
    """JSON text as what it stands for; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise VLLMValidationError(
            f"structured_outputs.{field} is not valid JSON: {error}",
            parameter="structured_outputs",
        ) from error


def _check_schemas_inside(node: Any) -> None:
    """Check every JSON schema that a structural tag holds."""
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        elif isinstance(node, dict):
            if "json_schema" in node:
                check_json_schema(node["json_schema"], "structured_outputs.structural_tag")
            if isinstance(node.get("grammar"), str):
                _check_schemas_in_lark(node["grammar"])
            stack.extend(value for key, value in node.items() if key != "json_schema")


def _check_schemas_in_lark(grammar: str) -> None:
    """Check every JSON schema that a Lark grammar holds, as ``%json {...}``."""
    decoder = json.JSONDecoder(strict=False)
    for found in _LARK_JSON.finditer(grammar):
        try:
            schema, _ = decoder.raw_decode(grammar, found.end())
        except (ValueError, RecursionError) as error:
            raise VLLMValidationError(
                f"structured_outputs.grammar: %json must stand before a JSON schema: {error}",
                parameter="structured_outputs",
            ) from error
        check_json_schema(schema, "structured_outputs.grammar")


def _ebnf_literal(text: str) -> str:
    escapes = {
        "\\": "\\\\",
        '"': '\\"',
        "\n": "\\n",
        "\r": "\\r",
        "\t": "\\t",
        "\0": "\\u0000",
    }
    return '"' + "".join(escapes.get(char, char) for char in text) + '"'


def _modern_structural_tag(tag: dict[str, Any]) -> dict[str, Any]:
    """The older form, ``structures`` and ``triggers``, in the words of the present one."""
    structures = tag["structures"]
    if not isinstance(structures, list) or not all(isinstance(each, dict) for each in structures):
        raise VLLMValidationError(
            "structured_outputs.structural_tag: structures must be a list of objects",
            parameter="structured_outputs",
        )
    return {
        "type": "structural_tag",
        "format": {
            "type": "triggered_tags",
            "triggers": tag.get("triggers", []),
            "tags": [
                {
                    "begin": structure.get("begin", ""),
                    "content": {
                        "type": "json_schema",
                        "json_schema": structure.get("schema", structure.get("json_schema", {})),
                    },
                    "end": structure.get("end", ""),
                }
                for structure in structures
            ],
        },
    }
