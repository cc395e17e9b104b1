"""The Attention layer: what it declares, what it stores, whom it asks to compute."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from vllm.config import (
    AttentionConfig,
    CacheConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.errors import ConfigError, UnsupportedError
from vllm.forward_context import ForwardContext, set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import collect_layers
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

HEADS, KV_HEADS, HEAD_SIZE, BLOCK = 6, 2, 32, 16


def make_config(backend: str | None = None, **cache: object) -> VllmConfig:
    hf_config = SimpleNamespace(
        hidden_size=192,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=10,
    )
    return VllmConfig(
        model_config=ModelConfig(
            model="m",
            model_path="m",
            tokenizer="m",
            hf_config=hf_config,
            hf_text_config=hf_config,
            architecture="LlamaForCausalLM",
            dtype_name="float32",
            max_model_len=128,
        ),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=128, max_num_seqs=4, max_model_len=128
        ),
        cache_config=CacheConfig(**{"block_size": BLOCK} | cache),
        attention_config=AttentionConfig(backend=backend),
    )


def make_layer(config: VllmConfig, prefix: str = "layer", **options: object) -> Attention:
    with set_current_vllm_config(config):
        return Attention(
            HEADS, HEAD_SIZE, HEAD_SIZE**-0.5, num_kv_heads=KV_HEADS, prefix=prefix, **options
        )


@pytest.fixture(params=["CPU_ATTN", "TORCH_REF"])
def config(request: pytest.FixtureRequest) -> Iterator[VllmConfig]:
    yield make_config(request.param)


def one_request(tokens: int, before: int = 0) -> CommonAttentionMetadata:
    """Blocks 1, 2, ... hold the request in order."""
    length = before + tokens
    position = torch.arange(before, length)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    lengths = torch.tensor([length], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu=lengths,
        num_computed_tokens_cpu=torch.tensor([before], dtype=torch.int32),
        num_reqs=1,
        num_actual_tokens=tokens,
        max_query_len=tokens,
        max_seq_len=length,
        block_table_tensor=torch.arange(1, 5, dtype=torch.int32).view(1, 4),
        slot_mapping=position + BLOCK,
    )


def step_context(layer: Attention, common: CommonAttentionMetadata) -> ForwardContext:
    builder = layer.get_attn_backend().get_builder_cls()(
        layer.get_kv_cache_spec(make_config()), [layer.layer_name], make_config(), None
    )
    return ForwardContext(attn_metadata={layer.layer_name: builder.build(0, common)})


def test_rope_and_store_inside_the_layer_equal_rope_before_it(
    config: VllmConfig, seed: int
) -> None:
    rope = get_rope(
        HEAD_SIZE,
        max_position=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        trained_max_position=128,
    )
    inside, outside = make_layer(config, "a"), make_layer(config, "b")
    for layer in (inside, outside):
        layer.bind_kv_cache(torch.full((5, KV_HEADS, BLOCK, 2 * HEAD_SIZE), float("nan")))
    qkv = torch.randn(20, (HEADS + 2 * KV_HEADS) * HEAD_SIZE)
    sizes = [HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE]
    positions = torch.arange(20)
    with set_forward_context(step_context(inside, one_request(20))):
        fused = inside(*qkv.clone().split(sizes, -1), positions=positions, rotary_emb=rope)
    query, key, value = qkv.clone().split(sizes, -1)
    query, key = rope(positions, query, key)
    with set_forward_context(step_context(outside, one_request(20))):
        apart = outside(query, key, value)
    assert torch.allclose(fused, apart, atol=1e-6)
    assert torch.allclose(inside.kv_cache, outside.kv_cache, atol=1e-6, equal_nan=True)
    stored = inside.kv_cache[1:3].transpose(1, 2).flatten(0, 1)
    assert torch.equal(stored[:20, :, HEAD_SIZE:].flatten(1), value)
    assert stored[20:].isnan().all() and inside.kv_cache[3:].isnan().all()


def test_a_layer_that_shares_a_cache_reads_it_and_stores_nothing(
    config: VllmConfig, seed: int
) -> None:
    owner = make_layer(config, "owner")
    reader = make_layer(config, "reader", kv_sharing_target_layer_name="owner")
    cache = torch.zeros(5, KV_HEADS, BLOCK, 2 * HEAD_SIZE)
    owner.bind_kv_cache(cache)
    reader.bind_kv_cache(cache)
    query, key, value = (torch.randn(3, n * HEAD_SIZE) for n in (HEADS, KV_HEADS, KV_HEADS))
    with set_forward_context(step_context(owner, one_request(3))):
        expected = owner(query, key, value)
    before = cache.clone()
    with set_forward_context(
        ForwardContext(
            attn_metadata={
                "reader": step_context(owner, one_request(3)).attn_metadata["owner"]  # type: ignore[index]
            }
        )
    ):
        assert torch.equal(reader(query, key * 2, value * 2), expected)
        assert torch.equal(reader(query, None, None), expected)
    assert torch.equal(cache, before)
    assert reader.get_kv_cache_spec(config) is None


def test_a_profiling_run_gives_zeros_and_needs_no_cache(config: VllmConfig) -> None:
    layer = make_layer(config)
    with set_forward_context(ForwardContext(attn_metadata=None)):
        out = layer(torch.ones(2, 192), torch.ones(2, 64), torch.ones(2, 64))
    assert out.shape == (2, 192) and not out.any()


def test_a_slot_mapping_in_the_context_comes_before_the_metadatas(
    config: VllmConfig, seed: int
) -> None:
    layer = make_layer(config)
    layer.bind_kv_cache(torch.zeros(5, KV_HEADS, BLOCK, 2 * HEAD_SIZE))
    context = step_context(layer, one_request(1))
    context.slot_mapping["layer"] = torch.tensor([-1])
    with set_forward_context(context):
        layer(*(torch.randn(1, n * HEAD_SIZE) for n in (HEADS, KV_HEADS, KV_HEADS)))
    assert not layer.kv_cache.any()


def test_the_spec_says_what_a_block_holds() -> None:
    spec = make_layer(make_config()).get_kv_cache_spec(make_config())
    assert isinstance(spec, FullAttentionSpec)
    assert (spec.block_size, spec.num_kv_heads, spec.head_size) == (BLOCK, KV_HEADS, HEAD_SIZE)
    assert spec.page_size_bytes == BLOCK * KV_HEADS * 2 * HEAD_SIZE * 4
    half = make_config(cache_dtype="bfloat16")
    assert make_layer(half).get_kv_cache_spec(half).page_size_bytes == spec.page_size_bytes // 2
    skipping = make_config(cache_dtype="bfloat16", kv_cache_dtype_skip_layers=("layer",))
    assert make_layer(skipping).get_kv_cache_spec(skipping) == spec
    window = make_layer(make_config(), per_layer_sliding_window=40).get_kv_cache_spec(make_config())
    assert isinstance(window, SlidingWindowSpec) and window.sliding_window == 40
    whole_model = make_config(sliding_window=50)
    assert make_layer(whole_model).get_kv_cache_spec(whole_model).sliding_window == 50


def test_a_cache_of_another_dtype_than_the_model(seed: int) -> None:
    layer = make_layer(make_config(cache_dtype="bfloat16"))
    exact = make_layer(make_config())
    layer.bind_kv_cache(torch.zeros(5, KV_HEADS, BLOCK, 2 * HEAD_SIZE, dtype=torch.bfloat16))
    exact.bind_kv_cache(torch.zeros(5, KV_HEADS, BLOCK, 2 * HEAD_SIZE))
    inputs = [torch.randn(9, n * HEAD_SIZE) for n in (HEADS, KV_HEADS, KV_HEADS)]
    results = []
    for each in (layer, exact):
        with set_forward_context(step_context(each, one_request(9))):
            results.append(each(*inputs))
    assert torch.allclose(results[0], results[1], atol=2e-2)
    assert not torch.equal(results[0], results[1])


def test_layers_register_under_their_prefix_once() -> None:
    with collect_layers() as layers:
        layer = make_layer(make_config(), "model.layers.0.attn")
        assert layers == {"model.layers.0.attn": layer}
        with pytest.raises(ValueError, match=r"model\.layers\.0\.attn"):
            make_layer(make_config(), "model.layers.0.attn")


def test_what_no_backend_can_do_is_refused_when_the_layer_is_built() -> None:
    with set_current_vllm_config(make_config()):
        with pytest.raises(UnsupportedError, match="quantis"):
            Attention(2, 32, 1.0, quant_config=object())
        with pytest.raises(ConfigError, match="5 query heads cannot share 2 KV heads"):
            Attention(5, 32, 1.0, num_kv_heads=2)
    with pytest.raises(ConfigError, match="kv cache dtype fp8_ds_mla not supported"):
        make_layer(make_config(cache_dtype="fp8_ds_mla"))
