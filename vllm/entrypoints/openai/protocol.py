"""Requests of the HTTP API, in OpenAI's form with vLLM's further fields; the door to its answers.

Owns names, types and defaults, and how a request becomes ``SamplingParams``. Knows nothing of
tokenizers, chat templates or the engine. Types are strict: the string "1" is no number.
"""

import re
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

import msgspec
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from vllm.entrypoints.openai.answers import (
    ChatCompletionLogProb,
    ChatCompletionLogProbs,
    ChatCompletionLogProbsContent,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatMessage,
    CompletionLogProbs,
    CompletionResponse,
    CompletionResponseChoice,
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    DetokenizeResponse,
    ExtractedToolCallInformation,
    FunctionCall,
    ModelCard,
    ModelList,
    ModelPermission,
    PromptLogprobsJson,
    PromptTokenUsageInfo,
    TokenizeResponse,
    ToolCall,
    UsageInfo,
    random_uuid,
)
from vllm.entrypoints.openai.errors import ErrorInfo, ErrorResponse
from vllm.errors import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

__all__ = [
    "ChatCompletionLogProb",
    "ChatCompletionLogProbs",
    "ChatCompletionLogProbsContent",
    "ChatCompletionNamedToolChoiceParam",
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "ChatCompletionResponseChoice",
    "ChatCompletionToolsParam",
    "ChatMessage",
    "CompletionLogProbs",
    "CompletionRequest",
    "CompletionResponse",
    "CompletionResponseChoice",
    "DeltaFunctionCall",
    "DeltaMessage",
    "DeltaToolCall",
    "DetokenizeRequest",
    "DetokenizeResponse",
    "ErrorInfo",
    "ErrorResponse",
    "ExtractedToolCallInformation",
    "FunctionCall",
    "FunctionDefinition",
    "ModelCard",
    "ModelList",
    "ModelPermission",
    "PromptLogprobsJson",
    "PromptTokenUsageInfo",
    "ResponseFormat",
    "StreamOptions",
    "StructuredOutputsRequest",
    "TokenizeChatRequest",
    "TokenizeCompletionRequest",
    "TokenizeResponse",
    "ToolCall",
    "UsageInfo",
    "random_uuid",
]


# It goes into headers and logs.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")


def _described(expected: str) -> WrapValidator:
    """One message for a field of several types, instead of one for each of them."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError(
                "type", "must be {expected}", {"expected": expected}
            ) from None

    return WrapValidator(validate)


_PROMPT_FORMS = "a string, a list of strings, a list of token ids or a list of such lists"


def _are(values: list[Any], kind: type) -> bool:
    return set(map(type, values)) <= {kind}


def _check_prompt(value: Any, _handler: ValidatorFunctionWrapHandler) -> Any:
    """By hand, as pydantic tries each form on each of what may be millions of token ids."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and (
        _are(value, int)
        or _are(value, str)
        or (_are(value, list) and all(_are(ids, int) for ids in value))
    ):
        return value
    raise PydanticCustomError("type", "must be {expected}", {"expected": _PROMPT_FORMS})


def _check_bias(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, dict) and not set(map(type, value.values())) <= {int, float}:
        raise PydanticCustomError(
            "type", "must be {expected}", {"expected": "an object from token ids to numbers"}
        )
    return handler(value)


# The first wrong item is enough: millions of errors would hold everybody up for minutes.
_FIRST = Field(fail_fast=True)
_Ids = Annotated[list[int], _FIRST]
_Texts = Annotated[list[str], _FIRST]
_Objects = Annotated[list[dict[str, Any]], _FIRST]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True
    )


# --- Parts of requests ---------------------------------------------------------------------


class StreamOptions(_Strict):
    include_usage: bool | None = None
    """End the stream with a chunk that carries the usage."""
    continuous_usage_stats: bool | None = None
    """Put the usage so far into every chunk."""


class JsonSchemaFormat(_Strict):
    name: str
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """``structures`` and ``triggers``, or ``format``, belong to ``structural_tag``."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: _Objects | None = None
    triggers: _Texts | None = None
    format: dict[str, Any] | None = None

    def constraint(self) -> StructuredOutputsParams | None:
        """The constraint that this format means.

        Raises:
            VLLMValidationError: ``json_schema`` is missing, or given with another type.
        """
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise VLLMValidationError(
                "response_format: json_schema goes with type json_schema, and only with it",
                parameter="response_format",
            )
        tag = {
            name: value
            for name in ("structures", "triggers", "format")
            if (value := getattr(self, name)) is not None
        }
        if (self.type == "structural_tag") != bool(tag):
            raise VLLMValidationError(
                "response_format: format (or structures and triggers) go with type "
                "structural_tag, and only with it",
                parameter="response_format",
            )
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.type == "structural_tag":
            value = msgspec.json.encode({"type": "structural_tag", **tag}).decode()
            return StructuredOutputsParams(structural_tag=value)
        if self.json_schema is None:
            return None
        schema = self.json_schema.json_schema
        if not isinstance(schema, dict):
            raise VLLMValidationError(
                "response_format.json_schema.schema must be a JSON object",
                parameter="response_format",
            )
        return StructuredOutputsParams(json=schema)


class StructuredOutputsRequest(_Strict):
    json_: Annotated[str | dict[str, Any] | None, _described("a JSON schema")] = Field(
        default=None, alias="json"
    )
    regex: str | None = None
    choice: _Texts | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def constraint(self) -> StructuredOutputsParams | None:
        """The constraint asked for; None where every kind of it is left out.

        Raises:
            VLLMValidationError: more than one kind is given.
        """
        kinds: dict[str, Any] = {
            "json": self.json_,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
            "json_object": self.json_object or None,
            "structural_tag": self.structural_tag,
        }
        given = [name for name, value in kinds.items() if value is not None]
        if not given:
            return None
        if len(given) > 1:
            raise VLLMValidationError(
                f"structured_outputs takes one of {', '.join(kinds)}; {' and '.join(given)} "
                "are given",
                parameter="structured_outputs",
            )
        return StructuredOutputsParams(
            **kinds,
            disable_any_whitespace=self.disable_any_whitespace,
            whitespace_pattern=self.whitespace_pattern,
        )


class FunctionDefinition(_Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatCompletionToolsParam(_Strict):
    type: Literal["function"] = "function"
    function: FunctionDefinition


class ChatCompletionNamedFunction(_Strict):
    name: str


class ChatCompletionNamedToolChoiceParam(_Strict):
    type: Literal["function"] = "function"
    function: ChatCompletionNamedFunction


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | ChatCompletionNamedToolChoiceParam | None,
    _described('"none", "auto", "required" or {"type": "function", "function": {"name": NAME}}'),
]
Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    WrapValidator(_check_prompt),
]
Stop = Annotated[str | _Texts | None, _described("a string or a list of strings")]
LogitBias = Annotated[
    dict[str, float] | None,
    _described("an object from token ids to numbers"),
    WrapValidator(_check_bias),
]


# --- Requests --------------------------------------------------------------------------------


class _SamplingRequest(_Strict, ABC):
    """What completions and chat have in common. None means: the model's default."""

    model: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    logit_bias: LogitBias = None
    n: int | None = None
    seed: int | None = None
    stop: Stop = None
    stop_token_ids: _Ids | None = None
    bad_words: _Texts | None = None
    allowed_token_ids: _Ids | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    """Keep so many tokens of the prompt; -1: as many as the model takes."""
    truncation_side: Literal["left", "right"] | None = None
    """Where tokens go away; None: left."""
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsRequest | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: int | None = None
    user: str | None = None
    priority: int = 0
    request_id: str | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @abstractmethod
    def max_output_tokens(self) -> int | None:
        """The limit that the request sets, if it sets one."""

    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Top log-probabilities to compute at each generated position; None: none at all."""

    def constraint(self) -> StructuredOutputsParams | None:
        """The constraint of ``response_format`` or ``structured_outputs``.

        Raises:
            VLLMValidationError: both are given.
        """
        by_format = self.response_format.constraint() if self.response_format else None
        direct = self.structured_outputs.constraint() if self.structured_outputs else None
        if by_format is not None and direct is not None:
            raise VLLMValidationError(
                "response_format and structured_outputs exclude each other",
                parameter="structured_outputs",
            )
        return by_format or direct

    def check(self) -> None:
        """Refuse combinations of fields that cannot work.

        Raises:
            VLLMValidationError: naming the field.
        """
        if self.stream_options is not None and not self.stream:
            raise VLLMValidationError(
                "stream_options needs stream=true", parameter="stream_options"
            )
        if self.stream and self.prompt_logprobs is not None:
            raise VLLMValidationError(
                "prompt_logprobs needs stream=false", parameter="prompt_logprobs"
            )
        if self.cache_salt == "":
            raise VLLMValidationError("cache_salt must not be empty", parameter="cache_salt")
        if self.request_id is not None and not _REQUEST_ID.fullmatch(self.request_id):
            raise VLLMValidationError(
                "request_id must have 1 to 256 printable ASCII characters, none of them a space",
                parameter="request_id",
            )
        if self.n is not None and self.n < 1:
            raise VLLMValidationError(f"n must be at least 1, not {self.n}", parameter="n")
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens < -1:
            raise VLLMValidationError(
                f"truncate_prompt_tokens must be -1 or more, not {self.truncate_prompt_tokens}",
                parameter="truncate_prompt_tokens",
            )

    def _token_bias(self) -> dict[int, float] | None:
        if not self.logit_bias:
            return None
        bias = {}
        for token, value in self.logit_bias.items():
            # The length, because Python refuses to make a number of thousands of digits.
            if not token.isascii() or not token.isdigit() or len(token) > 18:
                raise VLLMValidationError(
                    f"logit_bias: keys must be token ids, not {token[:40]!r}",
                    parameter="logit_bias",
                )
            bias[int(token)] = value
        return bias

    def sampling_params(
        self,
        *,
        max_tokens: int | None,
        defaults: dict[str, Any],
        constraint: StructuredOutputsParams | None,
    ) -> SamplingParams:
        """This request as the engine takes it.

        Args:
            max_tokens: the limit worked out from request and model.
            defaults: the model's own defaults, by name of the parameter.
            constraint: the constraint on the output, if there is one.

        Raises:
            VLLMValidationError: a parameter is out of its range.
        """
        given = {
            name: value
            for name in (
                "frequency_penalty",
                "presence_penalty",
                "repetition_penalty",
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "n",
                "min_tokens",
            )
            if (value := getattr(self, name)) is not None
        }
        return SamplingParams(
            **{name: value for name, value in defaults.items() if name != "max_tokens"} | given,
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            bad_words=self.bad_words,
            ignore_eos=self.ignore_eos,
            max_tokens=max_tokens,
            logprobs=self.num_logprobs(),
            prompt_logprobs=self.prompt_logprobs,
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
            output_kind=(RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY),
            structured_outputs=constraint,
            logit_bias=self._token_bias(),
            allowed_token_ids=self.allowed_token_ids,
            extra_args=self.vllm_xargs,
            stream_interval=self.stream_interval,
        )


class CompletionRequest(_SamplingRequest):
    prompt: Prompt
    echo: bool | None = False
    logprobs: int | None = None
    max_tokens: int | None = 16
    add_special_tokens: bool = True

    def max_output_tokens(self) -> int | None:
        return self.max_tokens

    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def echoes_only(self) -> bool:
        """The prompt is scored and nothing generated."""
        return bool(self.echo) and self.max_tokens == 0


class ChatCompletionRequest(_SamplingRequest):
    messages: _Objects
    logprobs: bool | None = False
    top_logprobs: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    tools: Annotated[list[ChatCompletionToolsParam], _FIRST] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = True
    reasoning_effort: str | None = None
    echo: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: _Objects | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_prompt_text: bool | None = None
    include_reasoning: bool = True

    def max_output_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise VLLMValidationError("top_logprobs needs logprobs=true", parameter="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            if "add_generation_prompt" in self.model_fields_set:
                raise VLLMValidationError(
                    "continue_final_message and add_generation_prompt exclude each other",
                    parameter="continue_final_message",
                )
            self.add_generation_prompt = False
        self._check_tools()

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise VLLMValidationError("tools: two functions share a name", parameter="tools")
        if self.tool_choice is None:
            self.tool_choice = "auto" if names else "none"
            return
        if self.tool_choice != "none" and not names:
            raise VLLMValidationError("tool_choice needs tools", parameter="tool_choice")
        if not isinstance(self.tool_choice, str) and self.tool_choice.function.name not in names:
            raise VLLMValidationError(
                f"tool_choice: no tool named {self.tool_choice.function.name!r}; there "
                f"{'is' if len(names) == 1 else 'are'} {', '.join(names)}",
                parameter="tool_choice",
            )


class TokenizeCompletionRequest(_Strict):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(_Strict):
    model: str | None = None
    messages: _Objects
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[ChatCompletionToolsParam], _FIRST] | None = None


class DetokenizeRequest(_Strict):
    model: str | None = None
    tokens: _Ids
