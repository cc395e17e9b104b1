"""Puts a worker half together: registers the cache, describes it, listens, starts the thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.compatibility import compatibility_hash
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.directory import (
    Directory,
    EngineEntry,
    ask_bootstrap,
)
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.messages import (
    MooncakeSettings,
    MooncakeTimes,
    PeerLayout,
)
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.receiver import Receiver
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.sender import Sender
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.worker import MooncakeWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.assembly import total_heads
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.peers import LocalSide
from vllm.distributed.kv_transfer.kv_connector.v1.reports import Reports
from vllm.distributed.kv_transfer.kv_connector.v1.seals import engine_secret, public_session
from vllm.distributed.kv_transfer.transport.channel import Channel
from vllm.distributed.kv_transfer.transport.port import CopyPort
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.kv_cache.descriptors import describe
from vllm.v1.kv_cache.rearrange import Shard
from vllm.v1.kv_cache.runs import regions

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["local_side", "make_worker"]


def local_side(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    kv_caches: Mapping[str, torch.Tensor],
    port: CopyPort,
    factors: dict[str, str],
) -> LocalSide:
    """This rank's cache and place, its regions registered with ``port``.

    Raises:
        PortError: a region cannot be registered.
    """
    view = next(iter(kv_caches.values()))
    base = view.untyped_storage().data_ptr()
    parts = [(base + region.offset, region.size_bytes) for region in regions(kv_cache_config)]
    port.register(parts, str(view.device))
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    descriptor = describe(kv_cache_config, base)
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    return LocalSide(
        engine_id=transfer.engine_id,
        session=public_session(vllm_config.instance_id),
        secret=engine_secret(vllm_config.instance_id),
        shard=Shard(tp_size=tp_size, rank=get_tensor_model_parallel_rank()),
        descriptor=descriptor,
        total_heads=total_heads(
            descriptor, tp_size, vllm_config.model_config.get_total_num_kv_heads()
        ),
        factors=factors,
    )


def make_worker(
    local: LocalSide,
    settings: MooncakeSettings,
    times: MooncakeTimes,
    port: CopyPort,
    channel: Channel,
    *,
    sends: bool,
    receives: bool,
    ask: Callable[[str], dict[int, EngineEntry]] = ask_bootstrap,
    clock: Callable[[], float] = time.monotonic,
    threaded: bool = True,
) -> MooncakeWorker:
    """A worker over a port whose cache is registered already."""
    reports = Reports()
    sender = receiver = None
    if sends:
        sender = Sender(port, channel, local, settings, times, reports, clock)
    if receives:
        layout = PeerLayout(
            engine_id=local.engine_id,
            session=local.session,
            tp_rank=local.shard.rank,
            tp_size=local.shard.tp_size,
            agent=port.metadata(),
            descriptor=local.descriptor.to_json(),
            total_heads=local.total_heads,
            factors=local.factors,
            compatibility_hash=compatibility_hash(local.factors),
        )
        heads = tuple(sorted({count for count in local.total_heads.values() if count}))
        receiver = Receiver(
            channel, Directory(ask, clock), layout, heads, settings, times, reports, clock
        )
    return MooncakeWorker(port, channel, sender, receiver, reports, threaded=threaded)
