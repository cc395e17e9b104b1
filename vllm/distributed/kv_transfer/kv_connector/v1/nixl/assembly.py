"""Puts a worker half together: registers the cache, describes it, starts the transfer thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import (
    AgentMetadata,
    NixlSettings,
    encode_payload,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.peers import AskHandshake, LocalSide
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.side_channel import ask_handshake
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.worker import TransferWorker
from vllm.distributed.kv_transfer.transport.port import TransferPort
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.kv_cache.descriptors import CacheDescriptor, describe
from vllm.v1.kv_cache.rearrange import Shard
from vllm.v1.kv_cache.runs import regions

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["make_worker", "start_worker", "total_heads"]

_NUM_SCRATCH = 1024


def total_heads(
    descriptor: CacheDescriptor, tp_size: int, model_heads: int
) -> dict[str, int | None]:
    """KV heads of the whole model, of each layer that is cut by head.

    A rank that holds one head may hold a copy: then the model's own count decides.
    """
    found: dict[str, int | None] = {}
    for layer in descriptor.layers:
        axis = layer.head_axis
        if axis is None:
            found[layer.name] = None
        elif axis.count == 1 and tp_size > 1:
            found[layer.name] = min(model_heads, tp_size)
        else:
            found[layer.name] = axis.count * tp_size
    return found


def start_worker(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    settings: NixlSettings,
    kv_caches: Mapping[str, torch.Tensor],
    port: TransferPort,
    factors: dict[str, str],
) -> tuple[TransferWorker, bytes]:
    """The transfer thread of this rank, and the payload that peers ask for."""
    view = next(iter(kv_caches.values()))
    storage = view.untyped_storage()
    base = storage.data_ptr()
    descriptor = describe(kv_cache_config, base)
    parts = [(base + region.offset, region.size_bytes) for region in regions(kv_cache_config)]
    port.register(parts, str(view.device))
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    local = LocalSide(
        engine_id=transfer.engine_id,
        session=vllm_config.instance_id,
        shard=Shard(tp_size=tp_size, rank=get_tensor_model_parallel_rank()),
        descriptor=descriptor,
        total_heads=total_heads(
            descriptor, tp_size, vllm_config.model_config.get_total_num_kv_heads()
        ),
        factors=factors,
    )
    return make_worker(local, settings, port, ask_handshake)


def make_worker(
    local: LocalSide,
    settings: NixlSettings,
    port: TransferPort,
    ask: AskHandshake,
    *,
    threaded: bool = True,
) -> tuple[TransferWorker, bytes]:
    """A worker over a port whose cache is registered already."""
    table = np.zeros(settings.max_leases, dtype=np.int64)
    scratch = np.zeros(_NUM_SCRATCH, dtype=np.int64)
    port.register([(array.ctypes.data, array.nbytes) for array in (table, scratch)], "cpu")
    metadata = AgentMetadata(
        engine_id=local.engine_id,
        session=local.session,
        tp_rank=local.shard.rank,
        tp_size=local.shard.tp_size,
        agent=port.metadata(),
        descriptor=local.descriptor.to_json(),
        total_heads=local.total_heads,
        lease_table=table.ctypes.data,
        num_leases=len(table),
        lease_seconds=settings.kv_lease_duration,
    )
    worker = TransferWorker(port, local, settings, ask, table, scratch, threaded=threaded)
    return worker, encode_payload(local.factors, metadata)
