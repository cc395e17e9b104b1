"""The router before Mooncake's servers: prefill and decode are asked at the same time.

Both get the request under one transfer id; the decoder waits for the KV that the prefill server
writes, and the client gets the decoder's answer. Which engines a prefill server has, its bootstrap
server says.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
from fastapi import Response

import vllm.envs as envs
from vllm.entrypoints.router.app import (
    RefusedError,
    Router,
    has_several_prompts,
    prefill_body,
)
from vllm.entrypoints.router.pool import Pool, Server, checked_url
from vllm.errors import ConfigError

if TYPE_CHECKING:
    from vllm.entrypoints.cli.router import RouterArgs

__all__ = ["MooncakeRouter"]

logger = logging.getLogger("vllm.entrypoints.router")


class _Entry(msgspec.Struct):
    engine_id: str


class MooncakeRouter(Router):
    """
    Raises:
        ConfigError: bootstrap servers are given, but not one for each prefill server.
    """

    def __init__(self, args: RouterArgs) -> None:
        super().__init__(args)
        if args.bootstrap and len(args.bootstrap) != len(args.prefill):
            raise ConfigError(
                f"--bootstrap names {len(args.bootstrap)} servers for {len(args.prefill)} of "
                "--prefill; give one for each, in the same order",
                parameter="bootstrap",
                value=args.bootstrap,
            )
        self._bootstraps: dict[str, str] = {}
        """Bootstrap servers by the URL of their prefill server."""
        for index, url in enumerate(args.prefill):
            given = args.bootstrap[index] if args.bootstrap else None
            self._bootstraps[checked_url(url)] = _bootstrap_of(url, given)
        self._engines: dict[str, dict[int, _Entry]] = {}
        """Engines by data-parallel rank, by the URL of their prefill server."""
        self._left_alone: set[asyncio.Task[None]] = set()
        """Prefills whose decoder has answered already, and words to prefill servers that nobody
        waits for."""

    def join(self, pool: Pool, given: dict[str, Any]) -> Server:
        """Prefill servers may name their ``bootstrap`` server, too."""
        if pool is self.prefill:
            bootstrap = _bootstrap_of(str(given["url"]), given.get("bootstrap"))
            self._bootstraps[checked_url(str(given["url"]))] = bootstrap
        return super().join(pool, given)

    async def look(self, *pools: Pool) -> None:
        """A prefill server is healthy if its bootstrap server answers, too."""
        await super().look(*pools)
        if not pools or self.prefill in pools:
            servers = list(self.prefill.servers.values())
            await asyncio.gather(*(self._look_up(server) for server in servers))

    async def _look_up(self, server: Server) -> None:
        address = self._bootstraps[server.url]
        try:
            response = await self.client.get(f"{address}/query", timeout=self.args.health_timeout)
            response.raise_for_status()
            found = msgspec.json.decode(response.content, type=dict[int, _Entry])
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            self._engines.pop(server.url, None)
            if server.healthy:
                logger.warning("bootstrap server %s of %s: %r", address, server.url, error)
                server.healthy = False
            return
        self._engines[server.url] = found

    async def _attempt(
        self, path: str, body: dict[str, Any], headers: dict[str, str], avoided: set[str]
    ) -> Response:
        if has_several_prompts(body):
            return await self._decode(path, body, headers, avoided)
        server = self._choose(self.prefill, avoided)
        entries = self._engines.get(server.url)
        if not entries:
            raise self._failed(
                self.prefill, server, avoided, 503, "has not told its engines to its bootstrap"
            )
        dp_rank, entry = random.choice(list(entries.items()))
        transfer_id = f"xfer-{uuid.uuid4().hex}"
        ask = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
        fetch = {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "transfer_id": transfer_id,
            "remote_bootstrap_addr": self._bootstraps[server.url],
            "remote_engine_id": entry.engine_id,
        }
        there = dict(headers)
        if len(entries) > 1:
            there["x-data-parallel-rank"] = str(dp_rank)
        prefill = asyncio.create_task(
            self._prefill_on(server, path, prefill_body(body, ask), there, avoided)
        )
        wanted = {**body, "kv_transfer_params": fetch}
        decode = asyncio.create_task(self._decode(path, wanted, headers, avoided))
        try:
            return await self._first_of(prefill, decode)
        except BaseException:
            # Also if the client has gone: the decoder may never have heard of it.
            self._leave_alone(self._discard(self._bootstraps[server.url], transfer_id))
            raise

    async def _prefill_on(
        self,
        server: Server,
        path: str,
        body: dict[str, Any],
        headers: dict[str, str],
        avoided: set[str],
    ) -> None:
        """
        Raises:
            FailedError: the server failed.
            RefusedError: the request is wrong.
        """
        with self.prefill_seconds.time():
            response = await self._ask_server(server, self.prefill, path, body, headers, avoided)
        server.in_flight -= 1
        if response.status_code != 200:
            raise RefusedError(
                Response(
                    response.content,
                    response.status_code,
                    media_type=response.headers.get("content-type"),
                )
            )

    async def _first_of(
        self, prefill: asyncio.Task[None], decode: asyncio.Task[Response]
    ) -> Response:
        """The decoder's answer, or the first failure of either."""
        try:
            await asyncio.wait((prefill, decode), return_when=asyncio.FIRST_COMPLETED)
            if not decode.done():
                # What the prefill server refuses, the decoder need not wait for.
                await prefill
            answer = await decode
        except BaseException:
            prefill.cancel()
            decode.cancel()
            await asyncio.gather(prefill, decode, return_exceptions=True)
            raise
        if not prefill.done():
            self._leave_alone(prefill)
        return answer

    async def _discard(self, bootstrap: str, transfer_id: str) -> None:
        """What was computed for nothing need not be kept."""
        wanted = {"transfer_ids": [transfer_id]}
        await self.client.post(f"{bootstrap}/discard", json=wanted, timeout=5)

    def _leave_alone(self, work: asyncio.Task[None] | Coroutine[Any, Any, None]) -> None:
        task = work if isinstance(work, asyncio.Task) else asyncio.create_task(work)
        self._left_alone.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._left_alone.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("A prefill server that nobody waits for any more failed: %r", error)


def _bootstrap_of(url: str, given: Any) -> str:
    """
    Raises:
        ConfigError: ``given`` is no http(s) address.
    """
    if given is not None:
        return checked_url(str(given))
    host = httpx.URL(checked_url(url)).host
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{envs.VLLM_MOONCAKE_BOOTSTRAP_PORT}"
