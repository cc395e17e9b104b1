"""The FastAPI application: routes, layers, errors, schema.

Owns which path is answered by what. Knows nothing of processes, sockets or signals.
"""

import inspect
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import vllm
import vllm.envs as envs
from vllm.entrypoints.openai.chat_prompts import ChatPrompts
from vllm.entrypoints.openai.cli_args import FrontendArgs
from vllm.entrypoints.openai.dev_routes import add_dev_routes
from vllm.entrypoints.openai.errors import APIError, ErrorResponse, error_response
from vllm.entrypoints.openai.http import (
    CLIENT_CLOSED_REQUEST,
    parse_request,
    read_object,
    validate,
)
from vllm.entrypoints.openai.messages_request import CountTokensRequest, MessagesRequest
from vllm.entrypoints.openai.metrics import HTTPMetricsMiddleware, metrics_response
from vllm.entrypoints.openai.middleware import (
    AuthenticationMiddleware,
    HeaderLimitMiddleware,
    LoadMiddleware,
    RequestIdMiddleware,
    ResetConnectionMiddleware,
)
from vllm.entrypoints.openai.plugins import load_middleware
from vllm.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    TokenizeResponse,
)
from vllm.entrypoints.openai.responses_request import ResponsesRequest
from vllm.entrypoints.openai.serving_chat import OpenAIServingChat
from vllm.entrypoints.openai.serving_completion import OpenAIServingCompletion
from vllm.entrypoints.openai.serving_engine import ServerContext
from vllm.entrypoints.openai.serving_messages import AnthropicServingMessages
from vllm.entrypoints.openai.serving_responses import OpenAIServingResponses
from vllm.entrypoints.openai.serving_tokenization import OpenAIServingTokenization
from vllm.errors import EngineDeadError, VLLMError, VLLMValidationError
from vllm.logger import init_logger
from vllm.v1.metrics.prometheus import get_process_registry, get_prometheus_registry

__all__ = ["make_app"]

logger = init_logger(__name__)

_DEFAULT_HEADER_LIMIT = 256
_REF = "#/components/schemas/{model}"
# Paths that vLLM answers and this server does not yet.
_NOT_YET = (
    "/generative_scoring",
    "/inference/v1",
    "/is_scaling_elastic_ep",
    "/kv_event_sources",
    "/scale_elastic_ep",
    "/v1/audio",
    "/v1/chat/completions/",
    "/v1/completions/",
    "/v1/embeddings",
    "/v1/messages/",
    "/v1/responses/",
    "/v1/systemone",
)


def _body(*models: type) -> dict[str, Any]:
    """The request body of an endpoint that reads it itself, for the schema."""
    refs = [{"$ref": _REF.format(model=model.__name__)} for model in models]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _refuse_if_closing(context: ServerContext) -> None:
    if context.draining:
        raise APIError(503, "the server is shutting down")


def _add_state_routes(app: FastAPI, context: ServerContext) -> None:
    async def health() -> Response:
        try:
            await context.engine.check_health()
        except EngineDeadError as exc:
            return error_response(APIError(503, str(exc)))
        return Response(status_code=503 if context.draining else 200)

    async def version() -> JSONResponse:
        return JSONResponse({"version": vllm.__version__})

    async def load() -> JSONResponse:
        return JSONResponse({"server_load": context.load})

    async def metrics() -> Response:
        return metrics_response(get_prometheus_registry())

    app.add_api_route("/health", health, methods=["GET"], response_class=Response)
    app.add_api_route("/ping", health, methods=["GET", "POST"], response_class=Response)
    app.add_api_route("/version", version, methods=["GET"])
    app.add_api_route("/load", load, methods=["GET"])
    app.add_api_route("/metrics", metrics, methods=["GET"], response_class=Response)


def _add_model_routes(app: FastAPI, context: ServerContext) -> None:
    async def show_models() -> ModelList:
        return context.models.list_models()

    async def show_model(model_id: str) -> ModelCard:
        return context.models.card(model_id)

    app.add_api_route("/v1/models", show_models, methods=["GET"])
    # A model's name may be a path, with slashes.
    app.add_api_route("/v1/models/{model_id:path}", show_model, methods=["GET"])


def _add_generation_routes(app: FastAPI, context: ServerContext, prompts: ChatPrompts) -> None:
    completion = OpenAIServingCompletion(context)
    chat = OpenAIServingChat(context, prompts)
    responses = OpenAIServingResponses(chat)
    messages = AnthropicServingMessages(chat)

    async def create_completion(raw: Request) -> Response:
        _refuse_if_closing(context)
        request = await parse_request(raw, CompletionRequest, "completion")
        return await completion.create_completion(request, raw)

    async def create_chat_completion(raw: Request) -> Response:
        _refuse_if_closing(context)
        request = await parse_request(raw, ChatCompletionRequest, "chat")
        return await chat.create_chat_completion(request, raw)

    async def create_response(raw: Request) -> Response:
        _refuse_if_closing(context)
        request = await parse_request(raw, ResponsesRequest, "responses")
        return await responses.create_response(request, raw)

    async def create_message(raw: Request) -> Response:
        _refuse_if_closing(context)
        request = await parse_request(raw, MessagesRequest, "messages")
        return await messages.create_message(request, raw)

    async def count_tokens(raw: Request) -> Response:
        request = await parse_request(raw, CountTokensRequest, "messages")
        return await messages.count_tokens(request)

    async def invocations(raw: Request) -> Response:
        """SageMaker's one path: the fields tell what is meant."""
        _refuse_if_closing(context)
        body = await read_object(raw)
        if "messages" in body:
            return await chat.create_chat_completion(
                validate(ChatCompletionRequest, "chat", body), raw
            )
        if "prompt" not in body:
            raise VLLMValidationError("/invocations takes messages (chat) or prompt (completion)")
        return await completion.create_completion(
            validate(CompletionRequest, "completion", body), raw
        )

    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (400, 404, 500, 503)
    }
    app.add_api_route(
        "/v1/completions",
        create_completion,
        methods=["POST"],
        response_model=None,
        responses={200: {"model": CompletionResponse}, **errors},
        openapi_extra=_body(CompletionRequest),
    )
    app.add_api_route(
        "/v1/chat/completions",
        create_chat_completion,
        methods=["POST"],
        response_model=None,
        responses={200: {"model": ChatCompletionResponse}, **errors},
        openapi_extra=_body(ChatCompletionRequest),
    )
    app.add_api_route(
        "/v1/responses",
        create_response,
        methods=["POST"],
        response_model=None,
        responses=errors,
        openapi_extra=_body(ResponsesRequest),
    )
    for path, endpoint, model in (
        ("/v1/messages", create_message, MessagesRequest),
        ("/v1/messages/count_tokens", count_tokens, CountTokensRequest),
    ):
        app.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            response_model=None,
            responses=errors,
            openapi_extra=_body(model),
        )
    app.add_api_route(
        "/invocations",
        invocations,
        methods=["POST"],
        response_model=None,
        responses={200: {"model": ChatCompletionResponse | CompletionResponse}, **errors},
        openapi_extra=_body(ChatCompletionRequest, CompletionRequest),
    )


def _add_tokenizer_routes(app: FastAPI, context: ServerContext, prompts: ChatPrompts) -> None:
    serving = OpenAIServingTokenization(context, prompts)

    async def tokenize(raw: Request) -> Response:
        body = await read_object(raw)
        if "messages" in body:
            return await serving.tokenize(validate(TokenizeChatRequest, "tokenize", body))
        return await serving.tokenize(validate(TokenizeCompletionRequest, "tokenize", body))

    async def detokenize(raw: Request) -> Response:
        return await serving.detokenize(await parse_request(raw, DetokenizeRequest, "detokenize"))

    app.add_api_route(
        "/tokenize",
        tokenize,
        methods=["POST"],
        response_model=None,
        responses={200: {"model": TokenizeResponse}},
        openapi_extra=_body(TokenizeCompletionRequest, TokenizeChatRequest),
    )
    app.add_api_route(
        "/detokenize",
        detokenize,
        methods=["POST"],
        response_model=None,
        responses={200: {"model": DetokenizeResponse}},
        openapi_extra=_body(DetokenizeRequest),
    )
    if context.frontend.enable_tokenizer_info_endpoint:

        async def tokenizer_info() -> JSONResponse:
            return JSONResponse(await serving.tokenizer_info())

        app.add_api_route("/tokenizer_info", tokenizer_info, methods=["GET"])


def _add_error_handlers(app: FastAPI, log_stack: bool) -> None:
    async def expected(_: Request, exc: Exception) -> Response:
        if log_stack:
            logger.error("A request failed", exc_info=exc)
        return error_response(exc)

    async def unexpected(request: Request, exc: Exception) -> Response:
        # Starlette raises it again after the answer, and uvicorn logs its stack.
        logger.error("%s %s met %s", request.method, request.url.path, type(exc).__name__)
        return error_response(exc)

    async def client_gone(_: Request, __: Exception) -> Response:
        # In the middle of its body; nobody reads this.
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def http_error(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        path = request.url.path
        message = str(exc.detail)
        if exc.status_code == 404:
            known = any(path.startswith(prefix) for prefix in _NOT_YET)
            why = (
                "vLLM has it; this server does not yet" if known else "see /docs for what there is"
            )
            message = f"no endpoint {request.method} {path[:120]}; {why}"
        elif exc.status_code == 405:
            message = f"{path[:120]} does not take {request.method}"
        return error_response(APIError(exc.status_code, message, headers=exc.headers))

    for kind in (APIError, VLLMValidationError, VLLMError):
        app.add_exception_handler(kind, expected)
    app.add_exception_handler(ClientDisconnect, client_gone)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)


def _add_layers(app: FastAPI, context: ServerContext) -> None:
    """The last one added is outermost."""
    frontend = context.frontend
    if frontend.enable_server_load_tracking:
        app.add_middleware(LoadMiddleware, context=context)
    for path in frontend.middleware:
        middleware: Any = load_middleware(path)
        if inspect.isclass(middleware):
            app.add_middleware(cast(Any, middleware))
        else:
            app.middleware("http")(middleware)
    if frontend.api_keys:
        app.add_middleware(AuthenticationMiddleware, keys=frontend.api_keys)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=frontend.allowed_origins,
        allow_credentials=frontend.allow_credentials,
        allow_methods=frontend.allowed_methods,
        allow_headers=frontend.allowed_headers,
    )
    if frontend.enable_request_id_headers:
        app.add_middleware(RequestIdMiddleware)
    limit = frontend.h11_max_header_count or _DEFAULT_HEADER_LIMIT
    app.add_middleware(HeaderLimitMiddleware, limit=limit)
    app.add_middleware(HTTPMetricsMiddleware, registry=get_process_registry())
    app.add_middleware(ResetConnectionMiddleware)


class _App(FastAPI):
    """FastAPI, with the schemas of bodies that endpoints read themselves."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            models = (
                CompletionRequest,
                ChatCompletionRequest,
                ResponsesRequest,
                MessagesRequest,
                CountTokensRequest,
                TokenizeCompletionRequest,
                TokenizeChatRequest,
                DetokenizeRequest,
            )
            _, definitions = models_json_schema(
                [(model, "validation") for model in models], ref_template=_REF
            )
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            for name, definition in definitions["$defs"].items():
                components.setdefault(name, definition)
        assert self.openapi_schema is not None
        return self.openapi_schema


def make_app(context: ServerContext) -> FastAPI:
    """The application for one engine.

    Raises:
        ConfigError: --chat-template, --tool-call-parser, --tool-parser-plugin or --middleware
            cannot be used.
    """
    frontend: FrontendArgs = context.frontend
    with_docs = not frontend.disable_fastapi_docs
    app = _App(
        title="vLLM",
        version=vllm.__version__,
        root_path=frontend.root_path or "",
        openapi_url="/openapi.json" if with_docs else None,
        docs_url="/docs" if with_docs else None,
        redoc_url="/redoc" if with_docs else None,
    )
    app.state.context = context
    prompts = ChatPrompts(context.engine.get_tokenizer(), frontend)
    _add_state_routes(app, context)
    _add_model_routes(app, context)
    _add_generation_routes(app, context, prompts)
    _add_tokenizer_routes(app, context, prompts)
    if envs.VLLM_SERVER_DEV_MODE:
        add_dev_routes(app, context)
    _add_error_handlers(app, frontend.log_error_stack)
    _add_layers(app, context)
    for route in app.routes:
        methods = ",".join(sorted(getattr(route, "methods", None) or ()))
        logger.debug("Route: %s %s", methods, getattr(route, "path", ""))
    return app
