"""Scales of an fp8 cache come with the checkpoint, under any of the names that tools give them."""

import pytest
import torch

from tests.loader.test_default_loader import edit, load_error
from tests.models.checkpoints import make_hf_model, save
from tests.models.harness import make_config
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model


@pytest.fixture
def folder(tmp_path):
    save(make_hf_model("llama"), tmp_path)
    return tmp_path


def scales_of(folder):
    model = get_model(make_config(folder))
    layers = [m for m in model.modules() if isinstance(m, Attention)]
    return [(layer._k_scale_float, layer._v_scale_float) for layer in layers]


@pytest.mark.parametrize(
    ("k_name", "v_name"),
    [
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
    ],
)
def test_each_layer_gets_its_own(folder, k_name, v_name):
    def add(tensors):
        for layer in range(2):
            prefix = f"model.layers.{layer}.self_attn"
            tensors[f"{prefix}.{k_name}"] = torch.tensor(0.5 + layer)
            tensors[f"{prefix}.{v_name}"] = torch.tensor([0.25 + layer])
            tensors[f"{prefix}.q_scale"] = torch.tensor(2.0)

    edit(folder, add)
    assert scales_of(folder)[:2] == [(0.5, 0.25), (1.5, 1.25)]


def test_one_for_both_sides_and_none(folder):
    edit(folder, lambda t: t.update({"model.layers.1.self_attn.kv_scale": torch.tensor(0.125)}))
    assert scales_of(folder)[:2] == [(1.0, 1.0), (0.125, 0.125)]


@pytest.mark.parametrize("value", [torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(2)])
def test_what_is_no_scale_is_refused(folder, value):
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.k_scale": value}))
    assert "layers.0.self_attn.k_scale must be one positive number" in load_error(folder)


def test_they_move_what_fp8_would_cut_off(folder, monkeypatch):
    """Values a million times as large, which e4m3 only holds with a scale."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

    def enlarge(tensors):
        for name in list(tensors):
            if name.endswith("v_proj.weight"):
                tensors[name] *= 2**20
                tensors[name.replace("weight", "v_scale")] = torch.tensor(2.0**14)
            if name.endswith("o_proj.weight"):
                tensors[name] /= 2**20

    def log_probs(cache_dtype):
        llm = LLM(
            str(folder), dtype="float32", kv_cache_memory_bytes=4 << 20, max_model_len=64,
            kv_cache_dtype=cache_dtype, skip_tokenizer_init=True,
        )  # fmt: skip
        prompt = [3, 9, 27, 5, 15, 45, 7, 21, 63]
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        llm.shutdown()
        rows = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        return torch.tensor([row[token].logprob for row, token in rows])

    edit(folder, enlarge)
    exact, ours = log_probs("auto"), log_probs("fp8")
    edit(folder, lambda t: [t.pop(name) for name in list(t) if name.endswith("v_scale")])
    cut_off = log_probs("fp8")
    assert (ours - exact).abs().max() < 0.1 * (cut_off - exact).abs().max()
