"""gpt-oss: messages to channels, of which ``analysis`` is the reasoning.

An answer is a sequence of ``<|channel|>NAME<|message|>TEXT<|end|>``, each but the first behind
``<|start|>assistant``. Calls, ``<|channel|>commentary to=functions.NAME ...<|message|>JSON``, are
passed on as content in that form, for the tool parser ``openai``.
"""

import re
from typing import Any

from vllm.entrypoints.openai.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.tool_parsers.scanners import held_back
from vllm.reasoning.abs_reasoning_parsers import ScanningReasoningParser
from vllm.sampling_params import StructuredOutputsParams

__all__ = ["CALL_BEGIN", "CALL_END", "GptOssReasoningParser"]

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")
_END = re.compile("|".join(map(re.escape, _ENDS)))
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=(functions\.[^\s<]+)")
CALL_BEGIN, CALL_END = "<|channel|>commentary to=", "<|call|>"


class GptOssReasoningParser(ScanningReasoningParser):
    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._held = ""
        # What the present message is: None before its text, else "reasoning", "content", "call".
        self._kind: str | None = None

    def adjust_request(self, request: ChatCompletionRequest) -> ChatCompletionRequest:
        request.skip_special_tokens = False
        return request

    def constraint_after(
        self, constraint: StructuredOutputsParams
    ) -> StructuredOutputsParams | None:
        # Text without a channel is content.
        return constraint

    def feed(self, text: str) -> tuple[str, str]:
        self._held += text
        reasoning: list[str] = []
        content: list[str] = []
        while self._held:
            if self._kind is None:
                if not self._read_header(content):
                    break
                continue
            found = _END.search(self._held)
            if found is None:
                safe = len(self._held) - max(held_back(self._held, end) for end in _ENDS)
            else:
                safe = found.start()
            part, self._held = self._held[:safe], self._held[safe:]
            (reasoning if self._kind == "reasoning" else content).append(part)
            if found is None:
                break
            self._end_message(found[0], content)
        return "".join(reasoning), "".join(content)

    def finish(self) -> tuple[str, str]:
        rest, self._held = self._held, ""
        if self._kind is None:
            # A header that was cut off says nothing.
            return "", "" if rest.startswith("<|") else rest
        return (rest, "") if self._kind == "reasoning" else ("", rest)

    def _read_header(self, content: list[str]) -> bool:
        """Take what stands before a message's text; False where it is not all there."""
        if not (self._held.startswith("<|") or self._held == "<"):
            # Text without a header.
            self._kind = "content"
            return True
        header, found, text = self._held.partition(_MESSAGE)
        if not found:
            return False
        self._held = text
        recipient = _RECIPIENT.search(header)
        channel = _CHANNEL.search(header)
        if recipient is not None:
            self._kind = "call"
            content.append(f"{CALL_BEGIN}{recipient[1]}{_MESSAGE}")
        else:
            analysis = channel is not None and channel[1] == "analysis"
            self._kind = "reasoning" if analysis else "content"
        return True

    def _end_message(self, end: str, content: list[str]) -> None:
        if self._kind == "call":
            content.append(CALL_END)
        self._kind = None
        if end not in ("<|start|>", "<|channel|>"):
            self._held = self._held[len(end) :]
