"""What connectors between prefill and decode engines share: calls go to a scheduler's half."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class SchedulerHalf(Protocol):
    """What a scheduler's half answers; :class:`KVConnectorBase_V1` says what each call means."""

    def on_new_request(self, request: Request) -> None: ...

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]: ...

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None: ...

    def build_connector_meta(self) -> KVConnectorMetadata: ...

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None: ...

    def request_finished(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]: ...

    def has_pending_push_work(self) -> bool: ...


class WorkerHalf(Protocol):
    """What has a thread of its own that transfers."""

    def register_callback(self, callback: Callable[[], None]) -> None: ...


class TwoHalvesConnector(KVConnectorBase_V1, SupportsHMA):
    """A connector whose halves are objects of their own: ``_scheduler``, and a worker's half that
    says when it has something to report.
    """

    works_between_layers = False
    _scheduler: SchedulerHalf
    _callback: Callable[[], None] | None = None
    _half: WorkerHalf | None = None

    def register_transfer_callback(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._introduce(self._half)

    def _introduce(self, half: WorkerHalf | None) -> None:
        """Let the worker's half know whom to tell, now or once that is known."""
        self._half = half
        if half is not None and self._callback is not None:
            half.register_callback(self._callback)

    def on_new_request(self, request: Request) -> None:
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        self._scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._scheduler.build_connector_meta()

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._scheduler.update_connector_output(connector_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler.request_finished(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler.request_finished(request, block_ids)

    def has_pending_push_work(self) -> bool:
        return self._scheduler.has_pending_push_work()
