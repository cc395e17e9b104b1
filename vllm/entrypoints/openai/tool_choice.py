"""What ``tool_choice`` means for one request: a constraint, and how calls are read.

Owns the JSON schemas that force calls and the choice of the reader. Knows nothing of the form of
answers or of HTTP.
"""

from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.openai.protocol import (
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionRequest,
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    FunctionCall,
    FunctionDefinition,
    ToolCall,
)
from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import (
    ToolParser,
    collect,
    make_tool_call_id,
    to_delta,
)
from vllm.entrypoints.openai.tool_parsers.scanners import JSONCallList
from vllm.errors import VLLMValidationError
from vllm.outputs import CompletionOutput
from vllm.reasoning.abs_reasoning_parsers import ReasoningParser
from vllm.sampling_params import StructuredOutputsParams

__all__ = ["AnswerReader", "tool_constraint"]

_ANY_ARGUMENTS = {"type": "object", "properties": {}}


def _with_definitions_on_top(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """``schema`` without its ``$defs``, which go to ``definitions``: references are absolute."""
    own = schema.get("$defs")
    if not own:
        return schema
    for name, value in own.items():
        if definitions.setdefault(name, value) != value:
            raise VLLMValidationError(
                f"tools: two functions define {name!r} in their $defs, and differently",
                parameter="tools",
            )
    return {key: value for key, value in schema.items() if key != "$defs"}


def tool_constraint(request: ChatCompletionRequest) -> StructuredOutputsParams | None:
    """The constraint that forces the calls asked for; None where the model is free.

    Raises:
        VLLMValidationError: the request constrains its output in another way, too.
    """
    choice = request.tool_choice
    if choice in ("none", "auto", None) or not request.tools:
        return None
    if request.constraint() is not None:
        raise VLLMValidationError(
            "tool_choice required (or a named function) fixes the output's form; leave "
            "response_format and structured_outputs out",
            parameter="tool_choice",
        )
    functions = {tool.function.name: tool.function for tool in request.tools}
    if isinstance(choice, ChatCompletionNamedToolChoiceParam):
        named = functions[choice.function.name].parameters
        return StructuredOutputsParams(json=named or _ANY_ARGUMENTS, disable_any_whitespace=True)
    definitions: dict[str, Any] = {}
    calls = [_call_schema(function, definitions) for function in functions.values()]
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
    }
    if request.parallel_tool_calls is False:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return StructuredOutputsParams(json=schema, disable_any_whitespace=True)


def _call_schema(function: FunctionDefinition, definitions: dict[str, Any]) -> dict[str, Any]:
    parameters = _with_definitions_on_top(function.parameters or _ANY_ARGUMENTS, definitions)
    return {
        "type": "object",
        "properties": {
            "name": {"type": "string", "enum": [function.name]},
            "parameters": parameters,
        },
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


class AnswerReader:
    """Reads one choice's text, whole or in pieces, as reasoning, content and tool calls.

    Args:
        parser: the model's parser, with ``tool_choice`` auto; None leaves the text as it is,
            unless the request forces calls.
        reasoning: the model's parser of reasoning; None: there is none.
    """

    def __init__(
        self,
        request: ChatCompletionRequest,
        parser: ToolParser | None,
        reasoning: ReasoningParser | None = None,
    ) -> None:
        self._request = request
        self._parser = parser
        self._reasoning = reasoning
        self._whole = ""
        self._whole_ids: list[int] = []
        choice = request.tool_choice if request.tools else "none"
        self._named = (
            choice.function.name if isinstance(choice, ChatCompletionNamedToolChoiceParam) else None
        )
        self._limit = 1 if request.parallel_tool_calls is False else None
        self._list = JSONCallList(self._limit) if choice == "required" else None
        self._num_calls = 0
        self._named_sent = False
        self._text = ""
        self._token_ids: list[int] = []

    @property
    def is_plain(self) -> bool:
        """Text is content, nothing else."""
        readers = (self._parser, self._named, self._list, self._reasoning)
        return all(reader is None for reader in readers)

    @property
    def ends_with_calls(self) -> bool:
        """The finish reason is "tool_calls": the model chose to call, in whole or in part."""
        return self._num_calls > 0 and self._named is None

    @property
    def has_calls(self) -> bool:
        """Whether the answer calls a tool, chosen by the model or by the request."""
        return self._num_calls > 0 or self._named is not None

    def read(self, text: str) -> tuple[str | None, str | None, list[ToolCall]]:
        """Reasoning, content and calls of a whole answer."""
        reasoning: str | None = None
        if self._reasoning is not None:
            reasoning, rest = self._reasoning.extract_reasoning(text, self._request)
            if not self._request.include_reasoning:
                reasoning = None
            if rest is None:
                return reasoning, None, []
            text = rest
        return reasoning, *self._read_answer(text)

    def _read_answer(self, text: str) -> tuple[str | None, list[ToolCall]]:
        if self._named is not None:
            function = FunctionCall(name=self._named, arguments=text)
            return None, [ToolCall(id=make_tool_call_id(), function=function)]
        if self._list is not None:
            _, calls = collect(self._list.feed(text), make_tool_call_id)
            content = None if calls else text
        elif self._parser is not None:
            found = self._parser.extract_tool_calls(text, self._request)
            calls, content = found.tool_calls[: self._limit], found.content
        else:
            calls, content = [], text
        self._num_calls = len(calls)
        return content, calls

    def deltas(self, output: CompletionOutput) -> list[DeltaMessage | None]:
        """What to send for a piece of a stream: the first may be None, nothing yet; a second is
        what was held back until the end.
        """
        found = [self.push(output.text, output.token_ids)]
        if output.finish_reason is not None:
            rest = self.finish()
            if rest is not None:
                found.append(rest)
        return found

    def push(self, text: str, token_ids: Sequence[int]) -> DeltaMessage | None:
        """What to send for the next piece of the answer; None: nothing yet."""
        if self._reasoning is None:
            return self._push_answer(text, token_ids)
        before, ids_before = self._whole, self._whole_ids
        self._whole = before + text
        self._whole_ids = [*ids_before, *token_ids]
        split = self._reasoning.extract_reasoning_streaming(
            before, self._whole, text, ids_before, self._whole_ids, token_ids
        )
        return self._push_split(split, token_ids)

    def _push_split(
        self, split: DeltaMessage | None, token_ids: Sequence[int]
    ) -> DeltaMessage | None:
        """``split`` with its content read on."""
        if split is None:
            return None
        answer = self._push_answer(split.content, token_ids) if split.content else None
        if not split.reasoning or not self._request.include_reasoning:
            return answer
        answer = answer or DeltaMessage()
        answer.reasoning = split.reasoning
        return answer

    def _push_answer(self, text: str, token_ids: Sequence[int]) -> DeltaMessage | None:
        if self._named is not None:
            return self._push_named(text)
        if self._list is not None:
            delta, self._num_calls = to_delta(
                self._list.feed(text), self._num_calls, make_tool_call_id
            )
            return delta
        if self._parser is None:
            return DeltaMessage(content=text) if text else None
        before, ids_before = self._text, self._token_ids
        self._text = before + text
        self._token_ids = [*ids_before, *token_ids]
        return self._limited(
            self._parser.extract_tool_calls_streaming(
                before, self._text, text, ids_before, self._token_ids, token_ids, self._request
            )
        )

    def finish(self) -> DeltaMessage | None:
        """What is left to send at the end."""
        rest: DeltaMessage | None = None
        if self._reasoning is not None:
            rest = self._push_split(self._reasoning.finish_streaming(), ())
        last = None if self._parser is None else self._limited(self._parser.finish_streaming())
        if rest is None or last is None:
            return rest or last
        rest.content = (rest.content or "") + (last.content or "") or None
        rest.tool_calls += last.tool_calls
        return rest

    def _push_named(self, text: str) -> DeltaMessage | None:
        assert self._named is not None
        if self._named_sent and not text:
            return None
        function = DeltaFunctionCall(arguments=text)
        call = DeltaToolCall(index=0, function=function)
        if not self._named_sent:
            self._named_sent = True
            function.name, call.id, call.type = self._named, make_tool_call_id(), "function"
        return DeltaMessage(tool_calls=[call])

    def _limited(self, delta: DeltaMessage | None) -> DeltaMessage | None:
        """``delta`` without calls that ``parallel_tool_calls`` off does not allow."""
        if delta is None:
            return None
        if self._limit is not None:
            delta.tool_calls = [call for call in delta.tool_calls if call.index < self._limit]
        for call in delta.tool_calls:
            self._num_calls = max(self._num_calls, call.index + 1)
        return delta if delta.content or delta.tool_calls else None
