"""Tokens do not depend on where bytes lie: every layout serves a hybrid model, watched.

Windowed and full layers overlay each other in one pool; debug mode checks every write.
"""

from pathlib import Path

import pytest

PROMPTS = [[5, 9, 2, 77, 31], list(range(10, 75)), [8] * 33]
MAX_TOKENS = 20


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A random Qwen2 of 5 layers, window 24 in all but the second; its greedy tokens."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    kinds = ["sliding_attention", "full_attention", *["sliding_attention"] * 3]
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=len(kinds),
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        use_sliding_window=True,
        sliding_window=24,
        layer_types=kinds,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
        attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config).eval()
    folder: Path = tmp_path_factory.mktemp("hybrid")
    model.save_pretrained(folder)
    tokens = []
    for prompt in PROMPTS:
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens.append(ids[0, len(prompt) :].tolist())
    return folder, tokens


@pytest.mark.parametrize(
    ("layout", "block_size"),
    [
        (None, None),
        ("HND", 16),
        ("NHD", 32),
        ("LHBNC", 16),
        ("BLHNC", 48),
        ("BLNHC", 16),
        ("BHLNC", 16),
    ],
)
def test_greedy_tokens(reference, layout, block_size, monkeypatch):
    from vllm import LLM, SamplingParams

    folder, expected = reference
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", "1")
    if layout is not None:
        monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    options = {} if block_size is None else {"block_size": block_size}
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        max_num_batched_tokens=32,
        max_num_seqs=4,
        kv_cache_memory_bytes=2 << 20,
        **options,
    )
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False)
    for _ in range(2):  # again, from the prefix cache
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
