"""Reasoning between tags, such as ``<think>`` and ``</think>``, before the answer."""

import json
from typing import Any

from vllm.entrypoints.openai.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.tool_parsers.scanners import held_back
from vllm.reasoning.abs_reasoning_parsers import ScanningReasoningParser
from vllm.sampling_params import StructuredOutputsParams

__all__ = ["DeepSeekR1ReasoningParser", "MistralReasoningParser", "ThinkTagReasoningParser"]

# As for JSON without reasoning: a small model may else write blanks until max_tokens.
_MAX_WHITESPACE = 32


class ThinkTagReasoningParser(ScanningReasoningParser):
    """Qwen3, DeepSeek V3.1, Nemotron: whether the model thinks is up to the prompt and to it.

    A prompt that ends with the start tag has begun the reasoning, one that ends with the end tag
    has ended it; else an answer that begins with the start tag begins with reasoning. Blanks
    round the reasoning, and line breaks before the answer, belong to neither.
    """

    start_token = "<think>"
    end_token = "</think>"
    thinks_without_start = False
    """Whether an answer begins inside the reasoning though no start tag says so."""

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        # "start": nothing but blanks yet; "inside": reasoning; "after": content.
        self._state = "start"
        self._held = ""
        self._begun = False

    def adjust_request(self, request: ChatCompletionRequest) -> ChatCompletionRequest:
        special = getattr(self.model_tokenizer, "all_special_tokens", ())
        if self.start_token in special or self.end_token in special:
            request.skip_special_tokens = False
        return request

    def begin(self, prompt: str) -> None:
        end = prompt.rstrip()
        if end.endswith(self.start_token):
            self._state = "inside"
        elif end.endswith(self.end_token):
            self._state = "after"

    def constraint_after(
        self, constraint: StructuredOutputsParams
    ) -> StructuredOutputsParams | None:
        form = _as_format(constraint)
        if self._state == "after":
            return constraint
        if form is None:
            # The client's grammar may have the tags in it.
            inside = self._state == "inside" or self.thinks_without_start
            return None if inside else constraint
        begin = self.start_token
        if self._state == "inside" or self.thinks_without_start:
            begin = ""
        reasoning = {
            "type": "tag",
            "begin": begin,
            "content": {"type": "any_text"},
            "end": self.end_token,
        }
        return StructuredOutputsParams(
            structural_tag=json.dumps(
                {
                    "type": "structural_tag",
                    "format": {"type": "sequence", "elements": [reasoning, form]},
                }
            )
        )

    def feed(self, text: str) -> tuple[str, str]:
        self._held += text
        reasoning = ""
        if self._state == "start" and not self._leave_start():
            return "", ""
        if self._state == "inside":
            before, tag, after = self._held.partition(self.end_token)
            if not tag:
                return self._inside(), ""
            reasoning = before.rstrip() if self._begun else before.strip()
            self._held, self._state, self._begun = after, "after", False
        return reasoning, self._after()

    def finish(self) -> tuple[str, str]:
        rest, self._held = self._held, ""
        if self._state == "inside":
            return (rest.rstrip() if self._begun else rest.strip()), ""
        return "", rest if self._state == "start" else rest.lstrip("\n")

    def _leave_start(self) -> bool:
        """Whether it is known now if the answer begins with reasoning."""
        text = self._held.lstrip()
        if text.startswith(self.start_token):
            self._held = text[len(self.start_token) :]
            self._state = "inside"
        elif self.start_token.startswith(text):
            return False
        else:
            self._state = "inside" if self.thinks_without_start else "after"
            self._begun = not self.thinks_without_start
        return True

    def _inside(self) -> str:
        """The reasoning that is certain: no part of the end tag, no blanks that may end it."""
        text = self._held if self._begun else self._held.lstrip()
        certain = text[: len(text) - held_back(text, self.end_token)].rstrip()
        self._held = text[len(certain) :]
        self._begun = self._begun or bool(certain)
        return certain

    def _after(self) -> str:
        text = self._held if self._begun else self._held.lstrip("\n")
        self._held = ""
        self._begun = self._begun or bool(text)
        return text


class DeepSeekR1ReasoningParser(ThinkTagReasoningParser):
    """DeepSeek R1 and its like, which always think, whether or not the start tag is written."""

    thinks_without_start = True


class MistralReasoningParser(ThinkTagReasoningParser):
    start_token = "[THINK]"
    end_token = "[/THINK]"


def _as_format(constraint: StructuredOutputsParams) -> dict[str, Any] | None:
    """``constraint`` as a part of a structural tag; None where it is none that can be a part."""
    if constraint.json is not None or constraint.json_object:
        schema = {"type": "object"} if constraint.json is None else constraint.json
        return {
            "type": "json_schema",
            "json_schema": json.loads(schema) if isinstance(schema, str) else schema,
            "max_whitespace_cnt": _MAX_WHITESPACE,
        }
    if constraint.regex is not None:
        return {"type": "regex", "pattern": constraint.regex}
    if constraint.choice is not None:
        texts = [{"type": "const_string", "value": text} for text in constraint.choice]
        return texts[0] if len(texts) == 1 else {"type": "or", "elements": texts}
    if constraint.grammar is not None and "::=" in constraint.grammar:
        return {"type": "grammar", "grammar": constraint.grammar}
    return None
