"""Servers that may join, leave, fail and recover, and whose turn it is."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import dataclass

import httpx

from vllm.errors import ConfigError

__all__ = ["Pool", "Server"]


@dataclass(slots=True)
class Server:
    url: str
    healthy: bool = False
    in_flight: int = 0


def checked_url(url: str) -> str:
    """``url`` without a slash at its end.

    Raises:
        ConfigError: it is no http(s) address.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url!r} is no URL: {error}", parameter="url", value=url) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(
            f"a server is http://HOST:PORT or https://..., not {url!r}", parameter="url", value=url
        )
    return url.rstrip("/")


class Pool:
    """Servers of one kind."""

    def __init__(self, kind: str, urls: list[str]) -> None:
        self.kind = kind
        self.servers: dict[str, Server] = {}
        self._turn = itertools.count()
        for url in urls:
            self.join(url)

    def join(self, url: str) -> Server:
        checked = checked_url(url)
        return self.servers.setdefault(checked, Server(checked))

    def leave(self, url: str) -> bool:
        """No new requests for this server; False where it is not there."""
        return self.servers.pop(url.rstrip("/"), None) is not None

    def choose(self, tried: set[str]) -> Server | None:
        """The healthy server with the fewest requests, in turn; None where all are tried."""
        able = [s for s in self.servers.values() if s.healthy and s.url not in tried]
        if not able:
            return None
        least = min(server.in_flight for server in able)
        able = [server for server in able if server.in_flight == least]
        return able[next(self._turn) % len(able)]

    async def look(self, client: httpx.AsyncClient) -> None:
        """Ask every server how it is."""

        async def ask(server: Server) -> None:
            healthy = False
            with contextlib.suppress(httpx.HTTPError):
                healthy = (await client.get(f"{server.url}/health", timeout=5)).status_code == 200
            server.healthy = healthy

        await asyncio.gather(*(ask(server) for server in list(self.servers.values())))
