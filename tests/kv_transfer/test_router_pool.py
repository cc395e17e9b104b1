"""How the router sees that a server is well."""

from __future__ import annotations

import asyncio

import httpx

from vllm.entrypoints.router.pool import Pool

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


async def look_at(handle, times):
    """What a pool thinks of a server after each look."""
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    pool = Pool("decode", [f"http://127.0.0.1:{port}"])
    (known,) = pool.servers.values()
    seen = []
    async with server, httpx.AsyncClient() as client:
        for _ in range(times):
            await pool.look(client, 5, 0)
            seen.append(known.healthy)
    return seen


async def test_a_kept_connection_that_is_closed_just_then_is_no_illness():
    connections = 0

    async def handle(reader, writer):
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER)
        # The next request meets a connection that ends.
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    assert await look_at(handle, 4) == [True] * 4
    assert connections >= 3


async def test_a_server_that_never_answers_properly_is_ill():
    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    assert await look_at(handle, 2) == [False, False]
