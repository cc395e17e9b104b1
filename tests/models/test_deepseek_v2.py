"""DeepSeek V2 and V3 give the logits of transformers, expanded and absorbed; what they keep."""

import pytest
import torch

from tests.loader.test_default_loader import edit, load_error
from tests.models.checkpoints import make_hf_model, save
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.test_llama import assert_logits_equal, reference
from vllm.errors import ConfigError
from vllm.model_executor.layers.attention import MLAAttention
from vllm.v1.attention.backends.mla.cpu_mla import tokens_worth_expanding
from vllm.v1.kv_cache_interface import MLAAttentionSpec

TYPES = ["deepseek_v2", "deepseek_v3"]
BACKENDS = ["CPU_MLA", "TORCH_REF_MLA"]
VARIANTS = {
    "plain": ("deepseek_v2", {}),
    "V2-Lite": ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy", "n_group": None}),
    "biases": ("deepseek_v2", {"attention_bias": True}),
    "no scaling of RoPE": ("deepseek_v2", {"rope_parameters": {"rope_theta": 1000.0}}),
    "V3": ("deepseek_v3", {}),
    "V3, weights as they are": ("deepseek_v3", {"norm_topk_prob": False}),
    "V3, one group": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "V3, halves": ("deepseek_v3", {"rope_interleave": False}),
    "V3, tied": ("deepseek_v3", {"tie_word_embeddings": True}),
    "wide latent": ("deepseek_v3", {"kv_lora_rank": 88, "v_head_dim": 16}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_deepseek_equals_transformers(variant, backend, tmp_path):
    model_type, overrides = VARIANTS[variant]
    hf = make_hf_model(model_type, **overrides)
    paged = PagedModel(make_config(save(hf, tmp_path), backend=backend))
    assert_logits_equal(paged.logits(TOKENS), reference(hf))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 9, 40])
def test_chunks_go_on_from_cached_latents(chunk, backend, tmp_path):
    hf = make_hf_model("deepseek_v3")
    paged = PagedModel(make_config(save(hf, tmp_path), backend=backend))
    assert_logits_equal(paged.logits(TOKENS, chunk=chunk), reference(hf))


def test_a_batch_that_is_partly_expanded(tmp_path):
    hf = make_hf_model("deepseek_v2")
    paged = PagedModel(make_config(save(hf, tmp_path)))
    few = tokens_worth_expanding(next(iter(paged.layers.values())))
    assert 8 < few < 40
    got = {row: [] for row in range(4)}
    for sizes in ({0: 5, 1: 40}, {0: 42, 1: 1, 2: 3}, {0: 1, 1: 2, 2: 50, 3: 1}, {3: few, 0: 1}):
        chunks = {
            row: TOKENS[paged.computed[row] : paged.computed[row] + size]
            for row, size in sizes.items()
        }
        for row, logits in paged.step(chunks).items():
            got[row].append(logits)
    expected = reference(hf)
    for parts in got.values():
        ours = torch.cat(parts)
        assert_logits_equal(ours, expected[: len(ours)])


def test_heads_are_expanded_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm.v1.attention.backends.mla.cpu_mla._EXPANDED_BYTES", 40_000)
    hf = make_hf_model("deepseek_v3")
    assert_logits_equal(PagedModel(make_config(save(hf, tmp_path))).logits(TOKENS), reference(hf))


@pytest.mark.parametrize("model_type", TYPES)
def test_one_latent_for_all_heads_is_kept(model_type, tmp_path):
    config = make_config(save(make_hf_model(model_type), tmp_path))
    paged = PagedModel(config)
    assert list(paged.layers) == [f"model.layers.{i}.self_attn.attn" for i in range(4)]
    for layer in paged.layers.values():
        assert isinstance(layer, MLAAttention)
        spec = layer.get_kv_cache_spec(config)
        assert isinstance(spec, MLAAttentionSpec)
        assert spec.page_size_bytes == 16 * (40 + 8) * 4
        assert layer.kv_cache.shape[1:] == (16, 48), "the head axis is dropped"


def test_sixteen_bit_weights_come_close(tmp_path):
    hf = make_hf_model("deepseek_v2", initializer_range=0.05)
    paged = PagedModel(make_config(save(hf, tmp_path), dtype="bfloat16"))
    # Rounding may send a token to another expert where two are nearly as good.
    assert torch.cosine_similarity(paged.logits(TOKENS), reference(hf)).quantile(0.2) > 0.99


def test_weights_are_packed_and_released(tmp_path):
    model = PagedModel(make_config(save(make_hf_model("deepseek_v3"), tmp_path))).model
    left = {name.split(".")[-2] for name, _ in model.named_parameters()}
    assert left == {"norm", "input_layernorm", "post_attention_layernorm"} | {
        "q_a_layernorm",
        "kv_a_layernorm",
        "gate",  # the bias of the experts' choice
    }


def test_layers_that_guess_further_tokens_are_left_out(tmp_path):
    hf = make_hf_model("deepseek_v3", num_mtp_layers=1)
    save(hf, tmp_path)
    extra = {"model.layers.4.eh_proj.weight": torch.zeros(96, 192)}
    edit(tmp_path, lambda tensors: tensors.update(extra))
    assert_logits_equal(PagedModel(make_config(tmp_path)).logits(TOKENS), reference(hf))
    edit(
        tmp_path, lambda tensors: tensors.update({"model.layers.5.eh_proj.weight": torch.zeros(1)})
    )
    assert "1 unexpected: model.layers.5.eh_proj.weight" in load_error(tmp_path)


def test_what_is_missing_and_misshaped_is_listed(tmp_path):
    save(make_hf_model("deepseek_v3"), tmp_path)
    prefix = "model.layers.3"

    def damage(tensors):
        del tensors[f"{prefix}.mlp.gate.e_score_correction_bias"]
        del tensors[f"{prefix}.mlp.experts.2.up_proj.weight"]
        tensors[f"{prefix}.self_attn.kv_b_proj.weight"] = torch.zeros(7, 40)

    edit(tmp_path, damage)
    message = load_error(tmp_path)
    assert "2 missing: " in message
    assert f"{prefix}.mlp.gate.e_score_correction_bias" in message
    assert f"{prefix}.mlp.experts.2.up_proj.weight" in message
    assert f"{prefix}.self_attn.kv_b_proj.weight has shape [7, 40], expected [168, 40]" in message


def test_a_backend_for_heads_is_refused_with_the_reason(tmp_path):
    save(make_hf_model("deepseek_v2"), tmp_path)
    with pytest.raises(ConfigError, match="CPU_ATTN: MLA not supported"):
        PagedModel(make_config(tmp_path, backend="CPU_ATTN"))
