"""``/v1/chat/completions``: messages to an answer, with tools and structured output."""

import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vllm.entrypoints.openai.chat_prompts import ChatPrompts
from vllm.entrypoints.openai.http import EventStream, JSONBytes, until_disconnect
from vllm.entrypoints.openai.logprobs import chat_logprobs
from vllm.entrypoints.openai.protocol import (
    ChatCompletionLogProbs,
    ChatCompletionLogProbsContent,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatMessage,
    DeltaMessage,
    UsageInfo,
)
from vllm.entrypoints.openai.serving_engine import (
    OpenAIServing,
    ServerContext,
    TokenNames,
    prompt_logprobs_json,
)
from vllm.entrypoints.openai.streaming import ChunkWriter, delta_fields
from vllm.entrypoints.openai.tool_choice import AnswerReader, tool_constraint
from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import ToolParser
from vllm.entrypoints.openai.tool_parsers.manager import ToolParserManager
from vllm.errors import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.reasoning.abs_reasoning_parsers import ReasoningParser
from vllm.reasoning.manager import ReasoningParserManager
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import TokenizedPrompt

__all__ = ["ChatJob", "OpenAIServingChat"]


@dataclass(slots=True, kw_only=True)
class ChatJob:
    """One request on its way: what its answer is made from."""

    request: ChatCompletionRequest
    response_id: str
    model: str
    created: int
    names: TokenNames
    prompt: TokenizedPrompt
    params: SamplingParams
    role: str
    echo_text: str
    make_reader: Callable[[], AnswerReader]

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.request.logprobs)


@dataclass(slots=True)
class _StreamState:
    """What a stream remembers of all its choices."""

    readers: dict[int, AnswerReader] = field(default_factory=dict)
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    kv_transfer_params: dict[str, Any] | None = None


class OpenAIServingChat(OpenAIServing):
    def __init__(self, context: ServerContext, prompts: ChatPrompts) -> None:
        super().__init__(context)
        self._prompts = prompts
        self._parser: type[ToolParser] | None = None
        if self.frontend.tool_call_parser:
            self._parser = ToolParserManager.get_tool_parser(self.frontend.tool_call_parser)
        self._reasoning: type[ReasoningParser] | None = None
        model_type = getattr(self.engine.model_config.hf_config, "model_type", "")
        reasoning = self.frontend.reasoning_parser or ReasoningParserManager.default_for(model_type)
        if reasoning:
            self._reasoning = ReasoningParserManager.get_reasoning_parser(reasoning)

    async def create_chat_completion(
        self, request: ChatCompletionRequest, raw: Request
    ) -> Response:
        """Answer a request, as a stream or whole; raises what the HTTP edge turns into errors."""
        job = await self.prepare(request, raw)
        if request.stream:
            return EventStream(self._stream(job))
        return await until_disconnect(raw, self._respond(job))

    async def prepare(
        self, request: ChatCompletionRequest, raw: Request, prefix: str = "chatcmpl"
    ) -> ChatJob:
        """Check the request, render and encode its prompt; ``prefix`` begins the answer's id."""
        model = self.context.models.check(request.model)
        request.check()
        make_parser = self._tool_parser_for(request)
        messages, text = self._prompts.render(request)
        limited = request.truncate_prompt_tokens is None
        prompt = await self.encode(text, request.add_special_tokens, limited=limited)
        prompt = self.truncate(prompt, request)
        constraint = tool_constraint(request) or request.constraint()
        make_reasoning = self._reasoning_parser_for(request, text)
        if make_reasoning is not None and constraint is not None:
            after = make_reasoning().constraint_after(constraint)
            # Otherwise the constraint holds from the first token on, so there is no reasoning.
            constraint, make_reasoning = (
                (constraint, None) if after is None else (after, make_reasoning)
            )
        params = request.sampling_params(
            max_tokens=self.max_tokens(request, len(prompt.token_ids)),
            defaults=dict(self.default_sampling_params),
            constraint=constraint,
        )
        last = messages[-1]
        role = self.frontend.response_role if request.add_generation_prompt else last["role"]
        return ChatJob(
            request=request,
            response_id=self.request_id(prefix, raw, request.request_id),
            model=model,
            created=int(time.time()),
            names=self.token_names(request),
            prompt=TokenizedPrompt(prompt.token_ids, text, None),
            params=params,
            role=role,
            echo_text=_echo_text(last) if request.echo and last["role"] == role else "",
            make_reader=lambda: AnswerReader(
                request, make_parser and make_parser(), make_reasoning and make_reasoning()
            ),
        )

    async def count_prompt_tokens(self, request: ChatCompletionRequest) -> int:
        """Tokens of the prompt that ``request`` becomes, however long it is."""
        self.context.models.check(request.model)
        request.check()
        _, text = self._prompts.render(request)
        prompt = await self.encode(text, request.add_special_tokens, limited=False)
        return len(prompt.token_ids)

    def _tool_parser_for(self, request: ChatCompletionRequest) -> Callable[[], ToolParser] | None:
        """A maker of parsers, one per choice; may change the request as its parser needs."""
        if not request.tools or request.tool_choice != "auto":
            return None
        parser = self._parser
        if not self.frontend.enable_auto_tool_choice or parser is None:
            raise VLLMValidationError(
                "tool_choice auto needs a server started with --enable-auto-tool-choice and "
                "--tool-call-parser; required, none or a named function work as it is",
                parameter="tool_choice",
            )
        tokenizer = self.engine.get_tokenizer()
        adjusted = parser(tokenizer).adjust_request(request)
        request.skip_special_tokens = adjusted.skip_special_tokens
        request.structured_outputs = adjusted.structured_outputs
        return lambda: parser(tokenizer)

    def _reasoning_parser_for(
        self, request: ChatCompletionRequest, prompt: str
    ) -> Callable[[], ReasoningParser] | None:
        """As ``_tool_parser_for``; None, too, where the model goes on with a message."""
        parser = self._reasoning
        if parser is None or request.continue_final_message:
            return None
        tokenizer = self.engine.get_tokenizer()
        adjusted = parser(tokenizer).adjust_request(request)
        request.skip_special_tokens = adjusted.skip_special_tokens

        def make() -> ReasoningParser:
            reasoning = parser(tokenizer)
            reasoning.begin(prompt)
            return reasoning

        return make

    def outputs(self, job: ChatJob) -> AsyncGenerator[RequestOutput, None]:
        """What the engine gives for ``job``, piece by piece."""
        return self.generate(job.prompt, job.params, job.response_id, job.request)

    # Whole answers

    async def last_output(self, job: ChatJob) -> RequestOutput:
        """The whole answer to ``job``, once it is complete."""
        final: RequestOutput | None = None
        async for output in self.outputs(job):
            final = output
        assert final is not None, "the engine gives a last output, or raises"
        return final

    async def _respond(self, job: ChatJob) -> Response:
        final = await self.last_output(job)
        choices = [self._choice(job, output) for output in final.outputs]
        response = ChatCompletionResponse(
            id=job.response_id,
            created=job.created,
            model=job.model,
            choices=choices,
            system_fingerprint=self.system_fingerprint,
            usage=self.usage(
                len(job.prompt.token_ids),
                sum(len(output.token_ids) for output in final.outputs),
                final.num_cached_tokens,
            ),
        )
        if job.request.prompt_logprobs is not None:
            response.prompt_logprobs = prompt_logprobs_json(final.prompt_logprobs)
        if job.request.return_token_ids:
            response.prompt_token_ids = job.prompt.token_ids
        if job.request.return_prompt_text:
            response.prompt_text = job.prompt.text
        if final.kv_transfer_params is not None:
            response.kv_transfer_params = final.kv_transfer_params
        return JSONBytes(response)

    def _choice(self, job: ChatJob, output: CompletionOutput) -> ChatCompletionResponseChoice:
        reader = job.make_reader()
        reasoning, content, calls = reader.read(output.text)
        self.log_output(job.response_id, output.text)
        if job.echo_text:
            content = job.echo_text + (content or "")
        message = ChatMessage(role=job.role, content=content)
        if reasoning is not None:
            message.reasoning = reasoning
        if calls:
            message.tool_calls = calls
        choice = ChatCompletionResponseChoice(
            index=output.index,
            message=message,
            logprobs=None,
            finish_reason=_finish_reason(reader, output.finish_reason),
            stop_reason=output.stop_reason,
        )
        if job.wants_logprobs:
            choice.logprobs = ChatCompletionLogProbs(
                content=[
                    ChatCompletionLogProbsContent(**entry)
                    for entry in self._logprobs(job, output)["content"]
                ]
            )
        if job.request.return_token_ids:
            choice.token_ids = output.token_ids
        return choice

    def _logprobs(self, job: ChatJob, output: CompletionOutput) -> dict[str, Any]:
        num_top = job.request.top_logprobs or 0
        return {
            "content": chat_logprobs(output.token_ids, output.logprobs or [], num_top, job.names)
        }

    # Streams

    async def _stream(self, job: ChatJob) -> AsyncGenerator[bytes, None]:
        request = job.request
        options = request.stream_options
        per_chunk = bool(options and options.continuous_usage_stats)
        at_end = bool(options and options.include_usage)
        at_end = at_end or self.frontend.enable_force_include_usage
        writer = ChunkWriter(
            kind="chat.completion.chunk",
            response_id=job.response_id,
            created=job.created,
            model=job.model,
            fingerprint=self.system_fingerprint,
        )
        state = _StreamState()
        # The usual stream needs nothing but text until its last chunk.
        plain = job.make_reader().is_plain and not (
            request.logprobs
            or request.return_token_ids
            or per_chunk
            or self.frontend.enable_log_outputs
        )
        async for result in self.outputs(job):
            state.num_cached_tokens = result.num_cached_tokens or 0
            state.kv_transfer_params = result.kv_transfer_params or state.kv_transfer_params
            for output in result.outputs:
                if output.index not in state.readers:
                    state.readers[output.index] = job.make_reader()
                    for event in self._first_events(job, writer, state, output.index, per_chunk):
                        yield event
                state.num_output_tokens += len(output.token_ids)
                if plain and output.finish_reason is None:
                    if output.text:
                        yield writer.text(output.index, output.text)
                    continue
                usage = self._stream_usage(job, state) if per_chunk else None
                for event in self._events(job, writer, state, output, usage):
                    yield event
        if at_end:
            yield writer.usage(self._stream_usage(job, state))

    def _stream_usage(self, job: ChatJob, state: _StreamState) -> UsageInfo:
        return self.usage(
            len(job.prompt.token_ids), state.num_output_tokens, state.num_cached_tokens
        )

    def _first_events(
        self, job: ChatJob, writer: ChunkWriter, state: _StreamState, index: int, with_usage: bool
    ) -> list[bytes]:
        """The chunk with the role, and that with the echo."""
        usage = self._stream_usage(job, state) if with_usage else None
        extra: dict[str, Any] = {}
        if len(state.readers) == 1:
            if job.request.return_token_ids:
                extra["prompt_token_ids"] = job.prompt.token_ids
            if job.request.return_prompt_text:
                extra["prompt_text"] = job.prompt.text
        first = _chunk(index, {"role": job.role, "content": ""})
        events = [writer.choice(first, usage=usage, extra=extra)]
        if job.echo_text:
            events.append(writer.choice(_chunk(index, {"content": job.echo_text}), usage=usage))
        return events

    def _events(
        self,
        job: ChatJob,
        writer: ChunkWriter,
        state: _StreamState,
        output: CompletionOutput,
        usage: UsageInfo | None,
    ) -> list[bytes]:
        """The chunks for ``output``: one, or two where the parser has more to say at the end."""
        reader = state.readers[output.index]
        finished = output.finish_reason is not None
        self.log_output(job.response_id, output.text, is_delta=True)
        deltas = reader.deltas(output)
        events = []
        for i, delta in enumerate(deltas):
            last = i == len(deltas) - 1
            fields = self._fields(job, output, delta, with_tokens=i == 0)
            if finished and last:
                fields["finish_reason"] = _finish_reason(reader, output.finish_reason)
                fields["stop_reason"] = output.stop_reason
            elif delta is None and not (i == 0 and self._has_token_data(job, output)):
                continue
            extra = None
            if finished and last and state.kv_transfer_params is not None:
                extra = {"kv_transfer_params": state.kv_transfer_params}
            events.append(writer.choice(fields, usage=usage, extra=extra))
        return events

    def _has_token_data(self, job: ChatJob, output: CompletionOutput) -> bool:
        """Tokens whose ids or log-probabilities must be sent though they show no text."""
        wanted = job.wants_logprobs or bool(job.request.return_token_ids)
        return wanted and bool(output.token_ids)

    def _fields(
        self,
        job: ChatJob,
        output: CompletionOutput,
        delta: DeltaMessage | None,
        *,
        with_tokens: bool,
    ) -> dict[str, Any]:
        fields = _chunk(output.index, {} if delta is None else delta_fields(delta))
        if with_tokens and job.wants_logprobs and output.token_ids:
            fields["logprobs"] = self._logprobs(job, output)
        if with_tokens and job.request.return_token_ids:
            fields["token_ids"] = output.token_ids
        return fields


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _finish_reason(reader: AnswerReader, finish_reason: str | None) -> str | None:
    return "tool_calls" if finish_reason == "stop" and reader.ends_with_calls else finish_reason


def _echo_text(message: dict[str, Any]) -> str:
    """The last message's text, which ``echo`` puts before the answer."""
    content = message["content"]
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content
