"""The tokenizer that a model's configuration names."""

from typing import Any

from vllm.config import ModelConfig

__all__ = ["tokenizer_from_config"]


def tokenizer_from_config(model_config: ModelConfig) -> Any:
    """A transformers tokenizer, or None with ``--skip-tokenizer-init``."""
    if model_config.skip_tokenizer_init:
        return None
    from vllm.transformers_utils.tokenizer import get_tokenizer

    return get_tokenizer(
        model_config.tokenizer,
        mode=model_config.tokenizer_mode,
        trust_remote_code=model_config.trust_remote_code,
        revision=model_config.tokenizer_revision,
    )
