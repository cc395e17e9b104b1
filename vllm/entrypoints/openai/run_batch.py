"""``vllm run-batch``: a file of requests through the server's endpoints, without a server.

Each line goes to the application as the HTTP request that it describes, so that fields, errors and
answers are the server's. Owns the files' form (OpenAI's batches) and the order of the answers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import httpx
import msgspec
from tqdm import tqdm

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.api_server import build_app, check_options
from vllm.entrypoints.openai.cli_args import FrontendArgs
from vllm.entrypoints.openai.protocol import random_uuid
from vllm.errors import ConfigError, EngineDeadError
from vllm.logger import init_logger
from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["run"]

logger = init_logger(__name__)

_URL = ("http://", "https://")
_TRANSFER_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    custom_id: str
    url: str
    body: dict[str, Any]


class _Input(msgspec.Struct, kw_only=True):
    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


def _read(source: str) -> str:
    option = "--input-file"
    try:
        if source.startswith(_URL):
            answer = httpx.get(source, timeout=_TRANSFER_S, follow_redirects=True)
            return answer.raise_for_status().text
        with open(source, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError, httpx.HTTPError) as error:
        raise ConfigError(f"{option} {source}: {error}", parameter=option, value=source) from error


def read_requests(source: str) -> list[_Line]:
    """The requests of a batch.

    Raises:
        ConfigError: the file cannot be read, has no request, or a line is none; it names the line.
    """
    option = "--input-file"
    decoder = msgspec.json.Decoder(_Input)
    lines = []
    for number, text in enumerate(_read(source).splitlines(), start=1):
        if not text.strip():
            continue
        where = f"{option} {source}: line {number}"
        try:
            given = decoder.decode(text)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{where}: {error}", parameter=option) from error
        if given.method.upper() != "POST" or not given.url.startswith("/"):
            raise ConfigError(
                f"{where}: {given.method} {given.url}: give POST and a path such as "
                "/v1/chat/completions",
                parameter=option,
            )
        if given.body.get("stream"):
            raise ConfigError(
                f"{where}: a batch has no streams; leave stream out", parameter=option
            )
        lines.append(_Line(custom_id=given.custom_id, url=given.url, body=given.body))
    if not lines:
        raise ConfigError(f"{option} {source} has no requests", parameter=option, value=source)
    return lines


@contextlib.contextmanager
def _output(target: str) -> Iterator[IO[bytes]]:
    """A file to write answers to; one for a URL is sent there when the block has ended well."""
    remote = target.startswith(_URL)
    with _naming_output(target), contextlib.ExitStack() as stack:
        file: IO[bytes]
        if remote:
            file = stack.enter_context(tempfile.TemporaryFile())
        else:
            file = stack.enter_context(open(target, "wb"))
        # Errors of the block are not the output's.
        opened = stack.pop_all()
    with opened:
        yield file
        if remote:
            file.seek(0)
            with _naming_output(target):
                answer = httpx.put(target, content=file.read(), timeout=_TRANSFER_S)
                answer.raise_for_status()


@contextlib.contextmanager
def _naming_output(target: str) -> Iterator[None]:
    option = "--output-file"
    try:
        yield
    except (OSError, httpx.HTTPError) as error:
        raise ConfigError(f"{option} {target}: {error}", parameter=option, value=target) from error


async def _answer(
    client: httpx.AsyncClient, line: _Line, free: asyncio.Semaphore
) -> dict[str, Any]:
    async with free:
        answer = await client.post(line.url, json=line.body)
    return {
        "id": f"vllm-{random_uuid()}",
        "custom_id": line.custom_id,
        "response": {
            "status_code": answer.status_code,
            "request_id": f"vllm-batch-{random_uuid()}",
            "body": msgspec.json.decode(answer.content),
        },
        "error": None,
    }


async def _answer_all(
    engine: AsyncLLM,
    frontend: FrontendArgs,
    lines: list[_Line],
    output: IO[bytes],
    progress: bool,
) -> int:
    """Write all answers; returns how many requests failed."""
    # As many as run at once, and as many again that wait, so that none is idle.
    free = asyncio.Semaphore(2 * engine.vllm_config.scheduler_config.max_num_seqs)
    keys = frontend.api_keys
    transport = httpx.ASGITransport(app=build_app(engine, frontend), raise_app_exceptions=False)
    num_failed = 0
    async with httpx.AsyncClient(
        transport=transport,
        base_url="http://batch",
        timeout=None,
        headers={"Authorization": f"Bearer {keys[0]}"} if keys else {},
    ) as client:
        tasks = [asyncio.create_task(_answer(client, line, free)) for line in lines]
        try:
            for task in tqdm(tasks, desc="Requests", unit="req", disable=not progress):
                result = await task
                num_failed += result["response"]["status_code"] != 200
                if engine.errored:
                    raise EngineDeadError("the engine died; answers up to there were written")
                output.write(msgspec.json.encode(result) + b"\n")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return num_failed


def run(args: argparse.Namespace) -> int:
    """Answer the batch; 0 also where some of its requests were refused: their answers say so.

    Raises:
        VLLMValidationError: an option or a line of the input cannot work.
        VLLMError: the engine could not start, or died.
    """
    for option in ("input_file", "output_file"):
        if getattr(args, option) is None:
            name = "--" + option.replace("_", "-")
            raise ConfigError(f"{name} is needed", parameter=name)
    frontend = FrontendArgs.from_namespace(args)
    check_options(frontend)
    lines = read_requests(args.input_file)
    with _output(args.output_file) as output:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
        try:
            num_failed = asyncio.run(
                _answer_all(engine, frontend, lines, output, not args.disable_tqdm)
            )
        finally:
            engine.shutdown()
    logger.info("%d of %d requests were answered", len(lines) - num_failed, len(lines))
    return 0
