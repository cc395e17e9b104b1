"""The server's chat template, and prompts from chat requests.

Owns which template a request may use. Shared by chat and tokenize.
"""

from typing import Any

from vllm.entrypoints.chat_utils import (
    load_chat_template,
    parse_chat_messages,
    render_chat,
    resolve_chat_template,
)
from vllm.entrypoints.openai.cli_args import FrontendArgs
from vllm.entrypoints.openai.protocol import ChatCompletionRequest, TokenizeChatRequest
from vllm.errors import VLLMValidationError

__all__ = ["ChatPrompts"]


class ChatPrompts:
    """Renders chat requests.

    Raises:
        ConfigError: --chat-template is neither a file nor a template.
    """

    def __init__(self, tokenizer: Any, frontend: FrontendArgs) -> None:
        self._tokenizer = tokenizer
        self._template = load_chat_template(frontend.chat_template)
        self._content_format = frontend.chat_template_content_format
        self._trust_request = frontend.trust_request_chat_template
        self._default_variables = frontend.default_chat_template_kwargs or {}
        self._hide_unused_tools = frontend.exclude_tools_when_tool_choice_none

    def render(
        self, request: ChatCompletionRequest | TokenizeChatRequest
    ) -> tuple[list[dict[str, Any]], str]:
        """The request's messages, checked, and its prompt's text.

        Raises:
            VLLMValidationError: a message is malformed, or the template refuses them.
        """
        if self._tokenizer is None:
            raise VLLMValidationError(
                "chat needs a tokenizer, and this server runs with --skip-tokenizer-init",
                parameter="messages",
            )
        variables = {**self._default_variables, **(request.chat_template_kwargs or {})}
        self._check_request_template(request, variables)
        tools = None
        if request.tools and not self._hides_tools(request):
            tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
        template = resolve_chat_template(
            self._tokenizer,
            request.chat_template or self._template,
            with_tools=tools is not None,
            content_format=self._content_format,
        )
        documents = None
        if isinstance(request, ChatCompletionRequest):
            documents = request.documents
            if request.reasoning_effort is not None:
                if "reasoning_effort" not in template.variables:
                    raise VLLMValidationError(
                        "reasoning_effort: this model's chat template does not read it",
                        parameter="reasoning_effort",
                    )
                variables["reasoning_effort"] = request.reasoning_effort
        messages = parse_chat_messages(request.messages, template.content_format)
        text = render_chat(
            self._tokenizer,
            template,
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            variables=variables,
        )
        return messages, text

    def _hides_tools(self, request: ChatCompletionRequest | TokenizeChatRequest) -> bool:
        return (
            self._hide_unused_tools
            and isinstance(request, ChatCompletionRequest)
            and request.tool_choice == "none"
        )

    def _check_request_template(
        self, request: ChatCompletionRequest | TokenizeChatRequest, variables: dict[str, Any]
    ) -> None:
        if self._trust_request:
            return
        if request.chat_template is not None or "chat_template" in variables:
            raise VLLMValidationError(
                "chat_template in a request needs a server started with "
                "--trust-request-chat-template",
                parameter="chat_template",
            )
