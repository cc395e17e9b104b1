"""RMSNorm, gates of MLPs, argmax and RoPE against PyTorch in float64."""

import pytest
import torch

from vllm import _custom_ops as ops
from vllm import _torch_ops

pytestmark = pytest.mark.skipif(not ops.has_extension(), reason="vllm._C is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = TOLERANCE[actual.dtype]
    return torch.allclose(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (3, 5), (200, 576), (7, 3, 64)])
def test_rms_norm_over_strided_rows(
    isa: str, seed: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = torch.randn(*shape[:-1], shape[-1] + 4).to(dtype)[..., : shape[-1]]
    weight = torch.randn(shape[-1]).to(dtype)
    expected = _torch_ops.rms_norm(x.double(), weight.double(), 1e-5)
    assert close(ops.rms_norm(x, weight, 1e-5), expected)
    assert ops.rms_norm(x, weight, 1e-5, out=x) is x
    assert close(x, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 90])
def test_the_residual_is_added_before_the_norm(
    isa: str, seed: int, dtype: torch.dtype, rows: int
) -> None:
    x, residual = torch.randn(rows, 580).to(dtype)[:, :576], torch.randn(rows, 576).to(dtype)
    weight = torch.randn(576).to(dtype)
    total = (x.double() + residual.double()).to(dtype)
    ops.fused_add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert close(x, _torch_ops.rms_norm(total.double(), weight.double(), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 3072), (40, 3070)])
def test_silu_and_mul(isa: str, seed: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = (torch.randn(shape) * 8).to(dtype)
    x[0, 0], x[0, 1] = 100, -100  # e^100 overflows a float
    assert close(ops.silu_and_mul(x), _torch_ops.silu_and_mul(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 3072), (40, 3070)])
def test_other_gates(isa: str, seed: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = (torch.randn(shape) * 4).to(dtype)
    x[0, 0], x[0, 1], x[0, 2] = 30, -30, 0
    gelu = _torch_ops.gelu_tanh_and_mul(x.double())
    swiglu = _torch_ops.swiglu_oai_and_mul(x.double(), 1.702, 7.0)
    strided = torch.cat((x, x), -1)[:, : x.shape[1]]
    for rows in (x, strided):
        assert close(ops.gelu_tanh_and_mul(rows), gelu)
        assert close(ops.swiglu_oai_and_mul(rows, 1.702, 7.0), swiglu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 90])
def test_a_float32_weight_norms_sixteen_bit_rows(
    isa: str, seed: int, dtype: torch.dtype, rows: int
) -> None:
    x, residual = torch.randn(rows, 576).to(dtype), torch.randn(rows, 576).to(dtype)
    weight = 1 + torch.randn(576) * 1e-3  # less than bfloat16 can tell from one
    assert close(ops.rms_norm(x, weight, 1e-6), _torch_ops.rms_norm(x.double(), weight, 1e-6))
    total = (x.double() + residual.double()).to(dtype)
    ops.fused_add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert close(x, _torch_ops.rms_norm(total.double(), weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_takes_the_first_of_equal_values(isa: str, seed: int, dtype: torch.dtype) -> None:
    logits = torch.randn(20, 4999).to(dtype)
    logits[3, 100] = logits[3, 4000] = 50
    logits[4] = float("-inf")
    logits[5] = float("-inf")
    logits[5, 4998] = -3
    assert ops.argmax(logits).tolist() == [
        -1 if row == 4 else best for row, best in enumerate(logits.float().argmax(dim=-1).tolist())
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_argmax_chooses_nothing_that_is_not_finite(
    isa: str, seed: int, dtype: torch.dtype, value: float
) -> None:
    logits = torch.randn(3, 4999).to(dtype)
    best = logits.float().argmax(dim=-1).tolist()
    logits[1, 2500] = value
    expected = [best[0], -1, best[2]]
    assert ops.argmax(logits).tolist() == expected
    assert _torch_ops.argmax(logits).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [8, 24, 128])
def test_rope_rotates_query_and_key_in_place(
    isa: str, seed: int, dtype: torch.dtype, is_neox: bool, rotary_dim: int
) -> None:
    qkv = torch.randn(9, 7 * 128).to(dtype)
    query, key, _ = qkv.split([4 * 128, 2 * 128, 128], dim=-1)
    positions = torch.randint(0, 50, (9,))
    table = torch.randn(50, rotary_dim)
    expected = query.double(), key.double()
    rest = qkv[:, 6 * 128 :].clone()
    ops.rotary_embedding(positions, query, key, 128, table, is_neox)
    _torch_ops.rotary_embedding(positions, *expected, 128, table.double(), is_neox)
    assert close(query, expected[0]) and close(key, expected[1])
    assert torch.equal(qkv[:, 6 * 128 :], rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_residual", [False, True])
def test_layer_norm_of_a_row_or_of_a_sum(isa, dtype, has_residual):
    rows, size = 70, 523
    x = (torch.randn(rows, size + 5) * 3 + 2).to(dtype)[:, :size]
    residual = torch.randn(rows, size).to(dtype) if has_residual else None
    weight, bias = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    got = ops.layer_norm(x, weight, bias, 1e-5, residual)
    whole = x if residual is None else x + residual
    expected = torch.nn.functional.layer_norm(
        whole.double(), (size,), weight.double(), bias.double(), 1e-5
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_with_gelu_behind_them(isa, dtype):
    x = torch.randn(9, 72).to(dtype)
    weight = (torch.randn(192, 72) * 0.3).to(dtype)
    bias = torch.randn(192).to(dtype)
    packed = ops.pack_weight(weight)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    sums = x.double() @ weight.double().T
    torch.testing.assert_close(
        ops.linear_gelu(x, packed, bias).double(),
        torch.nn.functional.gelu(sums + bias.double()),
        atol=tolerance,
        rtol=tolerance,
    )
    gate, up = sums.chunk(2, dim=1)
    torch.testing.assert_close(
        ops.gate_up_gelu_tanh(x, packed).double(),
        torch.nn.functional.gelu(gate, approximate="tanh") * up,
        atol=tolerance,
        rtol=tolerance,
    )
