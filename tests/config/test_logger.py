"""The log's level, for this process and its children; lines that are logged once."""

import logging

import pytest

import vllm.envs as envs
from vllm.logger import init_logger, log_once, set_level


@pytest.fixture
def logger(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    root = logging.getLogger("vllm")
    level = root.level
    yield init_logger("vllm.example")
    root.setLevel(level)


def test_the_level_is_set_here_and_for_children(logger):
    set_level("WARNING")
    assert envs.VLLM_LOGGING_LEVEL == "WARNING"
    assert not logger.isEnabledFor(logging.INFO)
    set_level("DEBUG")
    assert logger.isEnabledFor(logging.DEBUG)


def test_a_line_is_logged_once(logger):
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    set_level("INFO")
    for _ in range(3):
        log_once(logger, logging.INFO, "only once, please")
    logger.removeHandler(handler)
    assert lines == ["only once, please"]


def test_lines_are_in_vllms_form(logger):
    handler = logging.getLogger("vllm").handlers[0]
    record = logger.makeRecord(logger.name, logging.INFO, "f.py", 12, "hello", (), None)
    line = handler.format(record)
    assert line.startswith("INFO ")
    assert line.endswith(" [vllm.example:12] hello")
