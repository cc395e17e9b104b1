"""MXFP4 is expanded as its definition says, to the bit."""

import pytest
import torch

from vllm.model_executor.layers.quantization.mxfp4 import dequantize_mxfp4
from vllm.model_executor.layers.weight_loading import WeightShapeError

GROUP = 32


def value_of(code):
    """E2M1: sign, two bits of exponent (bias 1), one of mantissa; exponent 0 is subnormal."""
    sign = -1.0 if code & 8 else 1.0
    exponent, mantissa = (code >> 1) & 3, code & 1
    if exponent == 0:
        return sign * 0.5 * mantissa
    return sign * (1 + 0.5 * mantissa) * 2.0 ** (exponent - 1)


def expand_by_definition(blocks, scales):
    """float32 (E, rows, 32 * groups), one byte after another."""
    experts, rows, groups, _ = blocks.shape
    out = torch.empty(experts, rows, groups, GROUP)
    values = torch.tensor([value_of(code) for code in range(16)])
    factors = 2.0 ** (scales.double() - 127)
    out[..., 0::2] = values[(blocks % 16).long()]
    out[..., 1::2] = values[(blocks // 16).long()]
    return (out.double() * factors.unsqueeze(-1)).float().flatten(-2)


def quantise(weight):
    """Blocks and scales nearest to ``weight`` (E, rows, inputs)."""
    groups = weight.detach().unflatten(-1, (-1, GROUP))
    # The largest value of a group becomes 4 to 6.
    exponents = groups.abs().amax(-1).log2().floor() - 2
    values = torch.tensor([value_of(code) for code in range(16)])
    scaled = groups / 2.0 ** exponents.unsqueeze(-1)
    codes = (scaled.unsqueeze(-1) - values).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponents + 127).to(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_and_many_scales(dtype):
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 4, 4, 16).repeat(3, 1, 1, 1)
    scales = torch.randint(100, 140, (3, 4, 4), dtype=torch.uint8)
    got = dequantize_mxfp4(blocks, scales, dtype)
    assert got.dtype == dtype
    # Exact in either dtype.
    assert torch.equal(got.float(), expand_by_definition(blocks, scales))


def test_what_it_can_hold_comes_back():
    blocks, scales = quantise(torch.randn(2, 6, 3 * GROUP))
    weight = dequantize_mxfp4(blocks, scales, torch.float32)
    assert weight.shape == (2, 6, 3 * GROUP)
    again = dequantize_mxfp4(*quantise(weight), torch.float32)
    assert torch.equal(again, weight)


def test_shapes_that_do_not_belong_together():
    with pytest.raises(WeightShapeError, match=r"\[2, 6, 3, 16\], expected \[2, 6, 4, 16\]"):
        dequantize_mxfp4(
            torch.zeros(2, 6, 3, 16, dtype=torch.uint8),
            torch.zeros(2, 6, 4, dtype=torch.uint8),
            torch.float32,
        )
