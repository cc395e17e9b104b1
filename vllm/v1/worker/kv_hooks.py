"""What may happen to the KV cache round a forward pass, besides the pass itself.

Each hook is an object whose default does nothing: zeroing of blocks that are read before they are
written, the check that nobody writes another's bytes, and the worker half of a KV connector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

import vllm.envs as envs
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.forward_context import ForwardContext
from vllm.v1.kv_cache.allocate import AllocatedKVCache
from vllm.v1.kv_cache.blocks import KVBlockZeroer
from vllm.v1.kv_cache.debug import NullKVCacheDebugger
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec
from vllm.v1.outputs import KVConnectorOutput

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.block_table import BlockTable
    from vllm.v1.worker.input_batch import InputBatch
    from vllm.v1.worker.input_preparation import StepInputs

__all__ = [
    "ActiveConnectorStep",
    "BlockZeroing",
    "ConnectorStep",
    "WriteWatch",
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

    def close(self) -> None:
        self._debugger.check_everything()


def make_write_watch(caches: AllocatedKVCache, config: KVCacheConfig) -> WriteWatch:
    if not envs.VLLM_KV_CACHE_DEBUG:
        return WriteWatch()
    return _DebugWriteWatch(caches.debugger, config)


class ConnectorStep:
    """No connector is configured: no KV comes or goes."""

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Once, after allocation: each layer's view in manager blocks, by its name."""

    def unregister(self) -> None:
        """The caches' memory is about to be given back (sleep)."""

    def restore(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """The caches' memory is there again (wake-up), empty; arguments as of ``register``."""

    def begin(self, scheduler_output: SchedulerOutput, context: ForwardContext) -> None:
        """Before the forward pass: start what the step's metadata asks to load."""

    def end(self, scheduler_output: SchedulerOutput) -> KVConnectorOutput | None:
        """After the forward pass: wait for saves, and report what has ended; None for nothing."""
        return None

    def close(self) -> None:
        """Stop all transfers."""


class ActiveConnectorStep(ConnectorStep):
    """Calls the worker half of a connector in the order that its interface asks for."""

    def __init__(self, connector: KVConnectorBase_V1) -> None:
        self._connector = connector

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        self._connector.register_kv_caches(dict(kv_caches))

    def unregister(self) -> None:
        self._connector.unregister_kv_caches()

    def restore(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        self._connector.restore_kv_caches(dict(kv_caches))

    def begin(self, scheduler_output: SchedulerOutput, context: ForwardContext) -> None:
        metadata = scheduler_output.kv_connector_metadata
        self._connector.handle_preemptions(metadata)
        self._connector.bind_connector_metadata(metadata)
        self._connector.start_load_kv(context)

    def end(self, scheduler_output: SchedulerOutput) -> KVConnectorOutput | None:
        connector = self._connector
        connector.wait_for_save()
        results = connector.get_transfer_results(scheduler_output.finished_req_ids)
        output = KVConnectorOutput(
            finished_sending=results.finished_sending or None,
            finished_recving=results.finished_recving or None,
            failed_recving=set(results.failed_recving or ()),
            invalid_block_ids=connector.get_block_ids_with_load_errors(),
            kv_connector_stats=connector.get_kv_connector_stats(),
            kv_cache_events=connector.get_kv_connector_kv_cache_events(),
            kv_connector_worker_meta=connector.build_connector_worker_meta(),
        )
        connector.clear_connector_metadata()
        return None if output.is_empty() else output

    def close(self) -> None:
        self._connector.shutdown()
