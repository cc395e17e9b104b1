"""What may happen to the KV cache round a forward pass, besides the pass itself.

Each hook is an object whose default does nothing: zeroing of blocks that are read before they are
written, the check that nobody writes another's bytes, and the worker half of a KV connector.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

import vllm.envs as envs
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorRole,
)
from vllm.forward_context import ForwardContext
from vllm.v1.kv_cache.allocate import AllocatedKVCache
from vllm.v1.kv_cache.blocks import KVBlockZeroer
from vllm.v1.kv_cache.debug import NullKVCacheDebugger
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec
from vllm.v1.outputs import KVConnectorOutput

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.block_table import BlockTable
    from vllm.v1.worker.input_batch import InputBatch
    from vllm.v1.worker.input_preparation import StepInputs

__all__ = [
    "ActiveConnectorStep",
    "BlockZeroing",
    "ConnectorStep",
    "WriteWatch",
    "connector_maker",
    "make_block_zeroing",
    "make_write_watch",
]


class BlockZeroing:
    """No cache of this plan needs its blocks zeroed."""

    def zero_new_blocks(self, scheduler_output: SchedulerOutput) -> None:
        """Clear the blocks that the scheduler has just taken from the pool."""


class _ZeroNewBlocks(BlockZeroing):
    def __init__(self, zeroer: KVBlockZeroer, debugger: NullKVCacheDebugger) -> None:
        self._zeroer = zeroer
        self._debugger = debugger

    def zero_new_blocks(self, scheduler_output: SchedulerOutput) -> None:
        for block_ids in scheduler_output.new_block_ids_to_zero or ():
            self._zeroer.zero_block_ids(block_ids)
            self._debugger.accept_blocks(block_ids)


def make_block_zeroing(caches: AllocatedKVCache, config: KVCacheConfig) -> BlockZeroing:
    if not config.needs_kv_cache_zeroing:
        return BlockZeroing()
    return _ZeroNewBlocks(KVBlockZeroer(caches.backing, config), caches.debugger)


class WriteWatch:
    """Nobody checks who writes where."""

    def expect_transfers(self, block_ids: Collection[int]) -> None:
        """A connector may write these blocks in this step, and until the next one."""

    def begin(self, batch: InputBatch, step: StepInputs) -> None:
        """The step is about to write the KV of its tokens."""

    def end(self) -> None:
        """The step has written all it writes.

        Raises:
            AssertionError: bytes changed that were not the step's to write.
        """

    def close(self) -> None:
        """No step will follow.

        Raises:
            AssertionError: bytes changed that nobody was allowed to write.
        """


class _DebugWriteWatch(WriteWatch):
    """VLLM_KV_CACHE_DEBUG: after each step only the blocks of its tokens may have changed."""

    def __init__(self, debugger: NullKVCacheDebugger, config: KVCacheConfig) -> None:
        self._debugger = debugger
        self._config = config
        self._arriving: set[int] = set()

    def expect_transfers(self, block_ids: Collection[int]) -> None:
        # What ended with the last step may still be written until this one begins.
        self._debugger.expect_outside_writes(self._arriving | set(block_ids))
        self._arriving = set(block_ids)

    def begin(self, batch: InputBatch, step: StepInputs) -> None:
        written = {}
        for index, group in enumerate(self._config.kv_cache_groups):
            spec = group.kv_cache_spec.manager_spec
            if isinstance(spec, MambaSpec):
                written[index] = self._state_blocks(spec, batch.block_table[index], batch, step)
                continue
            slots = step.attention[index].slot_mapping
            kernel_blocks = slots[slots >= 0] // batch.block_table[index].kernel_block_size
            ratio = self._config.kernel_blocks_per_block(index)
            written[index] = sorted(set((kernel_blocks // ratio).tolist()))
        self._debugger.begin_step(written)

    def _state_blocks(
        self, spec: MambaSpec, table: BlockTable, batch: InputBatch, step: StepInputs
    ) -> list[int]:
        """Blocks that hold the states after the step's tokens."""
        blocks: set[int] = set()
        computed = batch.num_computed[: step.num_reqs].tolist()
        for row, (before, new) in enumerate(
            zip(computed, step.num_scheduled.tolist(), strict=True)
        ):
            columns = spec.written_columns(before, before + new)
            held = range(columns.start, min(columns.stop, int(table.num_blocks[row])))
            blocks.update(table.array[row, held.start : held.stop].tolist())
        return sorted(blocks - {0})

    def end(self) -> None:
        self._debugger.end_step()
        self._debugger.expect_outside_writes(self._arriving)

    def close(self) -> None:
        self._debugger.accept_blocks(sorted(self._arriving))
        self._debugger.check_everything()


def make_write_watch(caches: AllocatedKVCache, config: KVCacheConfig) -> WriteWatch:
    if not envs.VLLM_KV_CACHE_DEBUG:
        return WriteWatch()
    return _DebugWriteWatch(caches.debugger, config)


class ConnectorStep:
    """No connector is configured: no KV comes or goes."""

    works_between_layers = False
    """Layers have to call in, so they must run one by one."""

    def register(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        kv_scales: Mapping[str, tuple[float, float]],
    ) -> None:
        """Once, after allocation: each layer's view in manager blocks, and its factors of K and V,
        by its name.
        """

    def unregister(self) -> None:
        """The caches' memory is about to be given back (sleep)."""

    def restore(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """The caches' memory is there again (wake-up), empty; arguments as of ``register``."""

    def begin(self, scheduler_output: SchedulerOutput, context: ForwardContext) -> None:
        """Before the forward pass: start what the step's metadata asks to load."""

    def end(self, scheduler_output: SchedulerOutput) -> KVConnectorOutput | None:
        """After the forward pass: wait for saves, and report what has ended; None for nothing."""
        return None

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Once, after registration: what other engines need to connect to this worker."""
        return None

    def register_callback(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called, from any thread, when ``end`` has something to report."""

    def close(self) -> None:
        """Stop all transfers."""


class _LayerCalls:
    """Tells a connector of each layer: most layers call in themselves.

    Those that do not (state and latent layers) are waited for before the forward pass and saved
    after it.
    """

    def __init__(self, connector: KVConnectorBase_V1, names: Iterable[str]) -> None:
        self._connector = connector
        self._names = frozenset(names)
        self._others: list[str] = []

    def begin(self, context: ForwardContext) -> None:
        layers = context.no_compile_layers
        self._others = [name for name in self._names if not layers[name].calls_kv_layer_hook]
        for name in self._others:
            self._connector.wait_for_layer_load(name)

    def before(self, layer_name: str) -> None:
        if layer_name in self._names:
            self._connector.wait_for_layer_load(layer_name)

    def after(self, layer_name: str, kv_cache: Any, attn_metadata: Any) -> None:
        if layer_name in self._names:
            self._connector.save_kv_layer(layer_name, kv_cache, attn_metadata)

    def end(self, kv_caches: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        for name in self._others:
            self._connector.save_kv_layer(name, kv_caches[name], metadata.get(name))


class ActiveConnectorStep(ConnectorStep):
    """Calls the worker half of a connector in the order that its interface asks for."""

    def __init__(self, connector: KVConnectorBase_V1) -> None:
        self._connector = connector
        self.works_between_layers = connector.works_between_layers
        self._kv_caches: dict[str, torch.Tensor] = {}
        self._layers = _LayerCalls(connector, ())
        self._context: ForwardContext | None = None

    def register(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        kv_scales: Mapping[str, tuple[float, float]],
    ) -> None:
        self._kv_caches = dict(kv_caches)
        self._layers = _LayerCalls(self._connector, kv_caches)
        self._connector.register_kv_scales(dict(kv_scales))
        self._connector.register_kv_caches(dict(kv_caches))

    def unregister(self) -> None:
        self._connector.unregister_kv_caches()

    def restore(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        self._kv_caches = dict(kv_caches)
        self._layers = _LayerCalls(self._connector, kv_caches)
        self._connector.restore_kv_caches(dict(kv_caches))

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._connector.get_handshake_metadata()

    def register_callback(self, callback: Callable[[], None]) -> None:
        self._connector.register_transfer_callback(callback)

    def begin(self, scheduler_output: SchedulerOutput, context: ForwardContext) -> None:
        metadata = scheduler_output.kv_connector_metadata
        self._connector.handle_preemptions(metadata)
        self._connector.bind_connector_metadata(metadata)
        self._connector.start_load_kv(context)
        self._context = None
        if self.works_between_layers and context.attn_metadata is not None:
            self._context = context
            self._layers.begin(context)
            context.kv_layer_hook = self._layers

    def end(self, scheduler_output: SchedulerOutput) -> KVConnectorOutput | None:
        connector = self._connector
        if self._context is not None:
            self._layers.end(self._kv_caches, self._context.attn_metadata or {})
            self._context = None
        connector.wait_for_save()
        results = connector.get_transfer_results(scheduler_output.finished_req_ids)
        output = KVConnectorOutput(
            finished_sending=results.finished_sending or None,
            finished_recving=results.finished_recving or None,
            failed_recving=set(results.failed_recving or ()),
            stuck_recving=set(results.stuck_recving or ()),
            invalid_block_ids=connector.get_block_ids_with_load_errors(),
            kv_connector_stats=connector.get_kv_connector_stats(),
            kv_cache_events=connector.get_kv_connector_kv_cache_events(),
            kv_connector_worker_meta=connector.build_connector_worker_meta(),
        )
        connector.clear_connector_metadata()
        return None if output.is_empty() else output

    def close(self) -> None:
        self._connector.shutdown()


def connector_maker(
    vllm_config: VllmConfig,
) -> Callable[[KVCacheConfig], KVConnectorBase_V1] | None:
    """What makes the worker half of the configured connector; None where none is configured."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return None

    def make(kv_cache_config: KVCacheConfig) -> KVConnectorBase_V1:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        return KVConnectorFactory.create_connector(
            vllm_config, KVConnectorRole.WORKER, kv_cache_config
        )

    return make
