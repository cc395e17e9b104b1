"""docs/models.md names the architectures of the registry and tests that there are."""

import re
from pathlib import Path

import pytest

from tests.models import checkpoints, linear_attention_checkpoints, state_checkpoints
from tests.models.test_engine_tensor_parallel import ROWS
from vllm.model_executor.models.registry import _BUILT_IN

HERE = Path(__file__).parent
TEXT = (HERE.parents[1] / "docs" / "models.md").read_text()


def section(title: str) -> str:
    return re.split(r"^## ", TEXT.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def rows(title: str) -> list[list[str]]:
    """Cells of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def defined_in(file: str) -> set[str]:
    """Tests that a file defines or takes over from another."""
    return set(re.findall(r"\b(test_\w+)\b", (HERE / file).read_text()))


def test_architectures_are_those_of_the_registry():
    named = [name for row in rows("Architectures") for name in quoted(row[0])]
    assert sorted(named) == sorted(_BUILT_IN)


def test_checkpoints_are_those_of_the_tests():
    named = {row[1] for row in rows("Architectures")}
    made = {
        *checkpoints.CLASSES,
        *state_checkpoints.CLASSES,
        *linear_attention_checkpoints.CLASSES,
        "bart",
    }
    assert named == made == {*ROWS, "bart"}


@pytest.mark.parametrize("column", [1, 2, 3, 4])
def test_tests_are_where_the_page_says(column):
    files, *others = rows("What is tested")
    known = [defined_in(file) for file in quoted(files[column])]
    assert known
    for row in others:
        for name in quoted(row[column]):
            if name.startswith("test_"):
                assert any(name in tests for tests in known), (row[0], name)


def test_files_and_tests_of_the_text_exist():
    text = section("What is tested")
    folders = [HERE, HERE.parent / "loader"]
    files = [name for name in quoted(text) if name.endswith(".py")]
    for name in files:
        bases = [HERE.parents[1]] if name.startswith("tests/") else folders
        assert any((base / name).is_file() for base in bases), name
    tests = set().union(*(defined_in(path.name) for path in HERE.glob("test_*.py")))
    assert {name for name in quoted(text) if re.fullmatch(r"test_\w+", name)} <= tests


def test_the_make_target_is_there():
    assert re.search(r"^test-debug:", (HERE.parents[1] / "Makefile").read_text(), re.M)
