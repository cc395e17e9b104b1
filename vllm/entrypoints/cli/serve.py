"""``vllm serve``: the options of engine and server together, and the start of the server."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import vllm.envs as envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.cli_args import FrontendArgs
from vllm.errors import ConfigError
from vllm.logger import set_level, use_config_file
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.flags import Kind, arg, flags_of

__all__ = ["ServeArgs", "make_parser", "run"]


@dataclass(frozen=True, kw_only=True)
class ServeArgs:
    """Options of the command itself; engine and server never see them."""

    config: str | None = arg(
        None,
        "top level",
        Kind.STR,
        "YAML file of options, such as 'max-model-len: 4096'; options given here win over it.",
    )
    api_server_count: int | None = arg(
        None,
        "top level",
        Kind.INT,
        "API server processes that share the port, in front of one engine; default 1. Several "
        "log no statistics: each sees a part; /metrics shows all.",
        short="-asc",
        minimum=1,
    )
    fail_on_environ_validation: bool = arg(
        False,
        "top level",
        Kind.SWITCH,
        "Refuse to start where a VLLM_ variable is set that nobody knows; else it is a warning.",
    )
    log_level: str | None = arg(
        None,
        "LoggingConfig",
        Kind.STR,
        "Level of the log of every process; by default VLLM_LOGGING_LEVEL.",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    log_config_file: str | None = arg(
        None,
        "LoggingConfig",
        Kind.STR,
        "JSON file for Python's logging.config.dictConfig, for the log of every process; by "
        "default VLLM_LOGGING_CONFIG_PATH.",
    )


def make_parser() -> FlexibleArgumentParser:
    """The parser of ``vllm serve``."""
    parser = FlexibleArgumentParser(
        prog="vllm serve",
        usage="vllm serve [MODEL] [options]",
        description="Serve a model over an OpenAI-compatible HTTP API.",
        grouped_help=True,
    )
    parser.add_argument(
        "model_tag",
        nargs="?",
        metavar="MODEL",
        help="What to serve; the same as --model.",
    )
    for table in (ServeArgs, FrontendArgs):
        for flag in flags_of(table).values():
            parser.add_flag(flag)
    AsyncEngineArgs.add_cli_args(parser)
    return parser


def _name_model(args: argparse.Namespace) -> None:
    """Make the positional MODEL what ``--model`` is."""
    if args.model_tag is None:
        return
    default = AsyncEngineArgs.flags()["model"].default
    if args.model not in (default, args.model_tag):
        raise ConfigError(
            f"MODEL {args.model_tag!r} and --model {args.model!r} differ; give one of them",
            parameter="model",
            value=args.model,
        )
    args.model = args.model_tag


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it.

    Raises:
        VLLMValidationError: an option or variable cannot work.
        VLLMError: the engine could not start, or died.
    """
    _name_model(args)
    if args.log_config_file is not None:
        use_config_file(args.log_config_file)
    if args.log_level is not None:
        set_level(args.log_level)
    envs.validate_environ(fail_on_unknown=args.fail_on_environ_validation)
    from vllm.entrypoints.openai.api_server import run_server

    return run_server(args) or 0
