"""MooncakeConnector: prefill here, decode there, over Mooncake.

The prefill engine writes (push); requests to both are sent at the same time. Two halves:
``scheduler.MooncakeScheduler`` and ``worker.MooncakeWorker``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.distributed.kv_transfer.kv_connector.v1.compatibility import compatibility_factors
from vllm.distributed.kv_transfer.kv_connector.v1.halves import TwoHalvesConnector
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.messages import (
    CONNECTOR_VERSION,
    MooncakeStepMetadata,
    MooncakeTimes,
    parse_settings,
    split_host_port,
)
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.scheduler import MooncakeScheduler
from vllm.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.bootstrap import BootstrapServer
    from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.worker import MooncakeWorker
    from vllm.distributed.kv_transfer.transport.channel import ZmqChannel
    from vllm.forward_context import ForwardContext
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["MooncakeConnector"]


class MooncakeConnector(TwoHalvesConnector):
    """``kv_connector_extra_config`` is a ``messages.MooncakeSettings``.

    Raises:
        ConfigError: the settings cannot work, or Mooncake is not installed.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig | None,
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        assert kv_cache_config is not None
        transfer = self._kv_transfer_config
        assert transfer is not None
        buffer, device = transfer.kv_buffer_device, vllm_config.device_config.device_type
        if buffer not in (None, device):
            raise ConfigError(
                f"kv_buffer_device {buffer}: MooncakeConnector moves blocks from where they are "
                f"({device}); leave it out",
                parameter="kv_buffer_device",
                value=buffer,
            )
        self._settings = parse_settings(type(self).__name__, transfer.kv_connector_extra_config)
        self._worker: MooncakeWorker | None = None
        self._scales: dict[str, tuple[float, float]] = {}
        self._bootstrap: BootstrapServer | None = None
        self._teller: ZmqChannel | None = None
        """What the bootstrap server speaks to workers through."""
        self._left = KVConnectorTransferResults()
        """What a worker that has been stopped had to report."""
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = MooncakeScheduler(transfer, kv_cache_config)

    # Worker half

    def register_kv_scales(self, scales: dict[str, tuple[float, float]]) -> None:
        self._scales = scales

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.assembly import (
            local_side,
            make_worker,
        )
        from vllm.distributed.kv_transfer.transport.channel import ZmqChannel
        from vllm.distributed.kv_transfer.transport.mooncake import MooncakePort

        config, transfer = self._vllm_config, self._kv_transfer_config
        assert self._kv_cache_config is not None
        assert transfer is not None
        settings = self._settings
        host = envs.VLLM_HOST_IP
        port = MooncakePort(
            host, settings.mooncake_protocol, settings.device_name, settings.max_runs_in_flight
        )
        name = f"{type(self).__name__} {CONNECTOR_VERSION}"
        factors = compatibility_factors(config, name, self._scales)
        local = local_side(config, self._kv_cache_config, kv_caches, port, factors)
        channel = ZmqChannel(host if transfer.is_kv_producer else None)
        self._worker = make_worker(
            local,
            settings,
            MooncakeTimes(
                unclaimed=envs.VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT,
                silence=envs.VLLM_MOONCAKE_CONNECTOR_TIMEOUT,
            ),
            port,
            channel,
            sends=transfer.is_kv_producer,
            receives=transfer.is_kv_consumer,
        )
        self._introduce(self._worker)
        if transfer.is_kv_producer:
            self._let_decoders_find(local.shard.rank, local.shard.tp_size, channel.address)

    def _let_decoders_find(self, rank: int, tp_size: int, address: str) -> None:
        """Register with the bootstrap server; the first rank runs it."""
        from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.bootstrap import (
            BootstrapServer,
            Registration,
            make_bootstrap_app,
            register,
        )
        from vllm.distributed.kv_transfer.transport.channel import ZmqChannel

        assert self._kv_transfer_config is not None
        engine_id, session = self._kv_transfer_config.engine_id, self._vllm_config.instance_id
        given = self._settings.bootstrap_server_address
        host, port = envs.VLLM_HOST_IP, envs.VLLM_MOONCAKE_BOOTSTRAP_PORT
        if given is not None:
            host, port = split_host_port(type(self).__name__, given)
        if rank == 0:
            self._teller = ZmqChannel(None)
            app = make_bootstrap_app(engine_id, tp_size, session, self._teller.ask)
            self._bootstrap = BootstrapServer(host, port, app)
        worker = Registration(
            engine_id=engine_id, dp_rank=0, tp_rank=rank, pp_rank=0, addr=address, session=session
        )
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        register(url, worker, envs.VLLM_MOONCAKE_CONNECTOR_TIMEOUT)

    def unregister_kv_caches(self) -> None:
        self._stop()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, MooncakeStepMetadata)
        if metadata.says_something and self._worker is not None:
            self._worker.submit(metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end between steps."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Whole requests are sent once they have ended."""

    def wait_for_save(self) -> None:
        """Nothing is saved inside a step."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._worker is None:
            left, self._left = self._left, KVConnectorTransferResults()
            return left
        return self._worker.take_results()

    def get_kv_connector_stats(self) -> dict[str, float] | None:
        return None if self._worker is None else self._worker.take_stats()

    # Both

    def shutdown(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bootstrap is not None:
            self._bootstrap.close()
            self._bootstrap = None
        if self._teller is not None:
            self._teller.close()
            self._teller = None
        if self._worker is not None:
            self._worker.close()
            self._left = self._worker.take_results()
            self._worker = None
