"""The model: where it lies, its shape, and the limits that follow from it.

Built once by ``EngineArgs.create_engine_config``; nothing here reads files or imports torch at
module import.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from vllm.config.parallel import ParallelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
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
    revision: str | None = None
    tokenizer_revision: str | None = None
    quantization: str | None = None
    enforce_eager: bool = False
    max_logprobs: int = 20
    """Largest ``logprobs`` of a request; -1 for no limit."""
    logprobs_mode: str = "raw_logprobs"
    served_model_name: tuple[str, ...] = ()
    """Names that requests may use; the first is shown in answers."""
    skip_tokenizer_init: bool = False
    disable_sliding_window: bool = False
    disable_cascade_attn: bool = False
    enable_sleep_mode: bool = False
    generation_config: dict[str, Any] = field(default_factory=dict)
    """Default sampling parameters: the model's generation_config, then the user's overrides."""
    logits_processors: tuple[str, ...] = ()
    """Dotted paths (``module:Class``) of custom logits processors."""
    runner_type: str = "generate"

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype_name)

    def get_vocab_size(self) -> int:
        return self.hf_text_config.vocab_size

    def get_hidden_size(self) -> int:
        return self.hf_text_config.hidden_size

    def get_num_layers(self) -> int:
        return self.hf_text_config.num_hidden_layers

    def get_head_size(self) -> int:
        head_dim = getattr(self.hf_text_config, "head_dim", None)
        if head_dim:
            return head_dim
        return self.hf_text_config.hidden_size // self.hf_text_config.num_attention_heads

    def get_total_num_kv_heads(self) -> int:
        kv_heads = getattr(self.hf_text_config, "num_key_value_heads", None)
        return kv_heads or self.hf_text_config.num_attention_heads

    def get_num_kv_heads(self, parallel_config: ParallelConfig) -> int:
        """KV heads of one tensor-parallel rank; heads are replicated where TP is larger."""
        return max(1, self.get_total_num_kv_heads() // parallel_config.tensor_parallel_size)

    def get_num_attention_heads(self, parallel_config: ParallelConfig) -> int:
        return self.hf_text_config.num_attention_heads // parallel_config.tensor_parallel_size

    def get_diff_sampling_param(self) -> dict[str, Any]:
        """Sampling parameters whose default this model changes."""
        known = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "max_new_tokens")
        diff = {
            k: self.generation_config[k] for k in known if self.generation_config.get(k) is not None
        }
        if "max_new_tokens" in diff:
            diff["max_tokens"] = diff.pop("max_new_tokens")
        return diff
