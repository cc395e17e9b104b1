"""States through the whole engine: bound, zeroed, kept for reuse, watched byte by byte."""

import json
import random

import pytest

from tests.kv_cache.state_model import ARCHITECTURE, VOCAB, StateLayer, predict
from vllm.errors import ConfigError
from vllm.v1.kv_cache.blocks import KVBlockZeroer
from vllm.v1.kv_cache.published import publish_layout
from vllm.v1.kv_cache_layout import KVCacheLayout

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from vllm.model_executor.models.registry import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "tests.kv_cache.state_model:StateTestForCausalLM")
    path = tmp_path_factory.mktemp("state")
    config = {
        "architectures": [ARCHITECTURE],
        "hidden_size": 16,
        "num_attention_heads": 1,
        "num_hidden_layers": 2,
        "max_position_embeddings": 256,
        "vocab_size": VOCAB,
        "dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def make_llm(folder, monkeypatch, layout=None, **options):
    from vllm import LLM

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", "1")
    if layout is not None:
        monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    options.setdefault("kv_cache_memory_bytes", 1 << 18)
    return LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        max_num_batched_tokens=40,
        max_num_seqs=4,
        **options,
    )


def generate(llm, prompts, max_tokens=MAX_TOKENS):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], [
        output.num_cached_tokens for output in outputs
    ]


def expected(prompt, count=MAX_TOKENS):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(predict(tokens))
    return tokens[len(prompt) :]


def prompts(*lengths, seed=0):
    source = random.Random(seed)
    return [[source.randrange(VOCAB) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("conv", ["SD", "DS"])
@pytest.mark.parametrize("layout", [None, "LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_tokens_do_not_depend_on_where_states_lie(folder, monkeypatch, layout, conv):
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", conv)
    llm = make_llm(folder, monkeypatch, layout)
    texts = prompts(5, 70, 33, 1)
    for _ in range(2):  # again, in blocks that others have used
        tokens, _ = generate(llm, texts)
        assert tokens == [expected(text) for text in texts]


@pytest.mark.parametrize("mode", ["align", "all"])
@pytest.mark.parametrize("layout", [None, "LBHNC"])
def test_kept_states_are_found_and_change_no_token(folder, monkeypatch, layout, mode):
    llm = make_llm(
        folder,
        monkeypatch,
        layout,
        mamba_cache_mode=mode,
        block_size=32,
        enable_prefix_caching=True,
    )
    (common,) = prompts(64, seed=1)
    texts = [common + tail for tail in prompts(9, 40, 3, seed=2)]
    first, _ = generate(llm, texts[:1])
    assert first == [expected(texts[0])]
    again, cached = generate(llm, texts)
    assert again == [expected(text) for text in texts]
    # A step takes 40 tokens at most, so in mode "align" it ends, and keeps a state, at 32 and 64.
    assert cached == [64, 64, 64]


def test_preempted_requests_start_again_with_zeroed_states(folder, monkeypatch):
    llm = make_llm(folder, monkeypatch, num_gpu_blocks_override=12, block_size=32)
    texts = prompts(50, 60, 40, 30, seed=3)
    tokens, _ = generate(llm, texts, 40)
    assert tokens == [expected(text, 40) for text in texts]


def test_without_zeroing_a_fresh_state_is_garbage(folder, monkeypatch):
    llm = make_llm(folder, monkeypatch)
    monkeypatch.setattr(KVBlockZeroer, "zero_block_ids", lambda self, block_ids: None)
    with pytest.raises(AssertionError):
        generate(llm, prompts(5))


@pytest.mark.parametrize("state", [0, 1])
def test_a_state_written_to_another_block_is_found(folder, monkeypatch, state):
    llm = make_llm(folder, monkeypatch)
    forward = StateLayer.forward

    def stray(self, rows):
        answer = forward(self, rows)
        self.kv_cache[state][7] = 1.0
        return answer

    generate(llm, prompts(5))
    monkeypatch.setattr(StateLayer, "forward", stray)
    with pytest.raises(AssertionError, match=r"layers\.0\.state of group \d, block 7"):
        generate(llm, prompts(5))


def test_every_part_of_the_engine_has_taken_up_one_layout(folder, monkeypatch):
    llm = make_llm(folder, monkeypatch)
    engine = llm.llm_engine
    layout = KVCacheLayout(engine.client.facts.kv_cache_layout)
    other = next(item for item in KVCacheLayout if item is not layout)
    runner = engine.client._core.executor.worker.model_runner
    for owner in (engine, engine.client._core, runner):
        with pytest.raises(ConfigError, match=f"{other} contradicts {layout}"):
            publish_layout(other, "", owner)
    with pytest.raises(ConfigError, match=f"{other} contradicts {layout}"):
        publish_layout(other, engine.vllm_config.instance_id, folder)


def test_the_plan_is_logged_in_short(folder, monkeypatch, caplog):
    with caplog.at_level("INFO", logger="vllm"):
        make_llm(folder, monkeypatch)
    text = caplog.text
    assert "KV cache layout BLHNC: " in text
    assert "1 x 1 mamba (128 tokens)" in text
    assert "% with equal pages)" in text
