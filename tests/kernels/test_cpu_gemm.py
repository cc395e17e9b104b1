"""Packed products, and the rows read back from them, against float64."""

import random

import pytest
import torch

from vllm import _custom_ops as ops

pytestmark = pytest.mark.skipif(not ops.has_extension(), reason="vllm._C is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit of the result's last place, and what fp32 sums lose.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# Whole panels, a tail of rows, an odd k, k over the block of scratch, one of each.
SHAPES = [(64, 64), (33, 17), (96, 1540), (960, 576), (1, 1), (130, 513)]
ROWS = [1, 2, 3, 5, 6, 7, 12, 13, 14, 15, 29, 64, 150]


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    error = (actual.double() - expected).abs() / (1 + expected.abs())
    return error.max().item() <= TOLERANCE[actual.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_the_product(
    isa: str, rng: random.Random, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    n, k = shape
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    packed = ops.pack_weight(weight)
    for rows in rng.sample(ROWS, 5):
        bias = torch.randn(n).to(dtype) if rng.random() < 0.5 else None
        x = torch.randn(rows, k + 8).to(dtype)[:, :k]
        expected = x.double() @ weight.double().T
        if bias is not None:
            expected += bias.double()
        assert close(ops.linear(x, packed, bias), expected), (rows, bias is None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_keep_the_sums(isa: str, rng: random.Random, dtype: torch.dtype) -> None:
    weight = torch.randn(130, 72).to(dtype)
    x = torch.randn(rng.choice(ROWS), 72).to(dtype)
    bias = torch.randn(130).to(dtype)
    logits = ops.logits(x, ops.pack_weight(weight), bias)
    assert logits.dtype == torch.float32
    # Of sixteen bits all would be wrong by more.
    assert close(logits, x.double() @ weight.double().T + bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_up_are_fused_with_silu(isa: str, rng: random.Random, dtype: torch.dtype) -> None:
    for inner in (64, 40):  # 40 is no whole number of panels: the unfused way
        weight = (torch.randn(2 * inner, 72) / 72**0.5).to(dtype)
        x = torch.randn(rng.choice(ROWS), 72).to(dtype)
        gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
        result = ops.gate_up_silu(x, ops.pack_weight(weight))
        expected = torch.nn.functional.silu(gate) * up
        error = (result.double() - expected).abs() / (1 + expected.abs())
        assert error.max().item() <= 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_the_whole_weight_come_back_unchanged(
    isa: str, seed: int, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = torch.randn(shape).to(dtype)
    packed = ops.pack_weight(weight)
    assert torch.equal(packed.unpack(), weight)
    ids = torch.randint(0, shape[0], (100,))
    assert torch.equal(ops.embedding(ids, packed), weight[ids])
    assert packed.shape == weight.shape


def test_a_slice_of_a_larger_weight_is_packed_from_where_it_lies(isa: str, seed: int) -> None:
    whole = torch.randn(80, 90).bfloat16()
    part = whole[11:70, 20:61]
    assert torch.equal(ops.pack_weight(part).unpack(), part)
    assert torch.equal(ops.pack_weight(whole.T).unpack(), whole.T)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_nan_stays_in_its_row_and_column(isa: str, seed: int, rows: int) -> None:
    weight, x = torch.randn(40, 33).bfloat16(), torch.randn(rows + 1, 33).bfloat16()
    weight[7, 5] = float("nan")
    x[rows, 0] = float("nan")
    result = ops.linear(x, ops.pack_weight(weight))
    assert result[rows].isnan().all() and result[:, 7].isnan().all()
    result[rows], result[:, 7] = 0, 0
    assert result.isfinite().all()


def test_rounding_is_to_nearest_even(isa: str) -> None:
    # 1 + 2^-8 lies halfway between two bf16 numbers, as does 1 + 3 * 2^-8.
    weight = torch.tensor([[1.0, 2**-8], [1.0, 3 * 2**-8]]).bfloat16()
    result = ops.linear(torch.ones(1, 2).bfloat16(), ops.pack_weight(weight))
    assert result.tolist() == [[1.0, 1 + 2**-6]]


def test_inputs_of_other_shapes_are_rows_of_the_last_dim(isa: str, seed: int) -> None:
    packed = ops.pack_weight(torch.randn(48, 32))
    x = torch.randn(2, 3, 32)
    assert torch.equal(ops.linear(x, packed), ops.linear(x.view(6, 32), packed).view(2, 3, 48))
    assert ops.linear(x[:0], packed).shape == (0, 3, 48)
    columns = torch.randn(32, 5).T
    assert torch.equal(ops.linear(columns, packed), ops.linear(columns.contiguous(), packed))


def test_an_input_that_does_not_fit_is_refused() -> None:
    packed = ops.pack_weight(torch.randn(8, 16))
    with pytest.raises(ValueError, match=r"\(2, 15\).*does not fit a weight \(8, 16\)"):
        ops.linear(torch.randn(2, 15), packed)
    with pytest.raises(ValueError, match="does not fit"):
        ops.linear(torch.randn(2, 16).bfloat16(), packed)
    with pytest.raises(IndexError, match="token id 8 is not below 8"):
        ops.embedding(torch.tensor([1, 8]), packed)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(seed: int, threads: int) -> None:
    weight, x = torch.randn(300, 200).bfloat16(), torch.randn(37, 200).bfloat16()
    packed = ops.pack_weight(weight)
    expected = ops.linear(x, packed)
    ops.set_num_threads(threads)
    try:
        assert torch.equal(ops.linear(x, packed), expected)
    finally:
        ops.set_num_threads(2)


def test_a_row_does_not_depend_on_the_rows_beside_it(isa: str, seed: int) -> None:
    """A request's tokens must not change with the batch that it is in."""
    packed = ops.pack_weight(torch.randn(96, 576).bfloat16())
    x = torch.randn(50, 576).bfloat16()
    together = ops.linear(x, packed)
    for row in (0, 13, 49):
        assert torch.equal(ops.linear(x[row : row + 1], packed), together[row : row + 1])
