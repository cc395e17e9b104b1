"""Llama and Mistral give the logits of transformers, whole, in chunks and in batches."""

import pytest
import torch

from tests.models.checkpoints import make_hf_model, save
from tests.models.harness import TOKENS, VOCAB, PagedModel, make_config
from vllm import _custom_ops as ops

BACKENDS = ["CPU_ATTN", "TORCH_REF"]
"""With kernels of our own, a layer may run as one of them; with the reference it never does."""
LLAMA_VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 32},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads": {"num_key_value_heads": 6},
    "eps": {"rms_norm_eps": 0.1},
}


@torch.inference_mode()
def reference(model, tokens=TOKENS):
    return model(torch.tensor([tokens])).logits[0]


def assert_logits_equal(ours, theirs):
    assert theirs.std() > 0.1, "logits that say nothing could not tell a wrong model"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", LLAMA_VARIANTS)
def test_llama_equals_transformers(variant, backend, tmp_path):
    hf = make_hf_model("llama", **LLAMA_VARIANTS[variant])
    paged = PagedModel(make_config(save(hf, tmp_path), backend=backend))
    assert_logits_equal(paged.logits(TOKENS), reference(hf))


@pytest.mark.parametrize("window", [None, 7, 20])
def test_mistral_equals_transformers(window, tmp_path):
    hf = make_hf_model("mistral", sliding_window=window)
    paged = PagedModel(make_config(save(hf, tmp_path)))
    assert_logits_equal(paged.logits(TOKENS), reference(hf))
    assert {layer.sliding_window for layer in paged.layers.values()} == {window}


def test_disable_sliding_window_sees_everything(tmp_path):
    hf = make_hf_model("mistral", sliding_window=7)
    paged = PagedModel(make_config(save(hf, tmp_path), disable_sliding_window=True))
    wide = make_hf_model("mistral", sliding_window=None)
    assert_logits_equal(paged.logits(TOKENS), reference(wide))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 9, 32])
def test_chunks_change_nothing(backend, chunk, tmp_path):
    hf = make_hf_model("mistral", sliding_window=11)
    paged = PagedModel(make_config(save(hf, tmp_path), backend=backend))
    assert_logits_equal(paged.logits(TOKENS, chunk=chunk), reference(hf))


def test_a_batch_of_prefills_and_decodes(tmp_path):
    hf = make_hf_model("llama")
    paged = PagedModel(make_config(save(hf, tmp_path)))
    others = [[(7 * t + k) % VOCAB for t in TOKENS] for k in range(3)]
    sequences = [TOKENS, *others]
    got = {row: [] for row in range(4)}
    plan = [{0: 40, 1: 3}, {0: 1, 1: 20, 2: 50}, {0: 1, 1: 1, 2: 1, 3: 33}, {3: 1, 0: 5, 1: 2}]
    for sizes in plan:
        chunks = {
            row: sequences[row][paged.computed[row] : paged.computed[row] + size]
            for row, size in sizes.items()
        }
        for row, logits in paged.step(chunks).items():
            got[row].append(logits)
    for row, parts in got.items():
        ours = torch.cat(parts)
        assert_logits_equal(ours, reference(hf, sequences[row])[: len(ours)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_weights_come_close(dtype, tmp_path):
    hf = make_hf_model("llama", initializer_range=0.05)
    paged = PagedModel(make_config(save(hf, tmp_path), dtype=dtype))
    ours, theirs = paged.logits(TOKENS), reference(hf)
    logits = paged.model.compute_logits(torch.zeros(1, 96, dtype=getattr(torch, dtype)))
    assert logits.dtype == (torch.float32 if ops.has_extension() else getattr(torch, dtype))
    assert torch.cosine_similarity(ours, theirs).min() > 0.995


def test_embeddings_can_be_given_instead_of_ids(tmp_path):
    hf = make_hf_model("llama")
    paged = PagedModel(make_config(save(hf, tmp_path)))
    expected = paged.logits(TOKENS)
    model = paged.model
    embeds = model.embed_input_ids(torch.tensor(TOKENS))
    kept = embeds.clone()

    def from_embeds(ids, positions):
        return model.forward(None, positions, inputs_embeds=embeds)

    paged.model = type(
        "FromEmbeds",
        (),
        {"__call__": staticmethod(from_embeds), "compute_logits": model.compute_logits},
    )()
    assert torch.equal(paged.logits(TOKENS), expected)
    assert torch.equal(embeds, kept), "the caller's embeddings were written to"


def test_a_replaced_child_is_the_one_that_runs(tmp_path):
    """Children are kept as plain attributes for speed; a replacement must not be missed."""
    paged = PagedModel(make_config(save(make_hf_model("llama"), tmp_path)))
    layer = paged.model.model.layers[0]
    inner = layer.mlp

    class Zeros(torch.nn.Module):
        def forward(self, x):
            return inner(x) * 0

    before = paged.logits(TOKENS)
    layer.mlp = Zeros()
    assert not torch.allclose(paged.logits(TOKENS), before)
    del layer.mlp
    assert not hasattr(layer, "mlp")
    layer.mlp = inner
    assert torch.equal(paged.logits(TOKENS), before)
