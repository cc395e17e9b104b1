"""Puts a worker half together: registers the cache, describes it, starts the transfer thread."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm.distributed.kv_transfer.conversion import format_name
from vllm.distributed.kv_transfer.costs import HOST_COPIES, NVLINK
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import (
    AgentMetadata,
    NixlSettings,
    encode_payload,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.peers import AskHandshake, LocalSide
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.side_channel import ask_handshake
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.worker import TransferWorker
from vllm.distributed.kv_transfer.kv_connector.v1.seals import engine_secret, public_session
from vllm.distributed.kv_transfer.staging import StagingRing
from vllm.distributed.kv_transfer.transport.port import TransferPort
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.utils.huge_pages import advise_huge_pages
from vllm.v1.kv_cache.descriptors import CacheDescriptor, describe
from vllm.v1.kv_cache.rearrange import Shard
from vllm.v1.kv_cache.runs import regions

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["make_ring", "make_worker", "start_worker", "total_heads"]

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
    *,
    pushes: bool = False,
) -> tuple[TransferWorker, bytes]:
    """The transfer thread of this rank, and the payload that peers ask for."""
    view = next(iter(kv_caches.values()))
    storage = view.untyped_storage()
    base = storage.data_ptr()
    backing = torch.empty(0, dtype=torch.int8, device=view.device).set_(storage)
    descriptor = describe(kv_cache_config, base)
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    on_host = transfer.kv_buffer_device == "cpu"
    if view.device.type == "cpu":
        advise_huge_pages(base, backing.numel())
    if not on_host:
        parts = [(base + region.offset, region.size_bytes) for region in regions(kv_cache_config)]
        port.register(parts, str(view.device))
    ring = make_ring(backing, settings, "cpu" if on_host else None)
    if ring is not None:
        port.register([ring.region], "cpu" if ring.shape.on_host else str(view.device))
    model = vllm_config.model_config
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    local = LocalSide(
        engine_id=transfer.engine_id,
        session=public_session(vllm_config.instance_id),
        secret=engine_secret(vllm_config.instance_id),
        shard=Shard(tp_size=tp_size, rank=get_tensor_model_parallel_rank()),
        descriptor=descriptor,
        total_heads=total_heads(
            descriptor, tp_size, vllm_config.model_config.get_total_num_kv_heads()
        ),
        factors=factors,
        device=str(view.device),
        number_format=format_name(vllm_config.cache_config.cache_dtype, model.dtype_name),
        ring=None if ring is None else ring.shape,
        registers_blocks=not on_host,
    )
    return make_worker(local, settings, port, ask_handshake, ring=ring, pushes=pushes)


def make_ring(
    backing: torch.Tensor, settings: NixlSettings, device: str | None = None
) -> StagingRing | None:
    """The staging ring that the settings ask for; None for none."""
    if settings.staging_slots == 0:
        return None
    costs = NVLINK if backing.is_cuda else HOST_COPIES
    size = settings.staging_slot_bytes or costs.slot_bytes
    return StagingRing(backing, settings.staging_slots or costs.num_slots, size, device)


def make_worker(
    local: LocalSide,
    settings: NixlSettings,
    port: TransferPort,
    ask: AskHandshake,
    *,
    ring: StagingRing | None = None,
    pushes: bool = False,
    threaded: bool = True,
) -> tuple[TransferWorker, bytes]:
    """A worker over a port whose cache and ring are registered already."""
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
        number_format=local.number_format,
        ring=None if local.ring is None else dataclasses.asdict(local.ring),
        registers_blocks=local.registers_blocks,
    )
    # Whom this engine fetches from need not know by what it seals.
    hello = encode_payload(local.factors, metadata)
    metadata.secret = local.secret
    encoded = encode_payload(local.factors, metadata)
    worker = TransferWorker(
        port,
        local,
        settings,
        ask,
        table,
        scratch,
        hello=hello,
        ring=ring,
        pushes=pushes,
        threaded=threaded,
    )
    return worker, encoded
