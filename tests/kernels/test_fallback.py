"""Without the extension PyTorch does the same work, and that is said once."""

import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch

from vllm import _custom_ops as ops
from vllm import _extension

WITHOUT = """
    import sys
    sys.modules["vllm._C"] = None  # what a missing file is to an import
"""


def both_ways(monkeypatch: pytest.MonkeyPatch, call: Callable[[], torch.Tensor]) -> None:
    """``call`` gives the same with the extension and without."""
    with_extension = call()
    with monkeypatch.context() as patch:
        patch.setattr(_extension, "kernels", None)
        without = call()
    assert with_extension.dtype == without.dtype and with_extension.shape == without.shape
    assert torch.allclose(with_extension.float(), without.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(not ops.has_extension(), reason="vllm._C is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operator_has_a_pytorch_form(
    seed: int, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    weight = (torch.randn(128, 64) / 8).to(dtype)
    x, bias = torch.randn(5, 64).to(dtype), torch.randn(128).to(dtype)
    ids = torch.tensor([3, 127, 0])
    scale = torch.randn(64).to(dtype)

    def added() -> torch.Tensor:
        y, residual = x.clone(), (x * 2).clone()
        ops.fused_add_rms_norm(y, residual, scale, 1e-5)
        return torch.cat((y, residual))

    both_ways(monkeypatch, lambda: ops.linear(x, ops.pack_weight(weight), bias))
    both_ways(monkeypatch, lambda: ops.gate_up_silu(x, ops.pack_weight(weight)))
    both_ways(monkeypatch, lambda: ops.embedding(ids, ops.pack_weight(weight)))
    both_ways(monkeypatch, lambda: ops.pack_weight(weight).unpack())
    both_ways(monkeypatch, lambda: ops.rms_norm(x, scale, 1e-5))
    both_ways(monkeypatch, added)
    both_ways(monkeypatch, lambda: ops.silu_and_mul(x))
    both_ways(monkeypatch, lambda: ops.argmax(x))


@pytest.mark.skipif(not ops.has_extension(), reason="vllm._C is not built")
def test_attention_has_a_pytorch_form(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(3, 7, 2, 16).unbind(0)
    table, positions = torch.randn(50, 16), torch.arange(7)

    def step() -> torch.Tensor:
        cache = torch.zeros(3, 2, 16, 32)
        q, out = query.clone(), torch.empty_like(query)
        ops.rope_and_store(
            positions, q, key.clone(), value, table, True, cache, torch.arange(16, 23)
        )
        ops.paged_attention(
            q,
            cache,
            out,
            torch.tensor([0, 7], dtype=torch.int32),
            torch.tensor([7], dtype=torch.int32),
            torch.tensor([[1]], dtype=torch.int32),
            0.25,
        )
        return torch.cat((out.flatten(), cache.flatten()))

    both_ways(monkeypatch, step)


def run_without(source: str) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(WITHOUT) + textwrap.dedent(source)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)


def test_a_missing_extension_is_said_once_and_works() -> None:
    result = run_without(
        """
        import torch
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform
        current_platform.init_threads()
        current_platform.init_threads()
        assert not ops.has_extension() and ops.isa() == "pytorch"
        print(ops.linear(torch.ones(1, 4), ops.pack_weight(torch.ones(2, 4))).tolist())
        """
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[[4.0, 4.0]]"
    assert result.stderr.count("vllm._C is not built") == 1


def test_an_instruction_set_cannot_be_chosen_without_the_extension() -> None:
    result = run_without("from vllm import _custom_ops as ops\nops.set_isa('avx2')\n")
    assert "the extension is not built" in result.stderr
