"""Residual streams around a branch: the kernels against PyTorch's form in float64."""

import pytest
import torch

from vllm import _custom_ops as ops
from vllm import _streams_op

pytestmark = pytest.mark.skipif(not ops.has_extension(), reason="vllm._C is not built")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "count", "size"), [(1, 4, 64), (7, 2, 100), (300, 4, 40)])
def test_what_a_branch_takes_and_the_mix_of_the_streams(
    isa: str, dtype: torch.dtype, tokens: int, count: int, size: int
) -> None:
    streams = torch.randn(tokens, count, size).to(dtype)
    rows = count * (2 + count)
    fn = torch.randn(rows, count * size) / (count * size) ** 0.5
    base, scale = torch.randn(rows), torch.randn(3)
    got = _streams_op.take_from_streams(streams, fn, base, scale, 20, 1e-6, 1e-5)
    wide = (x.double() for x in (fn, base, scale))
    expected = _streams_op._take(streams.double(), *wide, 20, 1e-6, 1e-5)
    assert got[0].dtype is dtype and got[1].dtype is got[2].dtype is torch.float32
    torch.testing.assert_close(
        got[0].double(), expected[0].double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
    for part, whole in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(part.double(), whole.double(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(got[2].sum(-2), torch.ones(tokens, count), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_one_stream", [False, True])
def test_streams_after_a_branch(isa: str, dtype: torch.dtype, is_one_stream: bool) -> None:
    streams = torch.randn(9, 4, 70).to(dtype)
    if is_one_stream:
        streams = streams[:, :1].expand(-1, 4, -1)
    branch = torch.randn(9, 90).to(dtype)[:, :70]
    given, mix = torch.rand(9, 4), torch.rand(9, 4, 4)
    got = _streams_op.join_streams(branch, streams, given, mix)
    expected = torch.einsum("tmn,tmh->tnh", mix.to(dtype).double(), streams.double())
    expected += given.to(dtype).double().unsqueeze(-1) * branch.double().unsqueeze(1)
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
