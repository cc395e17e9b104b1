"""What a configured connector asks of the cache's layout, before any connector is built.

Owns the names of the connectors that move blocks by the cache's descriptors, in whatever layout.
A connector from outside states a layout through ``get_required_kvcache_layout``, or gets LBHNC.
Imports no torch; a connector's class is only loaded where it comes from outside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.errors import ConfigError
from vllm.utils.flags import nearest
from vllm.v1.kv_cache.resolver import CacheMovement
from vllm.v1.kv_cache_layout import KVCacheLayout

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig

__all__ = ["DESCRIPTOR_CONNECTORS", "cache_movement", "movement_of", "part_configs"]

DESCRIPTOR_CONNECTORS = (
    "MooncakeConnector",
    "MooncakeStoreConnector",
    "NixlConnector",
    "NixlPushConnector",
    "OffloadingConnector",
    "SimpleCPUOffloadConnector",
)
"""They copy byte runs of descriptors and never look at a tensor's shape."""
VIEW_CONNECTORS = ("ExampleConnector",)
"""They read and write layers' views, which mean the same in every layout."""
OUTSIDE_CONNECTORS = ("FlexKVConnectorV1", "LMCacheConnectorV1", "LMCacheMPConnector")
"""Packages of their own, which read a layer's tensor."""


def movement_of(connector: str) -> CacheMovement:
    """The movement of a connector known by name; "Nixl" is short for NixlConnector.

    Raises:
        ConfigError: the name is unknown.
    """
    names = (*DESCRIPTOR_CONNECTORS, *VIEW_CONNECTORS, *OUTSIDE_CONNECTORS)
    known = {name.lower(): name for name in names}
    for suffix in ("", "connector", "connectorv1"):
        name = known.get(connector.lower() + suffix)
        if name in DESCRIPTOR_CONNECTORS:
            return CacheMovement(connector=name, takes_descriptors=True)
        if name in VIEW_CONNECTORS:
            return CacheMovement(connector=name)
        if name is not None:
            return CacheMovement(connector=name, layout=KVCacheLayout.LBHNC)
    guess = nearest(connector, names)
    hint = f"did you mean {guess}?" if guess else f"known: {', '.join(sorted(names))}"
    raise ConfigError(
        f"connector {connector!r} is unknown; {hint}", parameter="kv_connector", value=connector
    )


def cache_movement(vllm_config: VllmConfig) -> CacheMovement | None:
    """What moves blocks of this engine, None where nothing does.

    Raises:
        ConfigError: the connector is unknown, its module has no such class, or the parts of a
            MultiConnector need different layouts.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return None
    return _movement_of_config(vllm_config, transfer)


def _movement_of_config(vllm_config: VllmConfig, transfer: KVTransferConfig) -> CacheMovement:
    name = transfer.kv_connector
    assert name is not None
    if transfer.kv_connector_module_path is None:
        if name in DESCRIPTOR_CONNECTORS:
            return CacheMovement(connector=name, takes_descriptors=True)
        if name in VIEW_CONNECTORS:
            return CacheMovement(connector=name)
        if name == "MultiConnector":
            return _movement_of_parts(vllm_config, transfer)
    connector = KVConnectorFactory.get_connector_class(transfer)
    stated = connector.get_required_kvcache_layout(vllm_config)
    layout = KVCacheLayout.LBHNC if stated is None else KVCacheLayout.from_str(stated)
    return CacheMovement(connector=name, layout=layout)


def _movement_of_parts(vllm_config: VllmConfig, transfer: KVTransferConfig) -> CacheMovement:
    """What suits all parts of a MultiConnector: the layout that some state, all the same one."""
    parts = [_movement_of_config(vllm_config, part) for part in part_configs(transfer)]
    stated = {part.layout: part.connector for part in parts if part.layout is not None}
    if len(stated) > 1:
        needs = ", ".join(f"{name} needs {layout}" for layout, name in stated.items())
        raise ConfigError(
            f"MultiConnector: its connectors cannot share one cache: {needs}",
            parameter="kv_connector_extra_config",
        )
    return CacheMovement(
        connector="MultiConnector",
        layout=next(iter(stated), None),
        takes_descriptors=any(part.takes_descriptors for part in parts),
    )


def part_configs(transfer: KVTransferConfig) -> list[KVTransferConfig]:
    """The configurations in ``kv_connector_extra_config["connectors"]`` of a MultiConnector.

    Parts without an ``engine_id`` have that of the whole.

    Raises:
        ConfigError: there is none, or one is no configuration of a connector.
    """
    given = transfer.kv_connector_extra_config.get("connectors")
    if not isinstance(given, list) or not given:
        raise ConfigError(
            'MultiConnector needs kv_connector_extra_config {"connectors": [{"kv_connector": '
            'NAME, "kv_role": ROLE, ...}, ...]}',
            parameter="kv_connector_extra_config",
            value=given,
        )
    defaults = {
        "engine_id": transfer.engine_id,
        "kv_role": transfer.kv_role,
        "kv_load_failure_policy": transfer.kv_load_failure_policy,
    }
    try:
        parts = [msgspec.convert({**defaults, **part}, type(transfer)) for part in given]
    except (msgspec.ValidationError, TypeError) as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(
            f"MultiConnector: {error}", parameter="kv_connector_extra_config"
        ) from None
    if any(part.kv_connector is None for part in parts):
        raise ConfigError(
            "MultiConnector: every entry of connectors needs a kv_connector",
            parameter="kv_connector_extra_config",
        )
    return parts
