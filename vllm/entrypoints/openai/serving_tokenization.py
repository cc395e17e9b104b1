"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``: what the tokenizer makes of text."""

from typing import Any

from starlette.responses import Response

from vllm.entrypoints.openai.chat_prompts import ChatPrompts
from vllm.entrypoints.openai.http import JSONBytes
from vllm.entrypoints.openai.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    TokenizeResponse,
)
from vllm.entrypoints.openai.serving_engine import OpenAIServing, ServerContext
from vllm.errors import VLLMValidationError

__all__ = ["OpenAIServingTokenization"]


class OpenAIServingTokenization(OpenAIServing):
    def __init__(self, context: ServerContext, prompts: ChatPrompts) -> None:
        super().__init__(context)
        self._prompts = prompts

    def _tokenizer(self) -> Any:
        tokenizer = self.engine.get_tokenizer()
        if tokenizer is None:
            raise VLLMValidationError("this server runs with --skip-tokenizer-init")
        return tokenizer

    async def tokenize(self, request: TokenizeCompletionRequest | TokenizeChatRequest) -> Response:
        self.context.models.check(request.model)
        if isinstance(request, TokenizeChatRequest):
            if request.continue_final_message and "add_generation_prompt" not in (
                request.model_fields_set
            ):
                request.add_generation_prompt = False
            _, text = self._prompts.render(request)
        else:
            text = request.prompt
        token_ids = (await self.encode(text, request.add_special_tokens, limited=False)).token_ids
        token_strs = None
        if request.return_token_strs:
            token_strs = self._tokenizer().convert_ids_to_tokens(token_ids)
        return JSONBytes(
            TokenizeResponse(
                count=len(token_ids),
                max_model_len=self.context.max_model_len,
                tokens=token_ids,
                token_strs=token_strs,
            )
        )

    async def detokenize(self, request: DetokenizeRequest) -> Response:
        self.context.models.check(request.model)
        tokenizer = self._tokenizer()
        vocab_size = self.engine.model_config.get_vocab_size()
        for token_id in request.tokens:
            if not 0 <= token_id < vocab_size:
                raise VLLMValidationError(
                    f"tokens: {token_id} is not in the vocabulary (0 to {vocab_size - 1})",
                    parameter="tokens",
                )
        return JSONBytes(DetokenizeResponse(prompt=tokenizer.decode(request.tokens)))

    async def tokenizer_info(self) -> dict[str, Any]:
        """What the tokenizer was made with, as far as JSON can carry it."""
        tokenizer = self._tokenizer()
        info = {
            name: value if isinstance(value, str | int | float | bool | list | dict) else str(value)
            for name, value in tokenizer.init_kwargs.items()
            if value is not None and name not in ("vocab", "merges", "tokenizer_object")
        }
        return {
            **info,
            "tokenizer_class": type(tokenizer).__name__,
            "chat_template": tokenizer.chat_template,
        }
