"""RMSNorm alone, fused with the residual sum, and in place on strided views."""

import pytest
import torch
import transformers

from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm


def formula(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def make_norm(size, eps=1e-5):
    norm = RMSNorm(size, eps=eps)
    norm.weight.data.uniform_(0.5, 1.5)
    return norm


def test_alone():
    norm, x = make_norm(24), torch.randn(5, 24)
    kept = x.clone()
    torch.testing.assert_close(norm(x), formula(x, norm.weight, 1e-5))
    assert torch.equal(x, kept)


def test_with_the_residual_sum():
    norm, x, residual = make_norm(24), torch.randn(5, 24), torch.randn(5, 24)
    total = x + residual
    output, stream = norm(x, residual)
    torch.testing.assert_close(stream, total)
    torch.testing.assert_close(output, formula(total, norm.weight, 1e-5))


def test_in_place_on_heads_of_a_wider_row():
    norm, rows = make_norm(8), torch.randn(5, 40)
    kept = rows.clone()
    norm.forward_in_place(rows[:, 8:24].unflatten(-1, (2, 8)))
    heads = kept[:, 8:24].unflatten(-1, (2, 8))
    torch.testing.assert_close(rows[:, 8:24], formula(heads, norm.weight, 1e-5).flatten(1))
    assert torch.equal(rows[:, :8], kept[:, :8])
    assert torch.equal(rows[:, 24:], kept[:, 24:])


def test_the_weight_starts_at_one():
    assert torch.equal(RMSNorm(4).weight.data, torch.ones(4))


def test_silu_and_mul():
    x = torch.randn(3, 10)
    expected = torch.nn.functional.silu(x[:, :5]) * x[:, 5:]
    torch.testing.assert_close(SiluAndMul()(x), expected)


def test_without_a_weight():
    norm, rows = RMSNorm(8, eps=1e-5, has_weight=False), torch.randn(5, 16)
    assert dict(norm.named_parameters()) == {}
    kept = rows.clone()
    norm.forward_in_place(rows.unflatten(-1, (2, 8)))
    heads = kept.unflatten(-1, (2, 8))
    torch.testing.assert_close(rows, formula(heads, torch.ones(8), 1e-5).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemmas_weight_is_stored_less_one(dtype):
    theirs = transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm(64).to(dtype)
    norm = GemmaRMSNorm(64, dtype=dtype)
    x = torch.randn(9, 64).to(dtype)
    torch.testing.assert_close(norm(x), theirs(x))
    theirs.weight.data.uniform_(-0.1, 0.1)
    norm.weight.weight_loader(norm.weight, theirs.weight.data)
    for _ in range(2):  # a second call changes nothing
        norm.process_weights_after_loading()
        torch.testing.assert_close(norm(x), theirs(x))
    total = x + x
    output, stream = norm(x.clone(), x.clone())
    torch.testing.assert_close(stream, total)
    torch.testing.assert_close(output, theirs(total))
