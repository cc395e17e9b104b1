"""``LLM``: offline inference over lists of prompts."""

import copy
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from vllm.beam_search import BeamSearchOutput, BeamSearchState
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.chat_utils import (
    load_chat_template,
    parse_chat_messages,
    render_chat,
    resolve_chat_template,
)
from vllm.errors import UnsupportedError, VLLMError, VLLMValidationError
from vllm.inputs import PromptType
from vllm.logprobs import Logprob
from vllm.outputs import RequestOutput
from vllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from vllm.v1.engine.input_processor import TokenizedPrompt
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.metrics.reader import Metric, get_metrics_snapshot

__all__ = ["LLM"]

Message = dict[str, Any]
Progress = bool | Callable[..., tqdm]
EnginePrompt = PromptType | TokenizedPrompt


class LLM:
    """A model and an engine that runs it; ``kwargs`` are the fields of ``EngineArgs``.

    The prompts of one call are batched by the engine. Use it as a context manager, call
    ``shutdown``, or let it go: the engine ends with it. Calls from several threads take turns.

    Raises:
        VLLMValidationError, VLLMError, ValueError, OSError: why the engine cannot start.
    """

    def __init__(self, model: str, **kwargs: Any) -> None:
        args = EngineArgs.from_kwargs(model=model, **kwargs)
        self.llm_engine = LLMEngine.from_engine_args(args)
        self._request_ids = itertools.count()
        self._turn = threading.Lock()
        self._asleep = False
        self._finalizer = weakref.finalize(self, self.llm_engine.shutdown)

    def shutdown(self) -> None:
        """End the engine; may be called twice."""
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def get_tokenizer(self) -> Any:
        """The model's tokenizer; None with ``skip_tokenizer_init``."""
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """``SamplingParams`` with the defaults of the model's generation config."""
        return SamplingParams(**self.llm_engine.model_config.get_diff_sampling_param())

    # Generation

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Progress = True,
        lora_request: Any = None,
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
            VLLMError: a request failed inside the engine; all of the call are dropped.
            EngineDeadError: the engine has ended.
        """
        _refuse("lora_request", lora_request)
        prompt_list = _as_prompt_list(prompts)
        params = self._per_prompt_params(sampling_params, len(prompt_list))
        if priority is not None and len(priority) != len(prompt_list):
            raise VLLMValidationError(
                f"priority has {len(priority)} entries for {len(prompt_list)} prompts",
                parameter="priority",
            )
        return self._run(prompt_list, params, use_tqdm, priority)

    def chat(
        self,
        messages: list[Message] | Sequence[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Progress = True,
        lora_request: Any = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, put in text by the model's chat template.

        Args:
            messages: a list of messages (role, content), or a list of such lists.
            chat_template: a template, or a file that holds one, instead of the model's.
            chat_template_content_format: "auto", "string" or "openai".
            continue_final_message: go on with the last message rather than answer it.
            chat_template_kwargs: further variables of the template.

        Raises:
            VLLMValidationError: a message is malformed, or the template fails; and as
                ``generate``.
        """
        _refuse("lora_request", lora_request)
        _refuse("mm_processor_kwargs", mm_processor_kwargs)
        tokenizer = self.get_tokenizer()
        if tokenizer is None:
            raise VLLMValidationError("chat needs a tokenizer: leave skip_tokenizer_init out")
        template = resolve_chat_template(
            tokenizer,
            load_chat_template(chat_template),
            with_tools=tools is not None,
            content_format=chat_template_content_format,
        )
        if continue_final_message and add_generation_prompt:
            raise VLLMValidationError(
                "continue_final_message needs add_generation_prompt=False",
                parameter="continue_final_message",
            )
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        params = self._per_prompt_params(sampling_params, len(conversations))
        prompts: list[EnginePrompt] = []
        for conversation, own_params in zip(conversations, params, strict=True):
            text = render_chat(
                tokenizer,
                template,
                parse_chat_messages(conversation, template.content_format),
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=chat_template_kwargs,
            )
            # The template has written the special tokens already.
            tokenize = self.llm_engine.input_processor.tokenize
            prompts.append(tokenize(text, own_params, add_special_tokens=False))
        return self._run(prompts, params, use_tqdm, None)

    def beam_search(
        self,
        prompts: PromptType | Sequence[PromptType],
        params: BeamSearchParams,
        use_tqdm: bool = False,
    ) -> list[BeamSearchOutput]:
        """The ``beam_width`` most likely continuations of each prompt, best first.

        One token a step for all beams of all prompts; the prefix cache keeps that cheap.

        Raises:
            VLLMValidationError: as ``generate``; ``2 * beam_width`` must be within max_logprobs.
        """
        if not isinstance(params, BeamSearchParams):
            raise VLLMValidationError(
                f"params must be BeamSearchParams, not {type(params).__name__}", parameter="params"
            )
        engine = self.llm_engine
        eos_token_id = engine.input_processor.eos_token_id
        states = [
            BeamSearchState(engine.input_processor.tokenize(prompt).token_ids, params, eos_token_id)
            for prompt in _as_prompt_list(prompts)
        ]
        one_step = SamplingParams(
            logprobs=2 * params.beam_width,
            max_tokens=1,
            temperature=params.temperature,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        steps = range(params.max_tokens)
        for _ in tqdm(steps, desc="Beam search") if use_tqdm else steps:
            beams = [beam for state in states for beam in state.beams]
            if not beams:
                break
            given: list[EnginePrompt] = [beam.tokens for beam in beams]
            outputs = iter(self._run(given, [one_step] * len(given), False, None))
            for state in states:
                state.advance([_candidates(next(outputs)) for _ in state.beams])
        return [self._beam_search_output(state) for state in states]

    def _beam_search_output(self, state: BeamSearchState) -> BeamSearchOutput:
        tokenizer = self.get_tokenizer()
        sequences = state.best()
        if tokenizer is not None:
            for sequence in sequences:
                sequence.text = tokenizer.decode(
                    state.output_ids(sequence), skip_special_tokens=True
                )
        return BeamSearchOutput(sequences)

    def _per_prompt_params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            given = [given] * count
        if not isinstance(given, Sequence):
            raise VLLMValidationError(
                "sampling_params must be SamplingParams or a list of them, not "
                f"{type(given).__name__}",
                parameter="sampling_params",
            )
        if len(given) != count:
            raise VLLMValidationError(
                f"sampling_params has {len(given)} entries for {count} prompts",
                parameter="sampling_params",
            )
        final = []
        for params in given:
            if not isinstance(params, SamplingParams):
                raise VLLMValidationError(
                    f"sampling_params must be SamplingParams, not {type(params).__name__}",
                    parameter="sampling_params",
                )
            own = copy.copy(params)
            own.output_kind = RequestOutputKind.FINAL_ONLY
            final.append(own)
        return final

    def _run(
        self,
        prompts: Sequence[EnginePrompt],
        params: Sequence[SamplingParams],
        use_tqdm: Progress,
        priority: Sequence[int] | None,
    ) -> list[RequestOutput]:
        """Queue all requests, then step until they are finished; on an error drop them all."""
        with self._turn:
            return self._run_alone(prompts, params, use_tqdm, priority)

    def _run_alone(
        self,
        prompts: Sequence[EnginePrompt],
        params: Sequence[SamplingParams],
        use_tqdm: Progress,
        priority: Sequence[int] | None,
    ) -> list[RequestOutput]:
        if self._asleep:
            raise VLLMError("the engine sleeps; call wake_up() first")
        engine = self.llm_engine
        request_ids = [str(next(self._request_ids)) for _ in prompts]
        outputs: dict[str, RequestOutput] = {}
        try:
            for i, request_id in enumerate(request_ids):
                engine.add_request(
                    request_id, prompts[i], params[i], priority=priority[i] if priority else 0
                )
            with _Progress(len(request_ids), use_tqdm) as progress:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished:
                            outputs[output.request_id] = output
                            progress.add(output)
        except BaseException:
            engine.abort_request(request_ids)
            raise
        return [outputs[request_id] for request_id in request_ids]

    # The engine

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False where running requests still hold blocks."""
        with self._turn:
            return self.llm_engine.reset_prefix_cache()

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Give back the memory of the KV cache, and at level 2 of the weights, until ``wake_up``.

        Needs ``enable_sleep_mode=True``. Cached prefixes are forgotten.

        Raises:
            EngineGenerateError: no such level, the engine has no sleep mode, or it has to be woken
                before it can sleep at this level.
            UnsupportedError: another ``mode`` than "abort": no requests are left between calls.
        """
        if mode != "abort":
            raise UnsupportedError(
                f"mode {mode!r} is not supported; 'abort' is", parameter="mode", value=mode
            )
        with self._turn:
            self.llm_engine.sleep(level)
            self._asleep = True

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Have the memory of ``tags`` ("weights", "kv_cache") again, by default of all.

        Weights are read from the checkpoint again where they were dropped. Generation goes on
        once everything is there.

        Raises:
            EngineGenerateError: an unknown tag.
        """
        with self._turn:
            self.llm_engine.wake_up(tags)
            self._asleep = self.llm_engine.is_sleeping()

    def is_sleeping(self) -> bool:
        """Whether ``sleep`` has been called, and ``wake_up`` not yet for all."""
        with self._turn:
            return self.llm_engine.is_sleeping()

    def get_metrics(self) -> list[Metric]:
        """The metrics that a server shows at /metrics, as values.

        Raises:
            VLLMValidationError: the engine runs with ``disable_log_stats``.
        """
        if self.llm_engine.stat_logger is None:
            raise VLLMValidationError(
                "get_metrics needs an engine without disable_log_stats",
                parameter="disable_log_stats",
            )
        return get_metrics_snapshot()

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a method of every worker, and give back the answers in the order of ranks.

        Args:
            method: name of a public method of the worker (``--worker-cls``). Where the engine runs
                in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), a function of the worker, too.
            timeout: seconds to wait for workers that are processes of their own.
            args, kwargs: plain data, as answers must be.

        Raises:
            VLLMValidationError: a function that cannot reach the engine, or no such timeout.
            EngineGenerateError: the call has failed, or a worker has not answered in time.
        """
        with self._turn:
            return self.llm_engine.collective_rpc(method, timeout, args, kwargs)

    def encode(self, *_: Any, **__: Any) -> Any:
        """Pooling models; always refused.

        Raises:
            UnsupportedError: this engine generates text only.
        """
        raise UnsupportedError(
            "pooling (encode, embed, classify, score, reward) is not supported by this engine "
            "yet; it has generate, chat and beam_search"
        )

    embed = classify = score = reward = encode


class _Progress:
    """The progress bar of one ``generate``: prompts done, and tokens per second."""

    def __init__(self, total: int, use_tqdm: Progress) -> None:
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
    if isinstance(prompts, str | dict | TokenizedPrompt):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise VLLMValidationError(
            f"prompts must be a prompt or a list of prompts, not {type(prompts).__name__}",
            parameter="prompts",
        )
    if prompts and all(isinstance(item, int) for item in prompts):
        return [list(prompts)]
    return list(prompts)


def _candidates(output: RequestOutput) -> dict[int, Logprob]:
    logprobs = output.outputs[0].logprobs
    assert logprobs, "beam search asks for log-probabilities"
    return logprobs[0]


def _refuse(name: str, value: object) -> None:
    if value is not None:
        raise UnsupportedError(f"{name} is not supported by this engine yet", parameter=name)
