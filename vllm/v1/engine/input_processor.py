"""Prompts and parameters as users give them -> checked ``EngineCoreRequest``.

Tokenises, refuses what can't run with one clear line, and fills in what needs the model or the
tokenizer: stop ids, bad words as ids, default ``max_tokens``. Runs in the front end.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, NamedTuple

import msgspec

from vllm.config import VllmConfig
from vllm.errors import UnsupportedError, VLLMValidationError
from vllm.inputs import PromptType
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.serial import encode

__all__ = ["InputProcessor", "TokenizedPrompt"]

_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_PAIR_KEYS = ("encoder_prompt", "decoder_prompt")
_UNSUPPORTED_PROMPT_KEYS = (
    "mm_processor_kwargs",
    "multi_modal_data",
    "multi_modal_uuids",
    "prompt_embeds",
    "token_type_ids",
)


_INT64 = 1 << 63
# Values of requests that may hold anything are JSON; deeper than this, no reader is safe.
_MAX_DEPTH = 200
_WITHOUT_CHILDREN = (str, int, float)


def _check_plain(name: str, value: Any) -> None:
    """Refuse what cannot travel to the engine, or be worked on there.

    Raises:
        VLLMValidationError: ``value`` is nested too deeply, or holds something that is no JSON.
    """
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for node in level
            for child in _children(node)
            if not isinstance(child, _WITHOUT_CHILDREN)
        ]
        if not level:
            break
    else:
        raise VLLMValidationError(
            f"{name} is nested more than {_MAX_DEPTH} levels deep; make it flatter", parameter=name
        )
    try:
        encode(value)
    except (OverflowError, TypeError, UnicodeEncodeError) as error:
        raise VLLMValidationError(
            f"{name} must be plain JSON, with text of whole characters and whole numbers of 64 "
            f"bits: {error}",
            parameter=name,
        ) from None


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, Mapping):
        return node.values()
    return node if isinstance(node, list | tuple) else ()


class TokenizedPrompt(NamedTuple):
    """``text`` is None where only token ids were given. Where the model has an encoder, these are
    the decoder's, and ``encoder`` is what the encoder reads.
    """

    token_ids: list[int]
    text: str | None
    cache_salt: str | None
    encoder: TokenizedPrompt | None = None


class InputProcessor:
    """Checks against one model's limits; ``tokenizer`` is None with ``--skip-tokenizer-init``."""

    def __init__(self, vllm_config: VllmConfig, tokenizer: Any) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.tokenizer = tokenizer
        self._max_model_len = self.model_config.max_model_len
        self._vocab_size = self.model_config.get_vocab_size()
        self.eos_token_id, self._other_eos_ids = self._eos_ids()
        self._connector = vllm_config.kv_transfer_config
        self._logits_processors = self._load_logits_processors()
        self._has_encoder = self.model_config.is_encoder_decoder

    def _load_logits_processors(self) -> list[Any]:
        """The custom logits processors, which check their own parameters; torch only for them."""
        if not (
            self.model_config.logits_processors or entry_points(group="vllm.logits_processors")
        ):
            return []
        from vllm.v1.sample.logits_processor import load_logits_processors

        return load_logits_processors(self.vllm_config)

    def _eos_ids(self) -> tuple[int | None, list[int]]:
        """The model's main end-of-sequence id, and the further ones of its generation config."""
        config = self.model_config
        listed = config.generation_config.get("eos_token_id")
        if listed is None:
            listed = getattr(config.hf_text_config, "eos_token_id", None)
        ids = [listed] if isinstance(listed, int) else list(listed or ())
        main = getattr(self.tokenizer, "eos_token_id", None)
        if main is None and ids:
            main = ids[0]
        return main, [token_id for token_id in ids if token_id != main]

    def process(
        self,
        request_id: str,
        prompt: PromptType | TokenizedPrompt,
        params: SamplingParams,
        *,
        arrival_time: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        kv_transfer_params: dict[str, Any] | None = None,
    ) -> tuple[EngineCoreRequest, str | None]:
        """The engine's request and the prompt's text, where it is known.

        Raises:
            VLLMValidationError: naming the field and what would work.
            UnsupportedError: a kind of input that this engine does not have yet.
        """
        if not isinstance(params, SamplingParams):
            raise VLLMValidationError(
                f"sampling_params must be SamplingParams, not {type(params).__name__}",
                parameter="sampling_params",
            )
        arrival_time = time.time() if arrival_time is None else arrival_time
        if not isinstance(prompt, TokenizedPrompt):
            prompt = self.tokenize(prompt, params)
        if self._has_encoder and prompt.encoder is None:
            prompt = TokenizedPrompt(self._decoder_start(), None, prompt.cache_salt, prompt)
        salt = cache_salt if cache_salt is not None else prompt.cache_salt
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise VLLMValidationError(
                "cache_salt must be a string that is not empty", parameter="cache_salt"
            )
        self._check_prompt(prompt.token_ids)
        if prompt.encoder is not None:
            self._check_source(prompt.encoder.token_ids)
        self._check_priority(priority)
        kv_transfer_params = self._kv_transfer_params(kv_transfer_params, params)
        request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=prompt.token_ids,
            sampling_params=self._complete(params, len(prompt.token_ids)),
            arrival_time=arrival_time,
            priority=priority,
            cache_salt=salt,
            kv_transfer_params=kv_transfer_params,
            encoder_token_ids=None if prompt.encoder is None else prompt.encoder.token_ids,
        )
        return request, prompt.text

    # Prompts

    def tokenize(
        self,
        prompt: PromptType,
        params: SamplingParams | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> TokenizedPrompt:
        """Token ids of a prompt in any accepted form, cut to ``truncate_prompt_tokens``.

        Where the model has an encoder, a prompt that is not a pair is the encoder's.
        """
        if isinstance(prompt, Mapping) and any(key in prompt for key in _PAIR_KEYS):
            return self._tokenize_pair(prompt, params, add_special_tokens)
        text: str | None = None
        cache_salt: str | None = None
        if isinstance(prompt, Mapping):
            self._check_prompt_keys(prompt)
            fields: Mapping[str, Any] = prompt
            cache_salt = fields.get("cache_salt")
            text = fields.get("prompt")
            given: Any = fields.get("prompt_token_ids")
            if given is None:
                given = text
        else:
            given = prompt
        if isinstance(given, str):
            text = given
            token_ids = self.encode(given, add_special_tokens)
        elif isinstance(given, Sequence) or hasattr(given, "tolist"):
            token_ids = given.tolist() if hasattr(given, "tolist") else list(given)
            if not set(map(type, token_ids)) <= {int}:
                raise VLLMValidationError(
                    "a prompt's token ids must be whole numbers", parameter="prompt_token_ids"
                )
        else:
            raise VLLMValidationError(
                "a prompt must be a string, a list of token ids, or a dictionary with prompt or "
                f"prompt_token_ids, not {type(given).__name__}",
                parameter="prompt",
            )
        if params is not None and params.truncate_prompt_tokens is not None:
            token_ids = self._truncate(token_ids, params.truncate_prompt_tokens)
        return TokenizedPrompt(token_ids, text, cache_salt)

    def _tokenize_pair(
        self,
        prompt: Mapping[str, Any],
        params: SamplingParams | None,
        add_special_tokens: bool,
    ) -> TokenizedPrompt:
        if not self._has_encoder:
            raise VLLMValidationError(
                "encoder_prompt and decoder_prompt are for models with an encoder, and "
                f"{self.model_config.architecture} has none; give prompt or prompt_token_ids",
                parameter="encoder_prompt",
            )
        for key in prompt:
            if key not in _PAIR_KEYS:
                raise VLLMValidationError(
                    f"a prompt for encoder and decoder has no field {key!r}; it may have "
                    f"{', '.join(_PAIR_KEYS)}",
                    parameter="prompt",
                )
        source, start = prompt.get("encoder_prompt"), prompt.get("decoder_prompt")
        if source is None:
            raise VLLMValidationError(
                "a prompt for encoder and decoder needs encoder_prompt", parameter="encoder_prompt"
            )
        encoder = self.tokenize(source, params, add_special_tokens=add_special_tokens)
        if start is None:
            return TokenizedPrompt(self._decoder_start(), None, None, encoder)
        # What the output begins with has no end-of-text of its own.
        decoder = self.tokenize(start, add_special_tokens=False)
        first = self._decoder_start()[:1]
        token_ids = decoder.token_ids
        if token_ids[:1] != first:
            token_ids = first + token_ids
        return TokenizedPrompt(token_ids, decoder.text, None, encoder)

    def _decoder_start(self) -> list[int]:
        """What the decoder begins with, where nothing else is asked for."""
        config = self.model_config.hf_config
        start = getattr(config, "decoder_start_token_id", None)
        if start is None:
            start = getattr(config, "bos_token_id", None)
        if start is None:
            raise VLLMValidationError(
                "config.json has no decoder_start_token_id: give decoder_prompt",
                parameter="decoder_prompt",
            )
        forced = getattr(config, "forced_bos_token_id", None)
        return [start] if forced is None else [start, forced]

    def _check_source(self, token_ids: list[int]) -> None:
        config = self.model_config
        limit = getattr(config.hf_config, "max_source_positions", None) or self._max_model_len
        if not token_ids:
            raise VLLMValidationError(
                "the encoder's prompt is empty: it must hold at least one token",
                parameter="encoder_prompt",
            )
        if len(token_ids) > limit:
            raise VLLMValidationError(
                f"the encoder's prompt has {len(token_ids)} tokens, and may have at most {limit}",
                parameter="encoder_prompt",
                value=len(token_ids),
            )
        self._check_ids("encoder_prompt", (min(token_ids), max(token_ids)))

    def _check_prompt_keys(self, prompt: Mapping[str, Any]) -> None:
        for key in prompt:
            if key in _UNSUPPORTED_PROMPT_KEYS and prompt[key] is not None:
                raise UnsupportedError(
                    f"{key} is not supported by this engine yet; give prompt or prompt_token_ids",
                    parameter=key,
                )
            if key not in _PROMPT_KEYS and key not in _UNSUPPORTED_PROMPT_KEYS:
                raise VLLMValidationError(
                    f"a prompt has no field {key!r}; it may have {', '.join(_PROMPT_KEYS)}",
                    parameter="prompt",
                )
        if prompt.get("prompt") is None and prompt.get("prompt_token_ids") is None:
            raise VLLMValidationError(
                "a prompt needs prompt or prompt_token_ids", parameter="prompt"
            )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""
        if self.tokenizer is None:
            raise VLLMValidationError(
                "a prompt must be token ids where --skip-tokenizer-init is given",
                parameter="prompt",
            )
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        try:
            return backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            # A Python string may hold halves of characters, which are no text.
            raise VLLMValidationError(
                "the prompt is no valid Unicode text: it holds a lone surrogate",
                parameter="prompt",
            ) from None

    def _truncate(self, token_ids: list[int], limit: int) -> list[int]:
        """The last ``limit`` ids; -1 stands for the context length less one output token."""
        if limit > self._max_model_len:
            raise VLLMValidationError(
                f"truncate_prompt_tokens is {limit}, more than the model's context of "
                f"{self._max_model_len} tokens (max_model_len)",
                parameter="truncate_prompt_tokens",
                value=limit,
            )
        limit = self._max_model_len - 1 if limit == -1 else limit
        return token_ids[-limit:] if limit > 0 else []

    def _check_prompt(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise VLLMValidationError(
                "the prompt is empty: it must hold at least one token", parameter="prompt"
            )
        if len(token_ids) >= self._max_model_len:
            raise VLLMValidationError(
                f"the prompt has {len(token_ids)} tokens, but prompt and output together may have "
                f"at most {self._max_model_len} (max_model_len), so a prompt may have at most "
                f"{self._max_model_len - 1}; shorten it, or raise --max-model-len",
                parameter="prompt",
                value=len(token_ids),
            )
        self._check_ids("prompt_token_ids", (min(token_ids), max(token_ids)))

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise VLLMValidationError(
                    f"{name} holds token id {token_id}, which is not in the vocabulary "
                    f"(0 to {self._vocab_size - 1})",
                    parameter=name,
                    value=token_id,
                )

    def _check_priority(self, priority: int) -> None:
        if not -_INT64 <= priority < _INT64:
            raise VLLMValidationError(
                "priority must be a whole number of 64 bits", parameter="priority", value=priority
            )
        policy = self.vllm_config.scheduler_config.policy
        if priority and policy != "priority":
            raise VLLMValidationError(
                f"priority {priority} needs --scheduling-policy priority; this engine runs "
                f"with {policy}",
                parameter="priority",
                value=priority,
            )

    def _kv_transfer_params(
        self, given: dict[str, Any] | None, params: SamplingParams
    ) -> dict[str, Any] | None:
        if given is None and params.extra_args:
            given = params.extra_args.get("kv_transfer_params")
        if given is not None and self._connector is None:
            raise VLLMValidationError(
                "kv_transfer_params needs an engine with a connector (--kv-transfer-config)",
                parameter="kv_transfer_params",
            )
        if given is not None:
            _check_plain("kv_transfer_params", given)
        return given

    # Parameters

    def _complete(self, params: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        """A copy of ``params``, checked against the model, with the internal fields filled in."""
        self._check_params(params)
        params = copy.copy(params)
        room = self._max_model_len - num_prompt_tokens
        if params.max_tokens is None:
            params.max_tokens = room
        if params.min_tokens > min(params.max_tokens, room):
            raise VLLMValidationError(
                f"min_tokens is {params.min_tokens}, but of {self._max_model_len} tokens "
                f"(max_model_len) the prompt's {num_prompt_tokens} leave {room}",
                parameter="min_tokens",
                value=params.min_tokens,
            )
        stop_ids = list(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_ids += [i for i in self._other_eos_ids if i not in stop_ids]
        params.stop_token_ids = stop_ids
        params.eos_token_id = self.eos_token_id
        params.all_stop_token_ids = list(stop_ids)
        if self.eos_token_id is not None and not params.ignore_eos:
            params.all_stop_token_ids.append(self.eos_token_id)
        if params.bad_words:
            params.bad_words_token_ids = self._bad_words_ids(params.bad_words)
        if params.allowed_token_ids is not None:
            self._check_choice(params)
        return params

    def _check_choice(self, params: SamplingParams) -> None:
        """Of the allowed tokens, some must be left for the first place of the output."""
        forbidden = {ids[0] for ids in params.bad_words_token_ids or () if len(ids) == 1}
        if params.min_tokens:
            forbidden.update(params.all_stop_token_ids)
        if forbidden.issuperset(params.allowed_token_ids or ()):
            raise VLLMValidationError(
                "allowed_token_ids leaves no token to choose: bad_words, or min_tokens with the "
                "tokens that end the output, forbid all of them",
                parameter="allowed_token_ids",
            )

    def _check_params(self, params: SamplingParams) -> None:
        for processor in self._logits_processors:
            try:
                processor.validate_params(params)
            except ValueError as error:
                raise VLLMValidationError(str(error), parameter="extra_args") from error
        if params.extra_args:
            _check_plain("vllm_xargs", params.extra_args)
        if params.structured_outputs is not None:
            _check_plain("structured_outputs", msgspec.structs.asdict(params.structured_outputs))
        self._check_logprobs("logprobs", params.logprobs)
        self._check_logprobs("prompt_logprobs", params.prompt_logprobs)
        if params.stop_token_ids:
            self._check_ids("stop_token_ids", params.stop_token_ids)
        if params.logit_bias:
            self._check_ids("logit_bias", list(params.logit_bias))
        if params.allowed_token_ids is not None:
            if not params.allowed_token_ids:
                raise VLLMValidationError(
                    "allowed_token_ids must not be empty", parameter="allowed_token_ids"
                )
            self._check_ids("allowed_token_ids", params.allowed_token_ids)
        if self.tokenizer is None:
            for name in ("stop", "bad_words", "structured_outputs"):
                if getattr(params, name):
                    raise VLLMValidationError(
                        f"{name} needs a tokenizer, and this engine runs with "
                        "--skip-tokenizer-init",
                        parameter=name,
                    )

    def _check_logprobs(self, name: str, count: int | None) -> None:
        limit = self.model_config.max_logprobs
        if count is None or limit == -1:
            return
        if count == -1 or count > limit:
            shown = "the whole vocabulary" if count == -1 else count
            raise VLLMValidationError(
                f"{name} asks for {shown}, more than this engine's --max-logprobs {limit}",
                parameter=name,
                value=count,
            )

    def _bad_words_ids(self, bad_words: Sequence[str]) -> list[list[int]]:
        """Ids of each word as it begins a text and as it follows a space."""
        # A dictionary for its keys: they keep their order.
        unique: dict[tuple[int, ...], None] = {}
        for word in dict.fromkeys(word.lstrip() for word in bad_words):
            for text in (word, " " + word):
                ids = tuple(self.encode(text, add_special_tokens=False))
                if ids:
                    unique[ids] = None
        sequences = [list(ids) for ids in unique]
        for sequence in sequences:
            self._check_ids("bad_words", sequence)
        return sequences
