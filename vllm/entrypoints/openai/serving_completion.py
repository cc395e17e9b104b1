"""``/v1/completions``: prompts in any of OpenAI's forms to text."""

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vllm.entrypoints.openai.http import EventStream, JSONBytes, until_disconnect
from vllm.entrypoints.openai.logprobs import completion_logprobs
from vllm.entrypoints.openai.protocol import (
    CompletionLogProbs,
    CompletionRequest,
    CompletionResponse,
    CompletionResponseChoice,
    UsageInfo,
)
from vllm.entrypoints.openai.serving_engine import (
    OpenAIServing,
    TokenNames,
    breathe,
    merge_outputs,
    prompt_logprobs_json,
)
from vllm.entrypoints.openai.streaming import ChunkWriter
from vllm.errors import VLLMValidationError
from vllm.logprobs import PromptLogprobs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import TokenizedPrompt

__all__ = ["OpenAIServingCompletion"]

# Each costs some ten kilobytes here until the last one's answer.
_MAX_PROMPTS = 65_536


@dataclass(slots=True, kw_only=True)
class _Job:
    """One request on its way: what its answer is made from."""

    request: CompletionRequest
    response_id: str
    model: str
    created: int
    names: TokenNames
    prompts: list[TokenizedPrompt]
    params: list[SamplingParams]
    echo_texts: list[str]
    """Per prompt what is echoed before its choices; empty without ``echo``."""

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)


@dataclass(slots=True)
class _StreamState:
    """What a stream remembers of one choice."""

    begun: bool = False
    num_chars: int = 0
    num_tokens: int = 0


@dataclass(slots=True)
class _Streams:
    states: dict[int, _StreamState] = field(default_factory=dict)
    cached_tokens: dict[int, int] = field(default_factory=dict)
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)
    kv_transfer_params: dict[str, Any] | None = None

    @property
    def num_output_tokens(self) -> int:
        return sum(state.num_tokens for state in self.states.values())


def split_prompts(prompt: object) -> Sequence[str | list[int]]:
    """The prompts of a request: a string or a list of ids is one, a list of either several.

    Raises:
        VLLMValidationError: there is none, or there are too many.
    """
    if isinstance(prompt, str):
        return [prompt]
    assert isinstance(prompt, list)
    if not prompt:
        raise VLLMValidationError("prompt must not be empty", parameter="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) > _MAX_PROMPTS:
        raise VLLMValidationError(
            f"prompt holds {len(prompt)} prompts, and a request takes at most {_MAX_PROMPTS}; "
            "send several requests",
            parameter="prompt",
        )
    return prompt


def _check_transfer(params: dict[str, Any] | None, num_prompts: int) -> None:
    """
    Raises:
        VLLMValidationError: KV of one prompt is meant for several.
    """
    asked = params and (params.get("do_remote_prefill") or params.get("do_remote_decode"))
    if asked and num_prompts > 1:
        raise VLLMValidationError(
            f"kv_transfer_params belong to one prompt, and there are {num_prompts}: send each in a "
            "request of its own",
            parameter="kv_transfer_params",
        )


class OpenAIServingCompletion(OpenAIServing):
    async def create_completion(self, request: CompletionRequest, raw: Request) -> Response:
        """Answer a request, as a stream or whole; raises what the HTTP edge turns into errors."""
        job = await self._prepare(request, raw)
        if request.stream:
            return EventStream(self._stream(job))
        return await until_disconnect(raw, self._respond(job))

    async def _prepare(self, request: CompletionRequest, raw: Request) -> _Job:
        model = self.context.models.check(request.model)
        request.check()
        prompts: list[TokenizedPrompt] = []
        for index, prompt in enumerate(split_prompts(request.prompt)):
            await breathe(index)
            if isinstance(prompt, str):
                tokenized = await self.encode(
                    prompt,
                    request.add_special_tokens,
                    limited=request.truncate_prompt_tokens is None,
                )
            else:
                tokenized = TokenizedPrompt(prompt, None, None)
            prompts.append(self.truncate(tokenized, request))
        _check_transfer(request.kv_transfer_params, len(prompts))
        constraint = request.constraint()
        params = []
        for index, tokenized in enumerate(prompts):
            await breathe(index)
            max_tokens = (
                1 if request.echoes_only else self.max_tokens(request, len(tokenized.token_ids))
            )
            params.append(
                request.sampling_params(
                    max_tokens=max_tokens,
                    defaults=dict(self.default_sampling_params),
                    constraint=constraint,
                )
            )
        if request.echo and request.logprobs is not None:
            for each in params:
                each.prompt_logprobs = max(request.logprobs, request.prompt_logprobs or 0)
        return _Job(
            request=request,
            response_id=self.request_id("cmpl", raw, request.request_id),
            model=model,
            created=int(time.time()),
            names=self.token_names(request),
            prompts=prompts,
            params=params,
            echo_texts=[self.prompt_text(prompt) for prompt in prompts] if request.echo else [],
        )

    def _outputs(self, job: _Job) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        single = len(job.prompts) == 1
        return merge_outputs(
            [
                self.generate(
                    prompt,
                    params,
                    job.response_id if single else f"{job.response_id}-{i}",
                    job.request,
                )
                for i, (prompt, params) in enumerate(zip(job.prompts, job.params, strict=True))
            ]
        )

    # Whole answers

    async def _respond(self, job: _Job) -> Response:
        finals = {i: output async for i, output in self._outputs(job)}
        choices = []
        num_output_tokens = 0
        num_cached_tokens = 0
        for i in range(len(job.prompts)):
            final = finals[i]
            num_cached_tokens += final.num_cached_tokens or 0
            for output in final.outputs:
                choice = self._choice(job, i, output, final.prompt_logprobs)
                self.log_output(job.response_id, choice.text)
                choices.append(choice)
                num_output_tokens += 0 if job.request.echoes_only else len(output.token_ids)
        response = CompletionResponse(
            id=job.response_id,
            created=job.created,
            model=job.model,
            choices=choices,
            system_fingerprint=self.system_fingerprint,
            usage=self.usage(job.num_prompt_tokens, num_output_tokens, num_cached_tokens),
        )
        if finals[0].kv_transfer_params is not None:
            response.kv_transfer_params = finals[0].kv_transfer_params
        return JSONBytes(response)

    def _choice(
        self,
        job: _Job,
        prompt_index: int,
        output: CompletionOutput,
        prompt_logprobs: PromptLogprobs | None,
    ) -> CompletionResponseChoice:
        request = job.request
        text, logprobs = self._shown(job, prompt_index, output, prompt_logprobs, echo=True)
        choice = CompletionResponseChoice(
            index=prompt_index * request.num_choices + output.index,
            text=text,
            logprobs=None if logprobs is None else CompletionLogProbs(**logprobs),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        if request.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs_json(prompt_logprobs)
        if request.return_token_ids:
            choice.token_ids = [] if request.echoes_only else output.token_ids
            choice.prompt_token_ids = job.prompts[prompt_index].token_ids
        return choice

    def _shown(
        self,
        job: _Job,
        prompt_index: int,
        output: CompletionOutput,
        prompt_logprobs: PromptLogprobs | None,
        *,
        echo: bool,
        first_offset: int = 0,
    ) -> tuple[str, dict[str, list[Any]] | None]:
        """Text and log-probabilities to show for ``output``, after the prompt's with ``echo``."""
        request = job.request
        text = "" if request.echoes_only else output.text
        token_ids: list[int] = [] if request.echoes_only else output.token_ids
        positions: PromptLogprobs = [*(output.logprobs or ())][: len(token_ids)]
        token_text: dict[int, str] = {}
        if echo and request.echo:
            text = job.echo_texts[prompt_index] + text
            if request.logprobs is not None and prompt_logprobs:
                prompt_ids = job.prompts[prompt_index].token_ids
                token_text = {prompt_ids[0]: self._token_text(prompt_ids[0])}
                token_ids = prompt_ids + token_ids
                positions = [*prompt_logprobs, *positions]
        if request.logprobs is None:
            return text, None
        return text, completion_logprobs(token_ids, positions, job.names, first_offset, token_text)

    def _token_text(self, token_id: int) -> str:
        tokenizer = self.engine.get_tokenizer()
        return "" if tokenizer is None else tokenizer.decode([token_id])

    # Streams

    async def _stream(self, job: _Job) -> AsyncGenerator[bytes, None]:
        request = job.request
        options = request.stream_options
        per_chunk = bool(options and options.continuous_usage_stats)
        at_end = bool(options and options.include_usage)
        at_end = at_end or self.frontend.enable_force_include_usage
        writer = ChunkWriter(
            kind="text_completion",
            response_id=job.response_id,
            created=job.created,
            model=job.model,
            fingerprint=self.system_fingerprint,
        )
        streams = _Streams()
        num_choices, echoes_only = request.num_choices, request.echoes_only
        # The usual stream needs nothing but text until its last chunk.
        plain = not (
            request.echo
            or request.logprobs is not None
            or request.return_token_ids
            or per_chunk
            or self.frontend.enable_log_outputs
        )
        async for i, result in self._outputs(job):
            streams.cached_tokens[i] = result.num_cached_tokens or 0
            streams.kv_transfer_params = result.kv_transfer_params or streams.kv_transfer_params
            if result.prompt_logprobs:
                streams.prompt_logprobs[i] = result.prompt_logprobs
            for output in result.outputs:
                index = i * num_choices + output.index
                state = streams.states.get(index)
                if state is None:
                    state = streams.states[index] = _StreamState()
                state.num_tokens += 0 if echoes_only else len(output.token_ids)
                if plain and output.finish_reason is None:
                    if output.text:
                        yield writer.text(index, output.text)
                    continue
                event = self._event(job, writer, streams, state, i, output, per_chunk)
                if event is not None:
                    yield event
        if at_end:
            yield writer.usage(self._stream_usage(job, streams))

    def _stream_usage(self, job: _Job, streams: _Streams) -> UsageInfo:
        return self.usage(
            job.num_prompt_tokens, streams.num_output_tokens, sum(streams.cached_tokens.values())
        )

    def _event(
        self,
        job: _Job,
        writer: ChunkWriter,
        streams: _Streams,
        state: _StreamState,
        prompt_index: int,
        output: CompletionOutput,
        with_usage: bool,
    ) -> bytes | None:
        """The chunk for ``output``; None where there is nothing to show yet."""
        request = job.request
        prompt_logprobs = streams.prompt_logprobs.get(prompt_index)
        first = not state.begun
        text, logprobs = self._shown(
            job,
            prompt_index,
            output,
            prompt_logprobs,
            echo=first,
            first_offset=state.num_chars,
        )
        if not (text or output.token_ids or output.finish_reason):
            return None
        state.begun = True
        state.num_chars += len(text)
        self.log_output(job.response_id, text, is_delta=True)
        fields: dict[str, Any] = {
            "index": prompt_index * request.num_choices + output.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if request.return_token_ids:
            fields["token_ids"] = [] if request.echoes_only else output.token_ids
            if first:
                fields["prompt_token_ids"] = job.prompts[prompt_index].token_ids
        extra = None
        if output.finish_reason is not None and streams.kv_transfer_params is not None:
            extra = {"kv_transfer_params": streams.kv_transfer_params}
        usage = self._stream_usage(job, streams) if with_usage else None
        return writer.choice(fields, usage=usage, extra=extra)
