"""The interface between the engine and whatever moves KV blocks in and out of it.

A connector has two halves, instances of one class in different processes. The *scheduler* half
decides which tokens come from outside and which requests' blocks must outlive them; the *worker*
half moves bytes. Imports no torch, so that the scheduler and the registry can use it.

In one step::

    scheduler  on_new_request, get_num_new_matched_tokens, update_state_after_alloc,
               build_connector_meta
    worker     handle_preemptions, bind_connector_metadata, start_load_kv,
               wait_for_layer_load and save_kv_layer in each layer, wait_for_save,
               get_transfer_results, get_block_ids_with_load_errors, clear_connector_metadata
    scheduler  update_connector_output; request_finished before blocks are freed
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = [
    "CopyBlocksOp",
    "KVConnectorBase_V1",
    "KVConnectorHandshakeMetadata",
    "KVConnectorMetadata",
    "KVConnectorRole",
    "KVConnectorTransferResults",
    "KVConnectorWorkerMetadata",
    "NullKVConnector",
    "SupportsHMA",
    "supports_hma",
]

CopyBlocksOp = Callable[
    [dict[str, "torch.Tensor"], dict[str, "torch.Tensor"], list[int], list[int], str], None
]
"""copy(source caches, target caches, source block ids, target block ids, "h2d" or "d2h")."""


class KVConnectorRole(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class KVConnectorMetadata(ABC):  # noqa: B024 - a marker: each connector has its own fields
    """What the scheduler half tells the worker half about one step."""


class KVConnectorHandshakeMetadata(ABC):  # noqa: B024 - a marker
    """What a worker half tells the scheduler half once, for other engines to connect with."""


class KVConnectorWorkerMetadata(ABC):
    """What worker halves report after a step, one per rank, made one by ``aggregate``."""

    @abstractmethod
    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata: ...


@dataclass(slots=True)
class KVConnectorTransferResults:
    """Request ids whose transfers have ended since the last step."""

    finished_sending: set[str] | None = None
    finished_recving: set[str] | None = None
    failed_recving: set[str] | None = None
    stuck_recving: set[str] | None = None
    """Loads that cannot be waited for: the requests fail or are computed now, their blocks stay
    until the load is reported as finished or failed."""


class SupportsHMA(ABC):
    """A connector that understands several cache groups."""

    @abstractmethod
    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """``request_finished`` with the block ids of every group."""


def supports_hma(connector: Any) -> bool:
    """Whether a connector, or its class, understands several cache groups."""
    if isinstance(connector, type):
        return issubclass(connector, SupportsHMA)
    return isinstance(connector, SupportsHMA)


class KVConnectorBase_V1(ABC):
    """Base of all connectors. Methods with a default are optional."""

    works_between_layers: bool = True
    """False: ``wait_for_layer_load`` and ``save_kv_layer`` do nothing, so layers may be fused and
    steps captured. A connector from outside is taken to mean what it defines."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig | None,
    ) -> None:
        self._vllm_config = vllm_config
        self._role = role
        self._kv_cache_config = kv_cache_config
        self._kv_transfer_config = vllm_config.kv_transfer_config
        self._connector_metadata: KVConnectorMetadata | None = None

    @property
    def role(self) -> KVConnectorRole:
        return self._role

    # Both halves

    def shutdown(self) -> None:
        """Stop all transfers and release what is registered."""

    @property
    def requires_kv_delivery(self) -> bool:
        """A request may only finish well once its KV has arrived elsewhere."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """The ``KVCacheLayout`` that this connector needs; None where any will do."""
        return None

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layers call into the connector, so a graph must not span them."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        """The connector's own statistics from ``data``; None where it keeps none."""
        return None

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: Any,
        per_engine_labelvalues: Any,
    ) -> Any:
        """Prometheus metrics for those statistics; None where it keeps none."""
        return None

    # Worker half

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """The scheduler half's word on the step that begins."""
        self._connector_metadata = connector_metadata

    def clear_connector_metadata(self) -> None:
        self._connector_metadata = None

    def has_connector_metadata(self) -> bool:
        return self._connector_metadata is not None

    def _get_connector_metadata(self) -> KVConnectorMetadata:
        assert self._connector_metadata is not None, "no step has begun"
        return self._connector_metadata

    def register_transfer_callback(self, callback: Callable[[], None]) -> None:
        """Once, after ``register_kv_caches``: may be called, by any thread, whenever
        ``get_transfer_results`` has something to say. Without such calls an idle engine asks every
        millisecond.
        """

    def register_kv_scales(self, scales: dict[str, tuple[float, float]]) -> None:
        """Once, before ``register_kv_caches``: of layers by name, what all numbers of K and of V
        are multiplied by, 1.0 where the cache's format asks for no such scale.
        """

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Once, after allocation: each layer's view ``(B, H, N, C)`` by layer name."""

    def unregister_kv_caches(self) -> None:
        """The cache is about to be freed (sleep)."""

    def restore_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The cache is back (wake-up), at new addresses."""
        self.register_kv_caches(kv_caches)

    def set_host_xfer_buffer_ops(self, copy_operation: CopyBlocksOp) -> None:
        """How to copy blocks between device and host buffer, where one is configured."""

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Once, after registration: what other engines need to connect to this rank."""
        return None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """First in a step: blocks of preempted requests are about to be overwritten."""

    @abstractmethod
    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Start loading what this step's metadata asks for."""

    @abstractmethod
    def wait_for_layer_load(self, layer_name: str) -> None:
        """Block until the layer's synchronous loads are there."""

    @abstractmethod
    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Start saving what the layer has just stored."""

    @abstractmethod
    def wait_for_save(self) -> None:
        """Block until the saves that must not outlive the step are done."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose sending, and whose receiving, has ended since the last call.

        ``finished_req_ids`` are requests that ended in the engine before this step.
        """
        return None, None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """``get_finished`` with failures; by default none are known."""
        sending, recving = self.get_finished(finished_req_ids)
        return KVConnectorTransferResults(finished_sending=sending, finished_recving=recving)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks whose load has failed since the last call."""
        return set()

    def get_kv_connector_stats(self) -> Any:
        return None

    def get_kv_connector_kv_cache_events(self) -> Any:
        return None

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return None

    # Scheduler half

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Once: the ``KVCacheManager`` whose blocks this half hears of."""

    def on_new_request(self, request: Request) -> None:
        """A request has arrived and waits."""

    @abstractmethod
    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond the ``num_computed_tokens`` found in this engine.

        Returns:
            The number of tokens (None: not known yet, ask again in a later step), and whether
            they arrive asynchronously, between steps.
        """

    @abstractmethod
    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        """``blocks`` (``KVCacheBlocks``) are the request's; load ``num_external_tokens`` there.

        Called once more, with 0 tokens, when a request whose asynchronous load has ended runs.
        """

    @abstractmethod
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """The metadata of this step. Must not change ``scheduler_output``."""

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the worker halves reported after a step."""

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """``request`` has ended; its blocks are about to be freed.

        Returns:
            Whether the blocks must stay until the request id is among ``finished_sending``, and
            the ``kv_transfer_params`` of the answer.
        """
        return False, None

    def take_events(self) -> Iterable[KVCacheEvent]:
        return ()

    def get_finished_count(self) -> int | None:
        """Ranks that report each transfer, where that is not the world size."""
        return None

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        """Once: the worker halves' handshake metadata by tensor-parallel rank."""

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """The same by (pipeline-parallel rank, tensor-parallel rank).

        Raises:
            ValueError: there are several pipeline stages and the connector knows only one.
        """
        if any(pp_rank for pp_rank, _ in metadata):
            raise ValueError(f"{type(self).__name__} works with --pipeline-parallel-size 1 only")
        self.set_xfer_handshake_metadata({tp: m for (_, tp), m in metadata.items()})

    def has_pending_push_work(self) -> bool:
        """Steps must go on, with nothing to compute, for transfers to proceed."""
        return False

    def reset_cache(self) -> bool | None:
        """Forget what is stored outside; None where nothing is."""
        return None


class NullKVConnector:
    """The scheduler's connector where none is configured: nothing ever comes or goes."""

    def on_new_request(self, request: Request) -> None: ...

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None: ...

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> None:
        return None

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None: ...

    def request_finished(
        self, request: Request, block_ids: Sequence[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    def take_events(self) -> Iterable[KVCacheEvent]:
        return ()

    def has_pending_push_work(self) -> bool:
        return False

    def reset_cache(self) -> bool | None:
        return None

    def shutdown(self) -> None: ...
