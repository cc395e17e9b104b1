"""What completions and chat share: the model's name, token ids, limits, and the way to the engine.

Owns the passage from a checked request to the engine's outputs. Knows nothing of the form of
answers.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

import vllm
from vllm.entrypoints.openai.cli_args import FrontendArgs
from vllm.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    PromptLogprobsJson,
    PromptTokenUsageInfo,
    UsageInfo,
    random_uuid,
)
from vllm.entrypoints.openai.serving_models import OpenAIServingModels
from vllm.errors import VLLMValidationError
from vllm.logger import init_logger
from vllm.logprobs import Logprob, PromptLogprobs
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import TokenizedPrompt

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = [
    "OpenAIServing",
    "ServerContext",
    "TokenNames",
    "breathe",
    "finite_logprob",
    "merge_outputs",
    "prompt_logprobs_json",
]

logger = init_logger(__name__)

# Longer texts are tokenised in a thread; a shorter one takes less time than the switch saves.
_LONG_TEXT = 16_384
# JSON has no infinity: a token that could not be sampled gets this.
_LOWEST_LOGPROB = -9999.0
_MAX_REQUEST_ID = 256
_PROMPTS_PER_TURN = 32


def finite_logprob(value: float) -> float:
    """``value`` as JSON can carry it."""
    return max(value, _LOWEST_LOGPROB)


@dataclass(slots=True, kw_only=True)
class ServerContext:
    """One server: its engine, its options, and the requests it is answering."""

    engine: AsyncLLM
    frontend: FrontendArgs
    models: OpenAIServingModels
    in_flight: set[str] = field(default_factory=set)
    """Ids under which the engine knows the requests being answered."""
    draining: bool = False
    """The server is ending: new requests are refused."""
    load: int = 0
    """Generating requests being answered, where --enable-server-load-tracking counts them."""

    @property
    def max_model_len(self) -> int:
        return self.engine.model_config.max_model_len


class TokenNames:
    """How tokens are named in log-probabilities: by their text, or as ``token_id:ID``."""

    def __init__(self, as_ids: bool) -> None:
        self._as_ids = as_ids

    def name(self, token_id: int, logprob: Logprob) -> str:
        if self._as_ids or logprob.decoded_token is None:
            return f"token_id:{token_id}"
        return logprob.decoded_token


async def breathe(index: int) -> None:
    """Let other requests have a turn now and then, in a loop over many prompts."""
    if index % _PROMPTS_PER_TURN == _PROMPTS_PER_TURN - 1:
        await asyncio.sleep(0)


async def merge_outputs(
    streams: Sequence[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Outputs of several requests as they come, each with the index of its stream.

    An error of one ends all; leaving early closes all.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for output in only:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[RequestOutput, None]) -> None:
        async with aclosing(stream):
            async for output in stream:
                queue.put_nowait((index, output))

    def on_end(index: int, task: asyncio.Task[None]) -> None:
        queue.put_nowait((index, None if task.cancelled() else task.exception()))

    tasks = []
    try:
        for index, stream in enumerate(streams):
            task = asyncio.create_task(pump(index, stream))
            task.add_done_callback(partial(on_end, index))
            tasks.append(task)
            await breathe(index)
        running = len(tasks)
        while running:
            index, item = await queue.get()
            if isinstance(item, RequestOutput):
                yield index, item
            elif item is None:
                running -= 1
            else:
                raise item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class OpenAIServing:
    """Base of the endpoints that generate."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context
        self.engine = context.engine
        self.frontend = context.frontend
        model_config = context.engine.model_config
        self.default_sampling_params: Mapping[str, Any] = model_config.get_diff_sampling_param()
        identity = f"{model_config.model_path}|{model_config.dtype_name}|{context.max_model_len}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        self.system_fingerprint = f"vllm-{vllm.__version__}-{digest}"

    # Names

    def request_id(self, prefix: str, request: Request, given: str | None) -> str:
        """The answer's id: from the X-Request-Id header, the request's own, or a new one."""
        header = request.headers.get("x-request-id", "")
        return f"{prefix}-{header[:_MAX_REQUEST_ID] or given or random_uuid()}"

    def token_names(self, request: CompletionRequest | ChatCompletionRequest) -> TokenNames:
        as_ids = request.return_tokens_as_token_ids
        return TokenNames(self.frontend.return_tokens_as_token_ids if as_ids is None else as_ids)

    # Prompts

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the vocabulary's longest token; without a tokenizer it does not matter."""
        tokenizer = self.engine.get_tokenizer()
        return 1 if tokenizer is None else max(map(len, tokenizer.get_vocab()))

    async def encode(
        self, text: str, add_special_tokens: bool, *, limited: bool = True
    ) -> TokenizedPrompt:
        """Token ids of ``text``.

        Args:
            limited: refuse, before the work is done, what cannot fit the model in any case.

        Raises:
            VLLMValidationError: so long that no tokenisation could fit the model.
        """
        if len(text) < _LONG_TEXT:
            return self.engine.tokenize(text, add_special_tokens=add_special_tokens)
        if limited and len(text) > self.context.max_model_len * self._longest_token:
            raise VLLMValidationError(
                f"the prompt's {len(text)} characters are more than {self.context.max_model_len} "
                "tokens (--max-model-len) can be; shorten it, or set truncate_prompt_tokens",
                parameter="prompt",
            )
        return await asyncio.to_thread(
            self.engine.tokenize, text, add_special_tokens=add_special_tokens
        )

    def truncate(
        self,
        prompt: TokenizedPrompt,
        request: CompletionRequest | ChatCompletionRequest,
    ) -> TokenizedPrompt:
        """``prompt`` cut to ``truncate_prompt_tokens``; -1 leaves room for the output asked for."""
        limit = request.truncate_prompt_tokens
        if limit is None:
            if request.truncation_side is not None:
                raise VLLMValidationError(
                    "truncation_side needs truncate_prompt_tokens", parameter="truncation_side"
                )
            return prompt
        longest = self.context.max_model_len
        if limit == -1:
            limit = max(1, longest - (request.max_output_tokens() or 1))
        if not 1 <= limit <= longest:
            raise VLLMValidationError(
                f"truncate_prompt_tokens must be -1, or between 1 and the model's {longest} "
                f"tokens (--max-model-len), not {limit}",
                parameter="truncate_prompt_tokens",
            )
        if len(prompt.token_ids) <= limit:
            return prompt
        right = request.truncation_side == "right"
        kept = prompt.token_ids[:limit] if right else prompt.token_ids[-limit:]
        return TokenizedPrompt(kept, None, prompt.cache_salt)

    def max_tokens(
        self, request: CompletionRequest | ChatCompletionRequest, num_prompt_tokens: int
    ) -> int:
        """How many tokens may be generated: as asked for, or as many as there is room for.

        Raises:
            VLLMValidationError: prompt and output do not fit the model together.
        """
        longest = self.context.max_model_len
        asked = request.max_output_tokens()
        room = longest - num_prompt_tokens
        if room < 1:
            raise VLLMValidationError(
                f"the prompt has {num_prompt_tokens} tokens, but prompt and output together may "
                f"have at most {longest} (--max-model-len); shorten it, or set "
                "truncate_prompt_tokens",
                parameter="messages" if isinstance(request, ChatCompletionRequest) else "prompt",
            )
        if asked is not None:
            name = getattr(request, "max_completion_tokens", None)
            name = "max_tokens" if name is None else "max_completion_tokens"
            if asked < 1:
                raise VLLMValidationError(
                    f"{name} must be a whole number of at least 1, not {asked}", parameter=name
                )
            if asked > room:
                raise VLLMValidationError(
                    f"{name} is {asked}, but of the model's {longest} tokens "
                    f"(--max-model-len) the prompt's {num_prompt_tokens} leave {room}",
                    parameter=name,
                )
            return asked
        default = self.default_sampling_params.get("max_tokens")
        return room if default is None else min(room, default)

    # Generation

    async def generate(
        self,
        prompt: TokenizedPrompt,
        params: SamplingParams,
        request_id: str,
        request: CompletionRequest | ChatCompletionRequest,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The engine's outputs for one prompt; errors as of ``AsyncLLM.generate``."""
        context = self.context
        if self.frontend.enable_log_requests:
            self._log_request(prompt, params, request_id)
        context.in_flight.add(request_id)
        stream = self.engine.generate(
            prompt,
            params,
            request_id,
            priority=request.priority,
            cache_salt=request.cache_salt,
            kv_transfer_params=request.kv_transfer_params,
        )
        try:
            async with aclosing(stream):
                async for output in stream:
                    yield output
        finally:
            context.in_flight.discard(request_id)

    def _log_request(
        self, prompt: TokenizedPrompt, params: SamplingParams, request_id: str
    ) -> None:
        limit = self.frontend.max_log_len
        logger.info(
            "Received request %s: prompt: %r, prompt_token_ids: %s, params: %s",
            request_id,
            None if prompt.text is None else prompt.text[:limit],
            prompt.token_ids[:limit],
            params,
        )

    def log_output(self, request_id: str, text: str, *, is_delta: bool = False) -> None:
        """Log an answer, or a piece of a stream, where the options ask for it."""
        if not self.frontend.enable_log_outputs:
            return
        if not is_delta or self.frontend.enable_log_deltas:
            kind = "delta" if is_delta else "output"
            logger.info("Request %s: %s: %r", request_id, kind, text[: self.frontend.max_log_len])

    # Parts of answers

    def usage(
        self, num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int | None
    ) -> UsageInfo:
        details = None
        if self.frontend.enable_prompt_tokens_details and num_cached_tokens is not None:
            details = PromptTokenUsageInfo(cached_tokens=num_cached_tokens)
        return UsageInfo(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_output_tokens,
            total_tokens=num_prompt_tokens + num_output_tokens,
            prompt_tokens_details=details,
        )

    def prompt_text(self, prompt: TokenizedPrompt) -> str:
        """The prompt's text, decoded where only ids were given."""
        if prompt.text is not None:
            return prompt.text
        tokenizer = self.engine.get_tokenizer()
        if tokenizer is None:
            raise VLLMValidationError(
                "echo of token ids needs a tokenizer, and this server runs with "
                "--skip-tokenizer-init",
                parameter="echo",
            )
        return tokenizer.decode(prompt.token_ids)


def prompt_logprobs_json(prompt_logprobs: PromptLogprobs | None) -> PromptLogprobsJson | None:
    """Per position None, or token id -> {logprob, rank, decoded_token}."""
    if prompt_logprobs is None:
        return None
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": finite_logprob(entry.logprob),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in position.items()
        }
        for position in prompt_logprobs
    ]
