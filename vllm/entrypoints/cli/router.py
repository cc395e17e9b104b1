"""``vllm router``: the options of the proxy before prefill and decode servers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.flags import Kind, arg, flags_of

__all__ = ["RouterArgs", "make_parser", "run"]

_GROUP = "router"


@dataclass(frozen=True, kw_only=True)
class RouterArgs:
    host: str = arg("127.0.0.1", _GROUP, Kind.STR, "Address to listen on.")
    port: int = arg(8000, _GROUP, Kind.INT, "Port to listen on.", minimum=1)
    prefill: list[str] = arg(
        [], _GROUP, Kind.LIST, "URLs of prefill servers, such as http://127.0.0.1:8100."
    )
    decode: list[str] = arg([], _GROUP, Kind.LIST, "URLs of decode servers.")
    connector: str = arg(
        "nixl",
        _GROUP,
        Kind.STR,
        "What the servers exchange KV by: NIXL's servers are asked one after the other, Mooncake's "
        "at the same time.",
        choices=("nixl", "mooncake"),
    )
    bootstrap: list[str] = arg(
        [],
        _GROUP,
        Kind.LIST,
        "With Mooncake, URLs of the bootstrap servers of the prefill servers, in the same order; "
        "by default port VLLM_MOONCAKE_BOOTSTRAP_PORT of each one's host.",
    )
    timeout: float = arg(
        600.0, _GROUP, Kind.FLOAT, "Seconds without a byte of an answer.", minimum=0.1
    )
    prefill_timeout: float = arg(
        120.0, _GROUP, Kind.FLOAT, "Seconds until a prefill must be done.", minimum=0.1
    )
    health_interval: float = arg(
        2.0, _GROUP, Kind.FLOAT, "Seconds between two looks at each server.", minimum=0.05
    )
    health_timeout: float = arg(
        5.0, _GROUP, Kind.FLOAT, "Seconds in which a server must say how it is.", minimum=0.05
    )
    health_misses: int = arg(
        1, _GROUP, Kind.INT, "Looks in a row that a server may leave unanswered.", minimum=0
    )
    retries: int = arg(
        2,
        _GROUP,
        Kind.INT,
        "How often a request that failed before its first token is tried again, on other servers "
        "where there are some.",
        minimum=0,
    )
    admin_key: str | None = arg(
        None,
        _GROUP,
        Kind.STR,
        "Bearer token that servers joining and leaving must show; without it none may.",
    )


def make_parser() -> FlexibleArgumentParser:
    """The parser of ``vllm router``."""
    parser = FlexibleArgumentParser(
        prog="vllm router",
        usage="vllm router --prefill URL... --decode URL... [options]",
        description="One address for prefill and decode servers.",
    )
    for flag in flags_of(RouterArgs).values():
        parser.add_flag(flag)
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    from vllm.entrypoints.router.app import serve

    return serve(RouterArgs(**{name: getattr(args, name) for name in flags_of(RouterArgs)}))
