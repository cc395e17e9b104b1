"""``vllm``: finds the subcommand and imports it alone, so that help is quick.

A command is a pair of dotted paths: one function makes its parser, the other runs the parsed
options. Only the parser's module is imported before the options are known to be good.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from vllm.errors import VLLMError, VLLMValidationError
from vllm.utils.flags import nearest

__all__ = ["main"]


@dataclass(frozen=True, slots=True)
class Command:
    help: str
    parser: str
    """``module:function`` returning a ``FlexibleArgumentParser``."""
    run: str
    """``module:function`` taking the parsed options and returning the exit status."""


_CLI = "vllm.entrypoints.cli"
_BENCH = {
    name: Command(text, f"{_CLI}.bench:{name}_parser", f"vllm.benchmarks.{name}:run")
    for name, text in (
        ("serve", "A running server, as its clients see it."),
        ("throughput", "Requests and tokens a second of the engine offline."),
        ("latency", "The time that one batch takes."),
    )
}
_COMMANDS: dict[str, Command | dict[str, Command]] = {
    name: Command(text, f"{_CLI}.{module}:make_parser", f"{_CLI}.{module}:run")
    for name, module, text in (
        ("serve", "serve", "Serve a model over an OpenAI-compatible HTTP API."),
        ("chat", "chat", "Chat with a running server."),
        ("complete", "complete", "Complete text with a running server."),
        ("kv-plan", "kv_plan", "Plan a model's KV cache: no weights, no GPU."),
        ("router", "router", "One address for prefill and decode servers."),
        ("collect-env", "collect_env", "Print what this installation runs on."),
    )
}
_COMMANDS["run-batch"] = Command(
    "Answer a file of requests offline.",
    f"{_CLI}.run_batch:make_parser",
    "vllm.entrypoints.openai.run_batch:run",
)
_COMMANDS["bench"] = _BENCH
_NOT_YET = {
    "vllm": ("download-kernels", "launch", "preload", "snapshot"),
    "vllm bench": ("mm-processor", "startup", "sweep"),
}


def _usage(prog: str, commands: Mapping[str, Any]) -> str:
    lines = [f"usage: {prog} COMMAND [options]", "", "commands:"]
    for name, command in commands.items():
        text = command.help if isinstance(command, Command) else "Benchmarks: " + ", ".join(command)
        lines.append(f"  {name:<12} {text}")
    return "\n".join([*lines, "", f"{prog} COMMAND --help tells more.", ""])


def _fail(name: str, message: str, status: int = 2) -> int:
    for line in message.splitlines():
        sys.stderr.write(f"{name}: error: {line}\n")
    return status


def _load(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _run(name: str, command: Command, argv: Sequence[str]) -> int:
    try:
        args: argparse.Namespace = _load(command.parser)().parse_args(argv)
        return _load(command.run)(args) or 0
    except VLLMValidationError as error:
        return _fail(name, str(error))
    except VLLMError as error:
        return _fail(name, str(error), status=1)
    except KeyboardInterrupt:
        return 130


def _dispatch(
    prog: str, commands: Mapping[str, Command | dict[str, Command]], argv: Sequence[str]
) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_usage(prog, commands))
        return 0 if argv else 2
    name, *rest = argv
    if name in commands:
        command = commands[name]
        if isinstance(command, Command):
            return _run(f"{prog} {name}", command, rest)
        return _dispatch(f"{prog} {name}", command, rest)
    if name in _NOT_YET[prog]:
        return _fail(prog, f"{name}: vLLM has this; this engine does not yet")
    guess = nearest(name, commands)
    hint = f"did you mean {guess}?" if guess else f"commands: {', '.join(commands)}"
    return _fail(prog, f"unknown command {name!r}; {hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vllm`` with ``argv`` (the process's by default); returns the exit status."""
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output, such as head, has had enough; nothing more can be flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-v", "--version"):
        from vllm import __version__

        sys.stdout.write(f"{__version__}\n")
        return 0
    return _dispatch("vllm", _COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
