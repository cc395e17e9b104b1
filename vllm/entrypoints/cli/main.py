"""``vllm``: finds the subcommand and imports it alone, so that help is quick.

A subcommand is a module with ``make_parser()`` and ``run(args)``. Nothing heavy is imported here,
nor by the modules named in ``_COMMANDS`` before ``run``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from vllm.errors import VLLMError, VLLMValidationError
from vllm.utils.flags import nearest

__all__ = ["main"]

_COMMANDS = {
    "serve": ("vllm.entrypoints.cli.serve", "Serve a model over an OpenAI-compatible HTTP API."),
    "chat": ("vllm.entrypoints.cli.chat", "Chat with a running server."),
    "complete": ("vllm.entrypoints.cli.complete", "Complete text with a running server."),
    "bench": ("vllm.entrypoints.cli.bench", "Benchmarks: serve, throughput, latency."),
    "collect-env": ("vllm.entrypoints.cli.collect_env", "Print what this installation runs on."),
}
_NOT_YET = ("download-kernels", "launch", "preload", "run-batch", "snapshot")


def _usage() -> str:
    lines = ["usage: vllm COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<12} {text}" for name, (_, text) in _COMMANDS.items()]
    return "\n".join(
        [*lines, "", "vllm COMMAND --help tells more; vllm --version the version.", ""]
    )


def _fail(name: str, message: str, status: int = 2) -> int:
    for line in message.splitlines():
        sys.stderr.write(f"{name}: error: {line}\n")
    return status


def _run(command: str, argv: Sequence[str]) -> int:
    module = import_module(_COMMANDS[command][0])
    name = f"vllm {command}"
    try:
        return module.run(module.make_parser().parse_args(argv)) or 0
    except VLLMValidationError as error:
        return _fail(name, str(error))
    except VLLMError as error:
        return _fail(name, str(error), status=1)
    except KeyboardInterrupt:
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vllm`` with ``argv`` (the process's by default); returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0 if arguments else 2
    command = arguments[0]
    if command in ("-v", "--version"):
        from vllm import __version__

        sys.stdout.write(f"{__version__}\n")
        return 0
    if command in _COMMANDS:
        return _run(command, arguments[1:])
    if command in _NOT_YET:
        return _fail("vllm", f"{command}: vLLM has this; this engine does not yet")
    guess = nearest(command, _COMMANDS)
    hint = f"did you mean {guess}?" if guess else f"commands: {', '.join(_COMMANDS)}"
    return _fail("vllm", f"unknown command {command!r}; {hint}")


if __name__ == "__main__":
    sys.exit(main())
