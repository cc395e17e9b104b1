"""docs/kv_connectors.md names settings, metrics and tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.messages import MooncakeSettings
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import NixlSettings

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/kv_connectors.md").read_text()


def section(title: str) -> str:
    return re.split(r"^## ", TEXT.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def rows(text: str) -> list[list[str]]:
    """Cells of a table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def named(cell: str) -> list[str]:
    return re.findall(r"tests/[\w/]+\.py::\w+", cell)


SHOWN: dict[str, str] = {row[0]: row[1] for row in rows(section("Which test shows it"))}


@pytest.mark.parametrize("what", SHOWN)
def test_the_tests_that_the_page_names_exist(what):
    names = named(SHOWN[what])
    assert names and ", ".join(names) == SHOWN[what]
    for name in names:
        path, _, function = name.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        assert function in {node.name for node in tree.body if isinstance(node, kinds)}


def test_every_file_of_tests_shows_something():
    files = {name.partition("::")[0] for cell in SHOWN.values() for name in named(cell)}
    here = {f"tests/kv_transfer/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    assert here - files == {f"tests/kv_transfer/{Path(__file__).name}"}


@pytest.mark.parametrize(
    ("title", "settings"),
    [("Prefill and decode on different servers", NixlSettings), ("Mooncake", MooncakeSettings)],
)
def test_every_setting_is_explained(title, settings):
    explained = [row[0].strip("`") for row in rows(section(title))]
    assert sorted(explained) == sorted(settings.__struct_fields__)
