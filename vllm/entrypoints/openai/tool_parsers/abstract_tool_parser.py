"""What a tool parser is.

The interface is vLLM's, so that a plug-in file written for it loads here. Parsers of this package
derive from ``ScanningToolParser``: one scanner serves whole answers and streams, so both give the
same calls. Knows nothing of HTTP.
"""

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vllm.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
    random_uuid,
)
from vllm.entrypoints.openai.tool_parsers.manager import ToolParserManager
from vllm.entrypoints.openai.tool_parsers.scanners import (
    CallArguments,
    CallStart,
    Piece,
    Scanner,
    Text,
)

__all__ = ["ScanningToolParser", "ToolParser", "ToolParserManager", "make_tool_call_id"]


def make_tool_call_id() -> str:
    return f"chatcmpl-tool-{random_uuid()}"


class ToolParser:
    """Finds tool calls in what the model writes; one object per sequence of a stream."""

    def __init__(self, tokenizer: Any) -> None:
        self.model_tokenizer = tokenizer
        # What a plug-in has found and shown so far; ``finish_streaming`` sends the rest.
        self.prev_tool_call_arr: list[dict[str, Any]] = []
        self.current_tool_id = -1
        self.current_tool_name_sent = False
        self.streamed_args_for_tool: list[str] = []

    @property
    def vocab(self) -> dict[str, int]:
        return self.model_tokenizer.get_vocab()

    def adjust_request(self, request: ChatCompletionRequest) -> ChatCompletionRequest:
        """The request, changed so that the calls can be read, say with special tokens kept."""
        return request

    @abstractmethod
    def extract_tool_calls(
        self, model_output: str, request: ChatCompletionRequest
    ) -> ExtractedToolCallInformation:
        """Calls and remaining text of a whole answer."""

    @abstractmethod
    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: ChatCompletionRequest,
    ) -> DeltaMessage | None:
        """What to send for ``delta_text``; None: nothing yet."""

    def finish_streaming(self) -> DeltaMessage | None:
        """What is left to send when the model has ended."""
        calls = []
        for index, call in enumerate(self.prev_tool_call_arr[: len(self.streamed_args_for_tool)]):
            arguments = call.get("arguments", {})
            whole = (
                arguments
                if isinstance(arguments, str)
                else json.dumps(arguments, ensure_ascii=False)
            )
            sent = self.streamed_args_for_tool[index]
            if len(whole) > len(sent) and whole.startswith(sent):
                rest = DeltaFunctionCall(arguments=whole[len(sent) :])
                calls.append(DeltaToolCall(index=index, function=rest))
        return DeltaMessage(tool_calls=calls) if calls else None


class ScanningToolParser(ToolParser):
    """A parser that is a scanner: text in, pieces of text and calls out."""

    keeps_special_tokens = False
    """The marks of a call are special tokens, which the detokeniser must not drop."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._scanner: Scanner | None = None
        self._num_calls = 0

    @abstractmethod
    def make_scanner(self, request: ChatCompletionRequest) -> Scanner:
        """A fresh scanner for one answer."""

    def make_id(self) -> str:
        return make_tool_call_id()

    def adjust_request(self, request: ChatCompletionRequest) -> ChatCompletionRequest:
        if self.keeps_special_tokens and request.tools and request.tool_choice != "none":
            request.skip_special_tokens = False
        return request

    def extract_tool_calls(
        self, model_output: str, request: ChatCompletionRequest
    ) -> ExtractedToolCallInformation:
        scanner = self.make_scanner(request)
        pieces = [*scanner.feed(model_output), *scanner.finish()]
        text, calls = collect(pieces, self.make_id)
        return ExtractedToolCallInformation(
            tools_called=bool(calls), tool_calls=calls, content=None if calls and not text else text
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: ChatCompletionRequest,
    ) -> DeltaMessage | None:
        if self._scanner is None:
            self._scanner = self.make_scanner(request)
        return self._delta(self._scanner.feed(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        return None if self._scanner is None else self._delta(self._scanner.finish())

    def _delta(self, pieces: Iterable[Piece]) -> DeltaMessage | None:
        message, self._num_calls = to_delta(pieces, self._num_calls, self.make_id)
        return message


def collect(pieces: Iterable[Piece], make_id: Callable[[], str]) -> tuple[str, list[ToolCall]]:
    """The text and the calls that ``pieces`` make up."""
    text: list[str] = []
    calls: list[ToolCall] = []
    for piece in pieces:
        if isinstance(piece, Text):
            text.append(piece.text)
        elif isinstance(piece, CallStart):
            function = FunctionCall(name=piece.name, arguments="")
            calls.append(ToolCall(id=make_id(), function=function))
        elif isinstance(piece, CallArguments):
            calls[-1].function.arguments += piece.text
    return "".join(text), calls


def to_delta(
    pieces: Iterable[Piece], num_calls: int, make_id: Callable[[], str]
) -> tuple[DeltaMessage | None, int]:
    """``pieces`` as one message of a stream in which ``num_calls`` calls have begun before.

    Returns the message (None if there is nothing to send) and the new number of calls.
    """
    content = ""
    calls: dict[int, DeltaToolCall] = {}
    for piece in pieces:
        if isinstance(piece, Text):
            content += piece.text
        elif isinstance(piece, CallStart):
            num_calls += 1
            calls[num_calls - 1] = DeltaToolCall(
                id=make_id(),
                type="function",
                index=num_calls - 1,
                function=DeltaFunctionCall(name=piece.name, arguments=""),
            )
        elif piece.text:
            index = num_calls - 1
            call = calls.setdefault(
                index, DeltaToolCall(index=index, function=DeltaFunctionCall(arguments=""))
            )
            assert call.function is not None
            call.function.arguments = (call.function.arguments or "") + piece.text
    if not content and not calls:
        return None, num_calls
    return DeltaMessage(content=content or None, tool_calls=list(calls.values())), num_calls
