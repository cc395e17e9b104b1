"""General plug-ins: found, chosen by VLLM_PLUGINS, called once, and named when they fail."""

import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

import vllm.plugins as plugins
from vllm.errors import ConfigError


@pytest.fixture
def installed(monkeypatch):
    """Two plug-ins of an installed package; the list of calls they got."""
    calls: list[str] = []
    module = ModuleType("a_plugin_package")
    module.first = lambda: calls.append("first")
    module.second = lambda: calls.append("second")
    module.broken = lambda: 1 / 0
    monkeypatch.setitem(sys.modules, "a_plugin_package", module)
    points = [
        EntryPoint(name, f"a_plugin_package:{name}", plugins.GENERAL_PLUGINS_GROUP)
        for name in ("first", "second")
    ]
    monkeypatch.setattr(
        plugins,
        "entry_points",
        lambda group: points if group == plugins.GENERAL_PLUGINS_GROUP else [],
    )
    monkeypatch.setattr(plugins, "_loaded", set())
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return points, calls


def test_all_are_called_once(installed):
    plugins.load_general_plugins()
    plugins.load_general_plugins()
    assert installed[1] == ["first", "second"]


@pytest.mark.parametrize(
    ("variable", "called"),
    [("second", ["second"]), (" first , second", ["first", "second"]), ("", [])],
)
def test_the_variable_chooses(installed, monkeypatch, variable, called):
    monkeypatch.setenv("VLLM_PLUGINS", variable)
    plugins.load_general_plugins()
    assert installed[1] == called


def test_a_name_that_is_not_installed(installed, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "frist")
    with pytest.raises(ConfigError, match=r"VLLM_PLUGINS names .frist., .*did you mean first"):
        plugins.load_general_plugins()


def test_one_that_fails_is_named(installed):
    points, _ = installed
    points.append(EntryPoint("broken", "a_plugin_package:broken", plugins.GENERAL_PLUGINS_GROUP))
    with pytest.raises(ConfigError, match=r"plug-in broken \(a_plugin_package:broken\) failed"):
        plugins.load_general_plugins()
