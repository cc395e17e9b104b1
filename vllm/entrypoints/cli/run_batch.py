"""The options of ``vllm run-batch``. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.cli_args import FrontendArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.flags import Kind, NotYet, arg, flags_of

__all__ = ["RunBatchArgs", "make_parser"]

_GROUP = "Batch"
# Of the server's options those that shape answers; the rest is about HTTP.
_FRONTEND = (
    "chat_template",
    "chat_template_content_format",
    "default_chat_template_kwargs",
    "enable_auto_tool_choice",
    "enable_log_outputs",
    "enable_log_requests",
    "enable_prompt_tokens_details",
    "exclude_tools_when_tool_choice_none",
    "max_log_len",
    "reasoning_parser",
    "reasoning_parser_plugin",
    "response_role",
    "return_tokens_as_token_ids",
    "tool_call_parser",
    "tool_parser_plugin",
    "trust_request_chat_template",
)


@dataclass(frozen=True, kw_only=True)
class RunBatchArgs:
    """Options of the command itself."""

    config: str | None = arg(
        None,
        _GROUP,
        Kind.STR,
        "YAML file of options; options given here win over it.",
    )
    input_file: str | None = arg(
        None,
        _GROUP,
        Kind.STR,
        "Requests in the format of OpenAI's batches, one JSON object a line: a file, or a URL "
        "to GET.",
        short="-i",
    )
    output_file: str | None = arg(
        None,
        _GROUP,
        Kind.STR,
        "Where the answers go, one line each in the order of the requests: a file, or a URL to "
        "PUT.",
        short="-o",
    )
    disable_tqdm: bool = arg(False, _GROUP, Kind.SWITCH, "Show no progress bar.")


def make_parser() -> FlexibleArgumentParser:
    """The parser of ``vllm run-batch``."""
    parser = FlexibleArgumentParser(
        prog="vllm run-batch",
        usage="vllm run-batch -i INPUT -o OUTPUT --model MODEL [options]",
        description="Answer a file of requests offline, without a server.",
        grouped_help=True,
    )
    for flag in flags_of(RunBatchArgs).values():
        parser.add_flag(flag)
    frontend = flags_of(FrontendArgs)
    for name in _FRONTEND:
        parser.add_flag(frontend[name])
    later = (("enable_metrics", False), ("output_tmp_dir", True))
    parser.refuse(NotYet(name=name, group=_GROUP, takes_value=value) for name, value in later)
    AsyncEngineArgs.add_cli_args(parser)
    return parser
