"""Plug-ins: functions that outside packages register under ``vllm.general_plugins``.

Every process (API server, engine core, worker) calls ``load_general_plugins`` once before it uses
a registry, so what a plug-in registers is known everywhere. ``VLLM_PLUGINS`` names the ones to
load, separated by commas; unset loads all, empty none. Knows nothing of what plug-ins do.
"""

from importlib.metadata import EntryPoint, entry_points

import vllm.envs as envs
from vllm.errors import ConfigError
from vllm.logger import init_logger
from vllm.utils.flags import nearest

__all__ = ["GENERAL_PLUGINS_GROUP", "PLATFORM_PLUGINS_GROUP", "load_general_plugins"]

logger = init_logger(__name__)

GENERAL_PLUGINS_GROUP = "vllm.general_plugins"
PLATFORM_PLUGINS_GROUP = "vllm.platform_plugins"

_loaded: set[str] = set()


def _wanted(points: list[EntryPoint]) -> list[EntryPoint]:
    """The general plug-ins that ``VLLM_PLUGINS`` lets through.

    Raises:
        ConfigError: it names a plug-in that is not installed.
    """
    chosen = envs.VLLM_PLUGINS
    if chosen is None:
        return points
    names = {name.strip() for name in chosen.split(",") if name.strip()}
    installed = {point.name for point in points}
    installed |= {point.name for point in entry_points(group=PLATFORM_PLUGINS_GROUP)}
    for name in sorted(names - installed):
        guess = nearest(name, installed)
        hint = f"did you mean {guess}?" if guess else f"installed: {sorted(installed) or 'none'}"
        raise ConfigError(
            f"VLLM_PLUGINS names {name!r}, which is not installed; {hint}",
            parameter="VLLM_PLUGINS",
            value=name,
        )
    return [point for point in points if point.name in names]


def load_general_plugins() -> None:
    """Call every wanted plug-in that this process has not called yet.

    Raises:
        ConfigError: a plug-in failed; the message names it and how to leave it out.
    """
    for point in _wanted(list(entry_points(group=GENERAL_PLUGINS_GROUP))):
        if point.name in _loaded:
            continue
        try:
            point.load()()
        except Exception as error:
            raise ConfigError(
                f"plug-in {point.name} ({point.value}) failed: {type(error).__name__}: {error}; "
                "leave it out with VLLM_PLUGINS",
                parameter="VLLM_PLUGINS",
                value=point.name,
            ) from error
        _loaded.add(point.name)
        logger.info("Loaded plug-in %s (%s)", point.name, point.value)
