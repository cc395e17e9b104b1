"""A tiny random Llama with a real byte-level tokenizer, and engines on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm import LLM

# Every byte is a token, so random weights write text with broken and whole UTF-8 alike.
CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 4,
    "def main():\n    return [x for x in range(10)]\n" * 4,
    "Größe, naïve café, 日本語 テキスト, emoji 😀 👩‍👩‍👧 end. " * 4,
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 512
EOS = 1


def make_tokenizer(folder: Path) -> Any:
    """A byte-level BPE tokenizer with ``<s>`` (0), ``</s>`` (1) and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden size 64, 2 layers, context 256; transformers' own checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    make_tokenizer(folder)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=EOS,
        tie_word_embeddings=True,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 3]}))
    return folder


ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "kv_cache_memory_bytes": 4 << 20,
    "max_num_seqs": 8,
}


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    from vllm.transformers_utils.tokenizer import get_tokenizer

    return get_tokenizer(tiny_model)


@pytest.fixture(autouse=True, scope="package")
def debug_mode() -> Iterator[None]:
    """Engines of these tests check their block pool whenever they are idle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_KV_CACHE_DEBUG", "1")
        yield


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    """An engine in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        engine = LLM(str(tiny_model), **ENGINE_ARGS)
    yield engine
    engine.shutdown()
