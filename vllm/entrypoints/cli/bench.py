"""The parsers of ``vllm bench serve``, ``throughput`` and ``latency``."""

from __future__ import annotations

from vllm.benchmarks.args import NOT_YET, LatencyArgs, ServeArgs, ThroughputArgs
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.flags import flags_of

__all__ = ["latency_parser", "serve_parser", "throughput_parser"]


def _parser(name: str, description: str, table: type, *, engine: bool) -> FlexibleArgumentParser:
    parser = FlexibleArgumentParser(
        prog=f"vllm bench {name}",
        usage=f"vllm bench {name} [options]",
        description=description,
        grouped_help=engine,
    )
    for flag in flags_of(table).values():
        parser.add_flag(flag)
    parser.refuse(NOT_YET)
    if engine:
        EngineArgs.add_cli_args(parser)
    return parser


def serve_parser() -> FlexibleArgumentParser:
    """The parser of ``vllm bench serve``."""
    return _parser(
        "serve", "Measure a running server as its clients see it.", ServeArgs, engine=False
    )


def throughput_parser() -> FlexibleArgumentParser:
    """The parser of ``vllm bench throughput``."""
    description = "Measure how many requests and tokens a second the engine completes offline."
    return _parser("throughput", description, ThroughputArgs, engine=True)


def latency_parser() -> FlexibleArgumentParser:
    """The parser of ``vllm bench latency``."""
    return _parser("latency", "Measure the time that one batch takes.", LatencyArgs, engine=True)
