"""The scheduler half of NIXL connectors: what is fetched, what must stay, what the answer says.

Owns leases as the scheduler sees them (which slot, which generation) and the requests that will
fetch. Moves nothing; imports no torch.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

import vllm.envs as envs
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import (
    LeaseStart,
    NixlSettings,
    NixlStepMetadata,
    Receive,
    RemoteParams,
    parse_params,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.side_channel import HandshakeServer
from vllm.distributed.kv_transfer.kv_connector.v1.seals import (
    engine_secret,
    prompt_digest,
    public_session,
)
from vllm.errors import VLLMValidationError
from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["NixlScheduler"]

_KEPT = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)


class NixlScheduler:
    def __init__(
        self, vllm_config: VllmConfig, settings: NixlSettings, kv_cache_config: KVCacheConfig
    ) -> None:
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        self._transfer = transfer
        self._settings = settings
        self._has_states = kv_cache_config.has_mamba_layers
        self._session = public_session(vllm_config.instance_id)
        self._secret = engine_secret(vllm_config.instance_id)
        self._tp_size = vllm_config.parallel_config.tensor_parallel_size
        self.host = envs.VLLM_NIXL_SIDE_CHANNEL_HOST
        self.port = envs.VLLM_NIXL_SIDE_CHANNEL_PORT
        self._server: HandshakeServer | None = None
        self._to_fetch: dict[str, RemoteParams] = {}
        """Requests that have not been admitted yet."""
        self._first_token: dict[str, int] = {}
        self._next = NixlStepMetadata()
        self._leased: dict[str, int] = {}
        self._free_slots: deque[int] = deque(range(settings.max_leases))
        self._generations = [0] * settings.max_leases
        self._unsent = False

    def serve_handshakes(self, payloads: dict[tuple[int, int], bytes]) -> None:
        self._server = HandshakeServer(self.host, self.port, payloads)

    # Requests that come

    def on_new_request(self, request: Request) -> None:
        """
        Raises:
            VLLMValidationError: the request's ``kv_transfer_params`` cannot be.
        """
        params = parse_params(request.kv_transfer_params)
        if params is None:
            return
        role = self._transfer.kv_role
        if params.do_remote_prefill:
            if not self._transfer.is_kv_consumer:
                raise VLLMValidationError(
                    f"kv_transfer_params: do_remote_prefill needs an engine whose kv_role is "
                    f"kv_consumer or kv_both; this one is {role}",
                    parameter="kv_transfer_params",
                )
            count = params.remote_num_tokens
            assert count is not None
            if count > request.num_prompt_tokens:
                raise VLLMValidationError(
                    f"kv_transfer_params: remote_num_tokens is {count}, but the prompt has "
                    f"{request.num_prompt_tokens} tokens: they belong to another prompt",
                    parameter="kv_transfer_params",
                )
            params.digest = prompt_digest(request.prompt_token_ids[:count])
            self._to_fetch[request.request_id] = params
            self._next.expected[request.request_id] = params
            self._unsent = True
            return
        if not self._transfer.is_kv_producer:
            raise VLLMValidationError(
                f"kv_transfer_params: do_remote_decode needs an engine whose kv_role is "
                f"kv_producer or kv_both; this one is {role}",
                parameter="kv_transfer_params",
            )
        if self._has_states and request.num_prompt_tokens > 1:
            # A state stands for all tokens before it: the last one is the decoder's to compute.
            request.drop_last_prompt_token()

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        params = self._to_fetch.get(request.request_id)
        if params is None:
            return 0, False
        assert params.remote_num_tokens is not None
        last = request.num_prompt_tokens - 1 if self._has_states else request.num_prompt_tokens
        found = min(last, params.remote_num_tokens) - num_computed_tokens
        self._first_token[request.request_id] = num_computed_tokens
        return max(found, 0), found > 0

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        params = self._to_fetch.pop(request.request_id, None)
        if params is None:
            return
        self._next.unexpected.append(request.request_id)
        if num_external_tokens == 0:
            self._next.releases.append(params)
            return
        first = self._first_token.pop(request.request_id)
        self._next.receives.append(
            Receive(
                request_id=request.request_id,
                params=params,
                block_ids=tuple(list(row) for row in blocks.get_block_ids()),
                first_token=first,
                num_tokens=first + num_external_tokens,
            )
        )

    # Requests that end

    def request_finished(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        request_id = request.request_id
        waiting = self._to_fetch.pop(request_id, None)
        self._first_token.pop(request_id, None)
        if waiting is not None:
            self._next.unexpected.append(request_id)
            self._next.releases.append(waiting)
            self._unsent = True
            return False, None
        given = request.kv_transfer_params or {}
        if not given.get("do_remote_decode") or request.status not in _KEPT:
            return False, None
        if not self._free_slots or not any(block_ids):
            return False, None
        slot = self._free_slots.popleft()
        self._leased[request_id] = slot
        rows = tuple(list(row) for row in block_ids)
        self._next.leases[request_id] = LeaseStart(slot=slot, block_ids=rows)
        count = min(request.num_computed_tokens, request.num_prompt_tokens)
        told = RemoteParams(
            do_remote_prefill=True,
            remote_block_ids=[list(row) for row in block_ids],
            remote_engine_id=self._transfer.engine_id,
            remote_session=self._session,
            remote_request_id=request_id,
            remote_host=self.host,
            remote_port=self.port,
            tp_size=self._tp_size,
            remote_num_tokens=count,
            remote_lease_slot=slot,
            remote_lease_generation=self._generations[slot],
            digest=prompt_digest(request.prompt_token_ids[:count]),
        )
        told.remote_seal = told.sealed_by(self._secret)
        answer = msgspec.structs.asdict(told)
        for name in ("digest", "num_readers"):
            del answer[name]
        return True, {**answer, "remote_lease_seconds": self._settings.kv_lease_duration}

    # Steps

    def build_connector_meta(self) -> NixlStepMetadata:
        metadata, self._next = self._next, NixlStepMetadata()
        self._unsent = False
        return metadata

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        for request_id in output.finished_sending or ():
            slot = self._leased.pop(request_id, None)
            if slot is not None:
                # The workers have counted on already.
                self._generations[slot] += 1
                self._free_slots.append(slot)

    def has_pending_push_work(self) -> bool:
        return bool(self._leased) or self._unsent

    def shutdown(self) -> None:
        if self._server is not None:
            self._server.close()
