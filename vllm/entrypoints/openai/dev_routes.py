"""Routes that change the engine itself, served with VLLM_SERVER_DEV_MODE=1 only.

They are for training loops and development: whoever can reach them can stop the service.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from vllm.entrypoints.openai.http import read_object
from vllm.entrypoints.openai.serving_engine import ServerContext
from vllm.errors import EngineGenerateError, VLLMValidationError

__all__ = ["add_dev_routes"]


def _number(raw: Request, name: str, default: int) -> int:
    text = raw.query_params.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise VLLMValidationError(
            f"{name} must be a whole number, not {text[:40]!r}", parameter=name, value=text[:40]
        )
    return int(text)


def add_dev_routes(app: FastAPI, context: ServerContext) -> None:
    """``/sleep``, ``/wake_up``, ``/is_sleeping``, ``/reset_prefix_cache``, ``/collective_rpc``."""
    engine = context.engine

    async def sleep(raw: Request) -> Response:
        mode = raw.query_params.get("mode", "abort")
        await _refusable(engine.sleep(_number(raw, "level", 1), mode))
        return Response(status_code=200)

    async def wake_up(raw: Request) -> Response:
        await _refusable(engine.wake_up(raw.query_params.getlist("tags") or None))
        return Response(status_code=200)

    async def is_sleeping() -> JSONResponse:
        return JSONResponse({"is_sleeping": await engine.is_sleeping()})

    async def reset_prefix_cache() -> JSONResponse:
        return JSONResponse({"success": await engine.reset_prefix_cache()})

    async def collective_rpc(raw: Request) -> JSONResponse:
        body = await read_object(raw)
        method, timeout = body.get("method"), body.get("timeout")
        args, kwargs = body.get("args", []), body.get("kwargs", {})
        if not isinstance(method, str):
            raise VLLMValidationError("method must be text", parameter="method")
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise VLLMValidationError("args must be a list, kwargs an object", parameter="args")
        results = await _refusable(engine.collective_rpc(method, timeout, args, kwargs))
        return JSONResponse({"results": results})

    app.add_api_route("/sleep", sleep, methods=["POST"], response_class=Response)
    app.add_api_route("/wake_up", wake_up, methods=["POST"], response_class=Response)
    app.add_api_route("/is_sleeping", is_sleeping, methods=["GET"])
    app.add_api_route("/reset_prefix_cache", reset_prefix_cache, methods=["POST"])
    app.add_api_route("/collective_rpc", collective_rpc, methods=["POST"])


async def _refusable(call: Any) -> Any:
    """What the engine refuses is the caller's to correct."""
    try:
        return await call
    except EngineGenerateError as error:
        raise VLLMValidationError(str(error)) from None
