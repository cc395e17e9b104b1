"""What the benchmarks of the engine in this process share: its making, and its prompts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.engine.arg_utils import EngineArgs

if TYPE_CHECKING:
    from vllm.entrypoints.llm import LLM

__all__ = ["check_lengths", "make_llm", "write_json"]


def make_llm(args: argparse.Namespace) -> LLM:
    """An ``LLM`` with the engine options of ``args``."""
    from vllm.entrypoints.llm import LLM

    given = {name: getattr(args, name) for name in EngineArgs.flags() if hasattr(args, name)}
    return LLM(**given)


def check_lengths(llm: LLM, longest: int, options: str) -> None:
    """Refuse a benchmark whose longest request the model cannot take.

    Raises:
        ConfigError: naming ``options``.
    """
    from vllm.errors import ConfigError

    limit = llm.llm_engine.model_config.max_model_len
    if longest > limit:
        raise ConfigError(
            f"{options} come to {longest} tokens, more than --max-model-len {limit}",
            parameter="max_model_len",
            value=longest,
        )


def write_json(path: str | None, document: dict[str, Any]) -> None:
    """Write ``document`` to ``path``, if there is one."""
    if path is not None:
        Path(path).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
