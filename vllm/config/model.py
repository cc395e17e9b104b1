"""The model: where it lies, its shape, and the limits that follow from it.

Built once by ``EngineArgs.create_engine_config``; nothing here reads files or imports torch at
module import.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.config.checks import at_least, one_of

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from vllm.config.parallel import ParallelConfig

DTYPES = ("bfloat16", "float16", "float32")
LOGPROBS_MODES = ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")
GENERATION_DEFAULTS = (
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "max_new_tokens",
    "presence_penalty",
    "frequency_penalty",
)
"""Keys of generation_config.json that are defaults of sampling parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The resolved model.

    Raises:
        ConfigError: a field has a value that cannot work.
    """

    model: str
    """What the user named: a directory, a GGUF file, a known short name or a hub id."""
    model_path: str
    """Resolved: an existing directory or ``.gguf`` file."""
    tokenizer: str
    """Directory, GGUF file or hub id of the tokenizer; resolved like ``model_path``."""
    hf_config: PretrainedConfig
    """The whole configuration."""
    hf_text_config: PretrainedConfig
    """The language model's part of it (the same object for text models)."""
    architecture: str
    """Name in ``architectures`` that the registry knows."""
    dtype_name: str
    """"bfloat16", "float16" or "float32": dtype of weights and activations."""
    max_model_len: int
    """Prompt and output tokens of one request together, at most."""
    tokenizer_mode: str = "auto"
    trust_remote_code: bool = False
    seed: int = 0
    """Seed of the engine's own random numbers."""
    revision: str | None = None
    tokenizer_revision: str | None = None
    quantization: str | None = None
    """Storage format of the weights; None where they are plain."""
    enforce_eager: bool = False
    """Never capture or compile graphs."""
    max_logprobs: int = 20
    """Largest ``logprobs`` of a request; -1 for no limit."""
    logprobs_mode: str = "raw_logprobs"
    """One of ``LOGPROBS_MODES``: before or after the sampling parameters applied."""
    served_model_name: tuple[str, ...] = ()
    """Names that requests may use; the first is shown in answers."""
    skip_tokenizer_init: bool = False
    """Prompts are token ids, and outputs carry no text."""
    disable_sliding_window: bool = False
    """The context is capped at the window, so that no layer needs one."""
    disable_cascade_attn: bool = False
    enable_sleep_mode: bool = False
    generation_config: dict[str, Any] = field(default_factory=dict)
    """Default sampling parameters: the model's generation_config, then the user's overrides."""
    logits_processors: tuple[str, ...] = ()
    """Dotted paths (``module:Class``) of custom logits processors."""
    runner_type: str = "generate"
    """What the model is run for."""

    def __post_init__(self) -> None:
        one_of(self, DTYPES, "dtype_name")
        one_of(self, LOGPROBS_MODES, "logprobs_mode")
        at_least(self, 1, "max_model_len")
        at_least(self, -1, "max_logprobs")

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of weights and activations."""
        import torch

        return getattr(torch, self.dtype_name)

    @property
    def is_encoder_decoder(self) -> bool:
        """An encoder reads the prompt, and a decoder answers with tokens of its own."""
        return bool(getattr(self.hf_config, "is_encoder_decoder", False))

    def get_vocab_size(self) -> int:
        """Token ids that the model knows."""
        return self.hf_text_config.vocab_size

    def get_hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.hf_text_config.hidden_size

    def get_num_layers(self) -> int:
        """Decoder layers."""
        return self.hf_text_config.num_hidden_layers

    def get_head_size(self) -> int:
        """Width of one attention head."""
        head_dim = getattr(self.hf_text_config, "head_dim", None)
        if head_dim:
            return head_dim
        return self.hf_text_config.hidden_size // self.hf_text_config.num_attention_heads

    def get_total_num_kv_heads(self) -> int:
        """KV heads of the whole model."""
        kv_heads = getattr(self.hf_text_config, "num_key_value_heads", None)
        return kv_heads or self.hf_text_config.num_attention_heads

    def get_num_kv_heads(self, parallel_config: ParallelConfig) -> int:
        """KV heads of one tensor-parallel rank; heads are replicated where TP is larger."""
        return max(1, self.get_total_num_kv_heads() // parallel_config.tensor_parallel_size)

    def get_num_attention_heads(self, parallel_config: ParallelConfig) -> int:
        """Query heads of one tensor-parallel rank."""
        return self.hf_text_config.num_attention_heads // parallel_config.tensor_parallel_size

    def get_diff_sampling_param(self) -> dict[str, Any]:
        """Sampling parameters whose default this model changes."""
        values = self.generation_config
        diff = {key: values[key] for key in GENERATION_DEFAULTS if values.get(key) is not None}
        if "max_new_tokens" in diff:
            diff["max_tokens"] = diff.pop("max_new_tokens")
        return diff
