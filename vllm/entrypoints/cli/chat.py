"""``vllm chat``: a conversation with a running server; the history goes along."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import vllm.envs as envs
from vllm.entrypoints.cli.client import ClientArgs, ServerClient, client_parser, prompts
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.flags import Kind, arg

__all__ = ["make_parser", "run"]


@dataclass(frozen=True, kw_only=True)
class ChatArgs(ClientArgs):
    """Options of ``vllm chat``."""

    system_prompt: str | None = arg(
        None, "options", Kind.STR, "System message that the conversation begins with."
    )


def make_parser() -> FlexibleArgumentParser:
    """The parser of ``vllm chat``."""
    return client_parser("vllm chat", "Chat with a running server.", ChatArgs)


def _answer(client: ServerClient, conversation: list[dict[str, str]]) -> str:
    """Print the answer as it comes, and return it."""
    parts: list[str] = []
    for choice in client.stream("chat/completions", {"messages": conversation}):
        text = choice["delta"].get("content") or ""
        parts.append(text)
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return "".join(parts)


def run(args: argparse.Namespace) -> int:
    """Chat until end of file.

    Raises:
        VLLMError: the server does not answer, or answers with an error.
    """
    envs.validate_environ()
    client = ServerClient(args)
    conversation: list[dict[str, str]] = []
    if args.system_prompt is not None:
        conversation.append({"role": "system", "content": args.system_prompt})
    if args.quick is not None:
        _answer(client, [*conversation, {"role": "user", "content": args.quick}])
        return 0
    sys.stderr.write(f"Chatting with {client.model}; Ctrl-D ends it.\n")
    for message in prompts():
        conversation.append({"role": "user", "content": message})
        conversation.append({"role": "assistant", "content": _answer(client, conversation)})
    return 0
