"""``LLM``: offline inference over lists of prompts."""

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from vllm.engine.arg_utils import EngineArgs
from vllm.errors import VLLMValidationError
from vllm.inputs import PromptType
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

__all__ = ["LLM"]

Messages = list[dict[str, Any]]


class LLM:
    """A model and an engine that runs it; ``kwargs`` are the fields of ``EngineArgs``.

    Prompts of one call are batched by the engine. Use it as a context manager, or let it go:
    the engine ends with it.
    """

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.llm_engine = LLMEngine.from_engine_args(EngineArgs.from_kwargs(model=model, **kwargs))
        self._request_ids = itertools.count()

    def get_tokenizer(self) -> Any:
        """The model's tokenizer; None with ``skip_tokenizer_init``."""
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """``SamplingParams`` with the defaults of the model's generation config."""
        return SamplingParams(**self.llm_engine.model_config.get_diff_sampling_param())

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., tqdm] = True,
        priority: list[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; outputs come in the order of the prompts.

        Args:
            prompts: one prompt or many: text, token ids, or dictionaries (``vllm.inputs``).
            sampling_params: one for all prompts or one each; None for the model's defaults.
            use_tqdm: show a progress bar, or a class to make it with.
            priority: one number per prompt, with ``scheduling_policy="priority"``.

        Raises:
            VLLMValidationError: a prompt or parameter cannot work; nothing was run.
            EngineDeadError: the engine has ended.
        """
        prompt_list = _as_prompt_list(prompts)
        params_list = self._per_prompt_params(sampling_params, len(prompt_list))
        if priority is not None and len(priority) != len(prompt_list):
            raise VLLMValidationError(
                f"priority has {len(priority)} entries for {len(prompt_list)} prompts",
                parameter="priority",
            )
        request_ids: list[str] = []
        try:
            for i, (prompt, params) in enumerate(zip(prompt_list, params_list, strict=True)):
                request_id = str(next(self._request_ids))
                self.llm_engine.add_request(
                    request_id, prompt, params, priority=priority[i] if priority else 0
                )
                request_ids.append(request_id)
            return self._run(request_ids, use_tqdm)
        except BaseException:
            self.llm_engine.abort_request(request_ids)
            raise

    def _per_prompt_params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            given = [given] * count
        if len(given) != count:
            raise VLLMValidationError(
                f"sampling_params has {len(given)} entries for {count} prompts",
                parameter="sampling_params",
            )
        final = []
        for params in given:
            params = copy.copy(params)
            params.output_kind = RequestOutputKind.FINAL_ONLY
            final.append(params)
        return final

    def _run(
        self, request_ids: list[str], use_tqdm: bool | Callable[..., tqdm]
    ) -> list[RequestOutput]:
        """Step until all requests are finished."""
        outputs: dict[str, RequestOutput] = {}
        with _Progress(len(request_ids), use_tqdm) as progress:
            while self.llm_engine.has_unfinished_requests():
                for output in self.llm_engine.step():
                    if output.finished:
                        outputs[output.request_id] = output
                        progress.add(output)
        return [outputs[request_id] for request_id in request_ids]


class _Progress:
    """The progress bar of one ``generate``: prompts done, and tokens per second."""

    def __init__(self, total: int, use_tqdm: bool | Callable[..., tqdm]) -> None:
        make = tqdm if use_tqdm is True else use_tqdm
        self._bar = (
            make(total=total, desc="Processed prompts", dynamic_ncols=True) if make else None
        )
        self._begin = time.perf_counter()
        self._num_input = 0
        self._num_output = 0

    def add(self, output: RequestOutput) -> None:
        if self._bar is None:
            return
        self._num_input += len(output.prompt_token_ids or ())
        self._num_output += sum(len(completion.token_ids) for completion in output.outputs)
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        self._bar.set_postfix_str(
            f"input {self._num_input / seconds:.1f} tok/s, "
            f"output {self._num_output / seconds:.1f} tok/s",
            refresh=False,
        )
        self._bar.update(1)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _as_prompt_list(prompts: Any) -> list[Any]:
    """A list of prompts, where ``prompts`` may be one: text, a dictionary or token ids."""
    if isinstance(prompts, str | dict):
        return [prompts]
    prompts = list(prompts)
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]
    return prompts
