"""Grammars by xgrammar. The library is imported when the first request needs it."""

from __future__ import annotations

import json
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["XgrammarBackend", "XgrammarGrammar"]

_COMPILE_THREADS = 2
_COMPILED_CACHE_BYTES = 256 << 20
# From here on a batched fill on several threads is quicker than one row after the other.
_BATCHED_FILL_FROM = 4


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
    """Args:
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
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._own_stop_ids = tuple(info.stop_token_ids)
        self._disable_any_whitespace = disable_any_whitespace
        self._batch = xgr.BatchGrammarMatcher(max_threads=_COMPILE_THREADS)

    def compile(
        self, params: StructuredOutputsParams, stop_token_ids: Sequence[int]
    ) -> XgrammarGrammar:
        compiled = self._compile(params)
        # An ordinary token that the user stops at may be needed inside the output.
        special = {token for token in stop_token_ids if token in self._special_ids}
        return XgrammarGrammar(compiled, sorted(special | set(self._own_stop_ids)))

    def fill_bitmask(
        self, grammars: Sequence[StructuredOutputGrammar], bitmask: np.ndarray
    ) -> None:
        matchers = [grammar.matcher for grammar in grammars if isinstance(grammar, XgrammarGrammar)]
        assert len(matchers) == len(grammars)
        if len(matchers) >= _BATCHED_FILL_FROM:
            self._batch.batch_fill_next_token_bitmask(matchers, bitmask)
            return
        for index, matcher in enumerate(matchers):
            matcher.fill_next_token_bitmask(bitmask, index)

    def _compile(self, params: StructuredOutputsParams) -> xgr.CompiledGrammar:
        compiler = self._compiler
        any_whitespace = not (params.disable_any_whitespace or self._disable_any_whitespace)
        if params.json is not None:
            schema = _json_text("json", params.json)
            return _compiled(
                "json",
                lambda: compiler.compile_json_schema(schema, any_whitespace=any_whitespace),
            )
        if params.json_object:
            return _compiled(
                "json_object",
                lambda: compiler.compile_json_schema(
                    '{"type": "object"}', any_whitespace=any_whitespace
                ),
            )
        if params.regex is not None:
            regex = params.regex
            return _compiled("regex", lambda: compiler.compile_regex(regex))
        if params.choice is not None:
            rule = "root ::= " + " | ".join(_ebnf_literal(text) for text in params.choice)
            return _compiled("choice", lambda: compiler.compile_grammar(rule))
        if params.grammar is not None:
            return _compiled("grammar", lambda: self._compile_grammar(params.grammar or ""))
        if params.structural_tag is not None:
            return self._compile_structural_tag(params.structural_tag)
        raise VLLMValidationError(
            "structured_outputs is empty: give json, json_object, regex, choice, grammar or "
            "structural_tag",
            parameter="structured_outputs",
        )

    def _compile_grammar(self, grammar: str) -> xgr.CompiledGrammar:
        # EBNF and GBNF define rules with "::=", Lark with ":".
        if "::=" in grammar:
            return self._compiler.compile_grammar(grammar)
        return self._compiler.compile_lark(grammar)

    def _compile_structural_tag(self, text: str) -> xgr.CompiledGrammar:
        tag = json.loads(_json_text("structural_tag", text))
        if isinstance(tag, dict) and "structures" in tag:
            tag = _modern_structural_tag(tag)
        return _compiled("structural_tag", lambda: self._compiler.compile_structural_tag(tag))


def _compiled(field: str, compile_it: Callable[[], xgr.CompiledGrammar]) -> xgr.CompiledGrammar:
    """Call ``compile_it``; what xgrammar objects to is the client's to correct."""
    try:
        return compile_it()
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise VLLMValidationError(
            f"structured_outputs.{field} cannot be compiled: {reason[:500]}",
            parameter="structured_outputs",
        ) from error


def _json_text(field: str, value: str | dict[str, Any]) -> str:
    """``value`` as JSON text, checked to be JSON."""
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        json.loads(value)
    except ValueError as error:
        raise VLLMValidationError(
            f"structured_outputs.{field} is not valid JSON: {error}",
            parameter="structured_outputs",
        ) from error
    return value


def _ebnf_literal(text: str) -> str:
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(char, char) for char in text) + '"'


def _modern_structural_tag(tag: dict[str, Any]) -> dict[str, Any]:
    """The older form, ``structures`` and ``triggers``, in the words of the present one."""
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
                for structure in tag["structures"]
            ],
        },
    }
