"""``vllm complete``: text, one prompt at a time, completed by a running server."""

from __future__ import annotations

import argparse
import sys

import vllm.envs as envs
from vllm.entrypoints.cli.client import ClientArgs, ServerClient, client_parser, prompts
from vllm.utils.argparse_utils import FlexibleArgumentParser

__all__ = ["make_parser", "run"]


def make_parser() -> FlexibleArgumentParser:
    """The parser of ``vllm complete``."""
    return client_parser("vllm complete", "Complete text with a running server.", ClientArgs)


def _complete(client: ServerClient, prompt: str) -> None:
    for choice in client.stream("completions", {"prompt": prompt}):
        sys.stdout.write(choice.get("text") or "")
        sys.stdout.flush()
    sys.stdout.write("\n")


def run(args: argparse.Namespace) -> int:
    """Complete prompts until end of file.

    Raises:
        VLLMError: the server does not answer, or answers with an error.
    """
    envs.validate_environ()
    client = ServerClient(args)
    if args.quick is not None:
        _complete(client, args.quick)
        return 0
    sys.stderr.write(f"Completing with {client.model}; Ctrl-D ends it.\n")
    for prompt in prompts():
        _complete(client, prompt)
    return 0
