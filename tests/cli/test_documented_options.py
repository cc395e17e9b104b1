"""What the pages tell people to type exists: options, variables, commands, endpoints, parsers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vllm.envs as envs
from vllm.engine.not_yet import NOT_YET
from vllm.entrypoints.cli import bench, chat, complete, kv_plan, router, run_batch, serve
from vllm.entrypoints.cli.main import _COMMANDS
from vllm.entrypoints.openai.tool_parsers.manager import ToolParserManager
from vllm.reasoning.manager import ReasoningParserManager

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FROM_VLLM = (ROOT / "docs" / "from_vllm.md").read_text()
# Options of other commands: pip, ray, pytest.
OTHERS = {"--head", "--address", "--no-build-isolation", "--help", "--editable"}


@pytest.fixture(scope="module")
def options() -> set[str]:
    parsers = [
        *(module.make_parser() for module in (chat, complete, kv_plan, router, run_batch, serve)),
        bench.serve_parser(),
        bench.throughput_parser(),
        bench.latency_parser(),
    ]
    known = {option for parser in parsers for option in parser._option_string_actions}
    return known | {entry.option for entry in NOT_YET.values()} | OTHERS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_exists(page: Path, options: set[str]):
    text = page.read_text()
    # Scripts of benchmarks and examples have options of their own.
    text = re.sub(r"`?python [\w./-]+\.py[^`\n]*", "", text)
    named = {option.rstrip("-") for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)}
    assert sorted(named - options) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_variable_exists(page: Path):
    named = set(re.findall(r"\bVLLM_[A-Z0-9_]*[A-Z0-9]\b", page.read_text()))
    # What LMCache looks for and does not find.
    named.discard("VLLM_RPC_BASE_PATH")
    assert sorted(named - set(envs.variables)) == []


def test_every_command_stands_on_the_page():
    commands = {*_COMMANDS, "bench serve", "bench latency", "bench throughput"} - {"bench"}
    for command in commands:
        assert re.search(rf"`(?:vllm )?{command}`", FROM_VLLM), command


def test_parsers_on_the_page_are_those_there_are():
    tools = re.search(r"--tool-call-parser NAME`\): (.*?)\. `tool_choice`", FROM_VLLM, re.DOTALL)
    reasoning = re.search(r"--reasoning-parser NAME`\): (.*?); it comes as", FROM_VLLM, re.DOTALL)

    def names(text: str) -> list[str]:
        return re.findall(r"\w+", re.sub(r"\([^)]*\)", "", text))

    assert names(tools[1]) == sorted(ToolParserManager._lazy)
    assert names(reasoning[1]) == sorted(ReasoningParserManager._lazy)
