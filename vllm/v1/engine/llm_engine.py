"""The synchronous front end: requests in, ``RequestOutput`` out of ``step``.

``LLM`` drives it. Owns the input and output processors and a client; knows no scheduler.
"""

import itertools
import time
from typing import Any

import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import PromptType
from vllm.logger import init_logger
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core_client import EngineCoreClient, InprocClient
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.engine.phases import StartupPhases
from vllm.v1.engine.tokenizer import tokenizer_from_config

__all__ = ["LLMEngine"]

logger = init_logger(__name__)


class LLMEngine:
    """One engine and the requests that this thread has given it."""

    def __init__(self, vllm_config: VllmConfig, client: EngineCoreClient, tokenizer: Any) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.client = client
        self.tokenizer = tokenizer
        self.input_processor = InputProcessor(vllm_config, tokenizer)
        self.output_processor = OutputProcessor(
            tokenizer, stream_interval=vllm_config.scheduler_config.stream_interval
        )
        self._ids = itertools.count()

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLMEngine":
        """Start an engine: in its own process, or in this one where
        VLLM_ENABLE_V1_MULTIPROCESSING=0."""
        phases = StartupPhases(logger)
        vllm_config = engine_args.create_engine_config()
        client = InprocClient(vllm_config, log_stats=True, phases=phases)
        return cls(vllm_config, client, tokenizer_from_config(vllm_config.model_config))

    def add_request(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams,
        *,
        arrival_time: float | None = None,
        priority: int = 0,
    ) -> None:
        """Queue a request.

        Raises:
            VLLMValidationError: the request cannot run; nothing was queued.
        """
        engine_id = f"{request_id}-{next(self._ids):x}"
        request, text = self.input_processor.process(
            engine_id, prompt, params, arrival_time=arrival_time, priority=priority
        )
        if params.n == 1:
            self.output_processor.add_request(request_id, request, text)
            self.client.add_request(request)
            return
        parent = ParentRequest(engine_id, request.sampling_params)
        for index in range(params.n):
            child = parent.child_request(request, index)
            self.output_processor.add_request(request_id, child, text, parent=parent, index=index)
            self.client.add_request(child)

    def abort_request(self, request_ids: list[str]) -> None:
        """Drop requests by the ids they were added with."""
        engine_ids = self.output_processor.engine_ids_of(request_ids)
        self.client.abort_requests(self.output_processor.abort_requests(engine_ids)[0])

    def step(self) -> list[RequestOutput]:
        """Wait for the engine's next outputs.

        Raises:
            EngineDeadError: the engine has ended.
            VLLMError, VLLMValidationError: a request failed inside the engine; the others go on.
        """
        outputs = self.client.get_output()
        processed = self.output_processor.process_outputs(outputs.outputs, outputs.timestamp)
        self.client.abort_requests(processed.reqs_to_abort)
        for error in processed.errors.values():
            raise error
        return processed.request_outputs

    def has_unfinished_requests(self) -> bool:
        return self.output_processor.has_unfinished_requests()

    def get_num_unfinished_requests(self) -> int:
        return len(self.output_processor)

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def reset_prefix_cache(self) -> bool:
        return self.client.call_utility("reset_prefix_cache")

    def shutdown(self) -> None:
        self.client.shutdown()
