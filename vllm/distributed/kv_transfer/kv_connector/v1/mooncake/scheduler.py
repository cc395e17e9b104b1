"""The scheduler half of MooncakeConnector: what is fetched, what must stay, and for whom.

Owns which transfer ids are being computed and which requests will fetch. Moves nothing; imports
no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.messages import (
    MooncakeParams,
    MooncakeStepMetadata,
    Offer,
    Receive,
    parse_params,
)
from vllm.distributed.kv_transfer.kv_connector.v1.seals import prompt_digest
from vllm.errors import VLLMValidationError
from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["MooncakeScheduler"]

_KEPT = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


class MooncakeScheduler:
    def __init__(self, transfer: KVTransferConfig, kv_cache_config: KVCacheConfig) -> None:
        self._transfer = transfer
        self._has_states = kv_cache_config.has_mamba_layers
        self._to_fetch: dict[str, MooncakeParams] = {}
        """Requests that have not been admitted yet."""
        self._first_token: dict[str, int] = {}
        self._fetching: set[str] = set()
        self._computing: dict[str, str] = {}
        """Transfer ids of prefills by request id, until they have ended."""
        self._offered: dict[str, str] = {}
        """The same of those whose blocks wait to be fetched."""
        self._next = MooncakeStepMetadata()
        self._unsent = False

    # Requests that come

    def on_new_request(self, request: Request) -> None:
        """
        Raises:
            VLLMValidationError: the request's ``kv_transfer_params`` cannot be.
        """
        params = parse_params(request.kv_transfer_params)
        if params is None:
            return
        self._unsent = True
        if params.do_remote_prefill:
            self._check_role(self._transfer.is_kv_consumer, "do_remote_prefill", "kv_consumer")
            self._to_fetch[request.request_id] = params
            self._next.expected[request.request_id] = params
            return
        self._check_role(self._transfer.is_kv_producer, "do_remote_decode", "kv_producer")
        transfer_id = params.transfer_id
        assert transfer_id is not None
        if transfer_id in (*self._computing.values(), *self._offered.values()):
            raise VLLMValidationError(
                f"kv_transfer_params: transfer_id {transfer_id!r} is another request's",
                parameter="kv_transfer_params",
            )
        self._computing[request.request_id] = transfer_id
        self._next.announced.append(transfer_id)
        if self._has_states and request.num_prompt_tokens > 1:
            # A state stands for all tokens before it: the last one is the decoder's to compute.
            request.drop_last_prompt_token()

    def _check_role(self, able: bool, what: str, role: str) -> None:
        if not able:
            raise VLLMValidationError(
                f"kv_transfer_params: {what} needs an engine whose kv_role is {role} or kv_both; "
                f"this one is {self._transfer.kv_role}",
                parameter="kv_transfer_params",
            )

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if request.request_id not in self._to_fetch:
            return 0, False
        last = request.num_prompt_tokens - 1 if self._has_states else request.num_prompt_tokens
        found = last - num_computed_tokens
        self._first_token[request.request_id] = num_computed_tokens
        return max(found, 0), found > 0

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        request_id = request.request_id
        params = self._to_fetch.pop(request_id, None)
        if params is None:
            return
        self._next.unexpected.append(request_id)
        first = self._first_token.pop(request_id, 0)
        if num_external_tokens == 0:
            self._next.declined[request_id] = params
            return
        end = first + num_external_tokens
        self._fetching.add(request_id)
        self._next.receives.append(
            Receive(
                request_id=request_id,
                params=params,
                block_ids=tuple(list(row) for row in blocks.get_block_ids()),
                first_token=first,
                num_tokens=end,
                digest=prompt_digest(request.prompt_token_ids[:end]),
            )
        )

    # Requests that end

    def request_finished(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        request_id = request.request_id
        self._first_token.pop(request_id, None)
        waiting = self._to_fetch.pop(request_id, None)
        if waiting is not None:
            self._next.unexpected.append(request_id)
            self._next.declined[request_id] = waiting
            self._unsent = True
        if request_id in self._fetching:
            self._next.cancelled.append(request_id)
            self._unsent = True
        transfer_id = self._computing.pop(request_id, None)
        if transfer_id is None:
            return False, None
        self._unsent = True
        count = min(request.num_computed_tokens, request.num_prompt_tokens)
        if request.status not in _KEPT or not any(block_ids) or count < 1:
            why = f"its prefill ended as {request.status.name.lower()}"
            self._next.dropped[transfer_id] = why
            return False, None
        self._offered[request_id] = transfer_id
        self._next.offers.append(
            Offer(
                transfer_id=transfer_id,
                request_id=request_id,
                block_ids=tuple(list(row) for row in block_ids),
                num_tokens=count,
                digest=prompt_digest(request.prompt_token_ids[:count]),
            )
        )
        return True, None

    # Steps

    def build_connector_meta(self) -> MooncakeStepMetadata:
        metadata, self._next = self._next, MooncakeStepMetadata()
        self._unsent = False
        return metadata

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        for request_id in output.finished_sending or ():
            self._offered.pop(request_id, None)
        for request_id in (*(output.finished_recving or ()), *output.failed_recving):
            self._fetching.discard(request_id)

    def has_pending_push_work(self) -> bool:
        return bool(self._offered) or self._unsent
