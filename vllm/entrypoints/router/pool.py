"""Servers that may join, leave, fail and recover, and whose turn it is."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Collection

import httpx

from vllm.errors import ConfigError

__all__ = ["Pool", "Server"]


class Server:
    """A server as the router sees it: how it is, and how much it has to do."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.healthy = False
        """Whether it gets new requests."""
        self.in_flight = 0
        self.misses = 0
        """Looks in a row that were not answered in time."""
        self._limits: set[asyncio.Timeout] = set()

    @contextlib.asynccontextmanager
    async def working(self, seconds: float | None = None) -> AsyncIterator[None]:
        """Within, the server is waited for.

        Raises:
            httpx.ReadError: it went down meanwhile.
            TimeoutError: that took longer than ``seconds``.
        """
        try:
            async with asyncio.timeout(seconds) as limit:
                self._limits.add(limit)
                try:
                    yield
                finally:
                    self._limits.discard(limit)
        except TimeoutError:
            if self.healthy:
                raise
            raise httpx.ReadError("its health check failed") from None

    def goes_down(self) -> None:
        """No more requests; whoever waits for it need not."""
        self.healthy = False
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(now)


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

    def choose(self, avoided: Collection[str] = ()) -> Server | None:
        """The healthy server with the fewest requests, in turn; None where none is healthy.

        Those in ``avoided`` come last: what failed there may work now, or may not have been theirs.
        """
        able = [server for server in self.servers.values() if server.healthy]
        able = [server for server in able if server.url not in avoided] or able
        if not able:
            return None
        least = min(server.in_flight for server in able)
        able = [server for server in able if server.in_flight == least]
        return able[next(self._turn) % len(able)]

    async def look(self, client: httpx.AsyncClient, timeout: float, allowed_misses: int) -> None:
        """Ask every server how it is.

        One that says that it is ill, or does not listen, is out at once; one that is silent may
        just have much to do, so it is out after more than ``allowed_misses`` times.
        """

        async def ask(server: Server) -> None:
            try:
                response = await _health(client, server.url, timeout)
            except httpx.TimeoutException:
                server.misses += 1
                if server.misses > allowed_misses:
                    server.goes_down()
            except httpx.HTTPError:
                server.goes_down()
            else:
                server.misses = 0
                server.healthy = response.status_code == 200
                if not server.healthy:
                    server.goes_down()

        await asyncio.gather(*(ask(server) for server in list(self.servers.values())))


async def _health(client: httpx.AsyncClient, url: str, timeout: float) -> httpx.Response:
    """Asked twice if need be: the server may just have closed a connection that was kept open."""
    try:
        return await client.get(f"{url}/health", timeout=timeout)
    except (httpx.ConnectError, httpx.TimeoutException):
        raise
    except httpx.HTTPError:
        return await client.get(f"{url}/health", timeout=timeout, headers={"connection": "close"})
