"""The log's level, for this process and its children; lines that are logged once."""

import json
import logging
import os
import subprocess
import sys

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


def log_of_another_process(tmp_path, **variables):
    """What a process that imports the logger with these variables writes to stderr."""
    code = "from vllm.logger import init_logger; init_logger('vllm.example').warning('hello')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return result.stderr


def test_a_file_configures_the_log(tmp_path):
    file = tmp_path / "log.json"
    file.write_text(
        json.dumps(
            {
                "formatters": {"json": {"format": '{"message": "%(message)s"}'}},
                "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "json"}},
                "loggers": {"vllm": {"handlers": ["out"], "level": "INFO", "propagate": False}},
            }
        )
    )
    log = log_of_another_process(tmp_path, VLLM_LOGGING_CONFIG_PATH=str(file))
    assert log == '{"message": "hello"}\n'


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "Expecting property name"), ("[]", "no JSON object"), ('{"version": 3}', "3")],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, reason):
    file = tmp_path / "log.json"
    file.write_text(content)
    last = log_of_another_process(tmp_path, VLLM_LOGGING_CONFIG_PATH=str(file)).splitlines()[-1]
    assert "VLLM_LOGGING_CONFIG_PATH (--log-config-file)" in last
    assert str(file) in last
    assert reason in last


def test_a_prefix_stands_before_every_line(tmp_path):
    log = log_of_another_process(tmp_path, VLLM_LOGGING_PREFIX="100% pod-1 ")
    assert log.startswith("100% pod-1 WARNING ")


def test_logging_can_be_left_to_the_program(tmp_path):
    assert log_of_another_process(tmp_path, VLLM_CONFIGURE_LOGGING="0") == "hello\n"
