"""Environment variables: read in one place, checked, and never ignored."""

import logging
import os
import subprocess
import sys

import pytest

import vllm.envs as envs
from vllm.errors import ConfigError, UnsupportedError


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in list(os.environ):
        if name.startswith("VLLM_"):
            monkeypatch.delenv(name)


def test_defaults():
    envs.validate_environ()
    assert envs.VLLM_CPU_KVCACHE_SPACE == 0
    assert envs.VLLM_ENABLE_V1_MULTIPROCESSING is True
    assert envs.VLLM_LOGGING_LEVEL == "INFO"
    assert envs.VLLM_API_KEY is None


@pytest.mark.parametrize("name", ["VLLM_PP_LAYER_PARTITION", "VLLM_RPC_TIMEOUT"])
def test_what_vllm_has_and_this_engine_lacks_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(UnsupportedError, match=f"{name}: vLLM has this; this engine does not yet"):
        envs.validate_environ()


def test_what_is_an_option_now_is_named(monkeypatch):
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "CPU_ATTN")
    with pytest.raises(UnsupportedError, match=r"VLLM_ATTENTION_BACKEND: .*--attention-backend"):
        envs.validate_environ()


def test_a_misspelt_variable_is_refused_with_the_nearest(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPASE", "4")
    with pytest.raises(UnsupportedError) as error:
        envs.validate_environ()
    assert str(error.value) == (
        "VLLM_CPU_KVCACHE_SPASE: unknown environment variable; did you mean VLLM_CPU_KVCACHE_SPACE?"
    )


@pytest.fixture
def warnings(monkeypatch):
    """The lines that the module logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("vllm.envs")
    monkeypatch.setattr(envs, "_warned", set())
    monkeypatch.setattr(logger, "level", logging.WARNING)
    monkeypatch.setattr(logger, "handlers", [handler])
    logger.manager._clear_cache()
    yield lines
    logger.manager._clear_cache()


def test_a_variable_that_nobody_knows_is_a_warning(monkeypatch, warnings):
    monkeypatch.setenv("VLLM_IMAGE_OF_OURS", "4")
    envs.validate_environ()
    envs.validate_environ()
    assert warnings == ["VLLM_IMAGE_OF_OURS: unknown environment variable; it changes nothing"]


def test_a_variable_that_nobody_knows_is_refused_where_asked(monkeypatch):
    monkeypatch.setenv("VLLM_IMAGE_OF_OURS", "4")
    with pytest.raises(UnsupportedError, match="VLLM_IMAGE_OF_OURS: unknown environment variable"):
        envs.validate_environ(fail_on_unknown=True)


def test_what_kubernetes_sets_for_a_service_passes(monkeypatch, warnings):
    """In a namespace with a Service named vllm, or vllm-router, each pod has these."""
    for service in ("VLLM", "VLLM_ROUTER"):
        for name, value in {
            "SERVICE_HOST": "10.0.0.1",
            "SERVICE_PORT": "8000",
            "SERVICE_PORT_HTTP": "8000",
            "PORT": "tcp://10.0.0.1:8000",
            "PORT_8000_TCP": "tcp://10.0.0.1:8000",
            "PORT_8000_TCP_PROTO": "tcp",
            "PORT_8000_TCP_PORT": "8000",
            "PORT_8000_TCP_ADDR": "10.0.0.1",
        }.items():
            monkeypatch.setenv(f"{service}_{name}", value)
    envs.validate_environ(fail_on_unknown=True)
    assert warnings == []


def test_a_port_that_is_no_service_link_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_PORT", "8000")
    with pytest.raises(UnsupportedError, match="VLLM_PORT: vLLM has this"):
        envs.validate_environ()


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("VLLM_NO_USAGE_STATS", "1", "0"),
        ("VLLM_USE_V1", "1", "0"),
        ("VLLM_USE_MODELSCOPE", "False", "True"),
        ("VLLM_WORKER_MULTIPROC_METHOD", "spawn", "fork"),
    ],
)
def test_values_that_change_nothing_pass(monkeypatch, name, good, bad):
    monkeypatch.setenv(name, good)
    envs.validate_environ()
    monkeypatch.setenv(name, bad)
    with pytest.raises(UnsupportedError, match=f"{name}={bad}: vLLM has this"):
        envs.validate_environ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VLLM_CPU_KVCACHE_SPACE", "lots"),
        ("VLLM_CPU_KVCACHE_SPACE", "-1"),
        ("VLLM_CPU_KVCACHE_SPACE", "nan"),
        ("VLLM_CPU_KVCACHE_SPACE", "inf"),
        ("VLLM_ENGINE_READY_TIMEOUT_S", "0"),
        ("VLLM_ENGINE_READY_TIMEOUT_S", "soon"),
        ("VLLM_KV_CACHE_LAYOUT", "HDN"),
        ("VLLM_KV_CACHE_DEBUG", "maybe"),
        ("VLLM_LOGGING_LEVEL", "LOUD"),
    ],
)
def test_a_bad_value_names_the_variable(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        envs.validate_environ()


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("true", True), ("0", False), ("", False)]
)
def test_switches(monkeypatch, text, value):
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", text)
    assert envs.VLLM_KV_CACHE_DEBUG is value


def test_cache_root_follows_the_standard(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert envs.VLLM_CACHE_ROOT == "/cache/vllm"
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/elsewhere")
    assert envs.VLLM_CACHE_ROOT == "/elsewhere"


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="VLLM_NOPE"):
        envs.VLLM_NOPE  # noqa: B018


@pytest.mark.parametrize("command", [["serve", "smollm2"], ["chat", "-q", "x"]])
def test_the_command_refuses_before_it_starts(command):
    result = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", *command],
        env={**os.environ, "VLLM_RPC_TIMEOUT": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == (
        f"vllm {command[0]}: error: VLLM_RPC_TIMEOUT: vLLM has this; this engine does not yet; "
        "unset it\n"
    )
