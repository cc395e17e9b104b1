"""Operators on states in Triton, by the same judges as the others.

They run on a GPU where there is one, else in the interpreter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from tests.kernels import test_linear_attention as linear
from tests.kernels import test_state_ops as judged
from vllm import _linear_attention_ops as linear_ops
from vllm import _triton_state_ops as triton_ops
from vllm._state_ops import StateSegments
from vllm._triton_linear_attention import linear_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
DTYPES = [
    torch.float32,
    pytest.param(torch.float16, marks=[pytest.mark.slow] * (not ON_GPU)),
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]


@pytest.fixture(autouse=True)
def _where(seed: int) -> Iterator[None]:
    """Everything that a test makes lies on the device; inputs are fresh."""
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize("cuts", judged.CUTS)
@pytest.mark.parametrize(
    ("dtype", "order", "kernel", "channels", "bias", "activation"),
    [
        (torch.float32, "SD", 4, 40, True, "silu"),
        (torch.float16, "DS", 2, 150, False, "silu"),
        (torch.float32, "DS", 3, 33, True, None),
        (torch.float16, "SD", 6, 18, False, None),
    ],
)
def test_convolution(cuts, dtype, order, kernel, channels, bias, activation) -> None:
    judged.test_convolution(
        triton_ops, cuts, dtype, dtype, order, kernel, channels, bias, activation
    )


@pytest.mark.parametrize("cuts", judged.CUTS)
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "channels", "size", "gate", "bias"),
    [
        (torch.float32, torch.float32, 9, 5, True, True),
        pytest.param(
            torch.float16,
            torch.float32,
            19,
            16,
            False,
            False,
            marks=[pytest.mark.slow] * (not ON_GPU),
        ),
    ],
)
def test_selective_scan(cuts, dtype, state_dtype, channels, size, gate, bias) -> None:
    judged.test_selective_scan(triton_ops, cuts, dtype, state_dtype, channels, size, gate, bias)


@pytest.mark.parametrize("cuts", judged.CUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "width", "groups", "size", "limit"),
    [(4, 8, 2, 16, (0.0, float("inf"))), (3, 40, 1, 128, (0.3, 0.9)), (6, 5, 3, 24, (0.0, 9.0))],
)
def test_ssd_scan(cuts, dtype, heads, width, groups, size, limit) -> None:
    judged.test_ssd_scan(triton_ops, cuts, dtype, dtype, heads, width, groups, size, limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "groups"), [(96, 1), (96, 3), (50, 2)])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gated_norm(dtype, width, groups, norm_before_gate) -> None:
    judged.test_gated_norm(triton_ops, dtype, width, groups, norm_before_gate)


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not float64, the judge's dtype, is Triton's."""
    monkeypatch.setattr(
        linear_ops, "_triton_takes", lambda query, *rest: query.dtype is not torch.float64
    )


KINDS = ["gated", "kimi", "lightning"]


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", linear.SHAPES)
def test_linear_attention(rng: random.Random, dtype: torch.dtype, kind: str, shape: str) -> None:
    call = linear.Call(linear.SHAPES[shape], dtype, rng, dtype)
    run = getattr(call, kind)
    linear.assert_same(run(), run(wide=True), dtype)


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("kind", ["gated", "kimi"])
def test_keys_that_are_all_alike(rng: random.Random, kind: str) -> None:
    """Powers of such a chunk's system grow without bound; its inverse does not."""
    call = linear.Call(linear.Shape(requests=((130,),)), torch.float32, rng, torch.float32)
    call.key.copy_(call.key[:1].expand_as(call.key) + 1e-3 * call.key)
    call.gate.fill_(-30.0)
    call.gates.fill_(-30.0)
    call.beta.fill_(6.0)
    linear.assert_same(getattr(call, kind)(), getattr(call, kind)(wide=True), torch.float32)


def decode_segments(sources: list[int], targets: list[int]) -> StateSegments:
    count = len(sources)
    at = torch.arange(count + 1, dtype=torch.int32)
    return StateSegments(
        token_starts=at, request_starts=at,
        sources=torch.tensor(sources, dtype=torch.int32),
        targets=torch.tensor(targets, dtype=torch.int32),
        num_tokens=count, num_requests=count,
    )  # fmt: skip


def test_requests_that_are_not_there_write_nothing() -> None:
    segments = decode_segments([2, -1, -1], [2, -1, 3])
    poison = float("nan")
    conv, ssm, scan = torch.randn(5, 3, 24), torch.randn(5, 2, 4, 8), torch.randn(5, 24, 6)
    for state in (conv, ssm, scan):
        state[3:] = poison
    kept = conv.clone(), ssm.clone(), scan.clone()
    triton_ops.causal_conv1d(torch.randn(3, 24), torch.randn(4, 24), None, conv, segments)
    channels, few = torch.randn(3, 24), torch.randn(3, 6)
    triton_ops.selective_scan(
        channels, channels, -torch.rand(24, 6), few, few, torch.rand(24), None, None, scan, segments
    )
    heads, x = torch.rand(2), torch.randn(3, 2, 4)
    part = torch.randn(3, 1, 8)
    triton_ops.ssd_scan(
        x, torch.randn(3, 2), -heads, part, part, heads, heads, (0.0, 9.0), ssm, segments
    )
    for state, before in zip((conv, ssm, scan), kept, strict=True):
        assert not state[[2, 3]].isnan().any()
        assert torch.equal(state[:2], before[:2]) and state[4].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gated", "kimi", "lightning"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_prompts_on_a_gpu(rng: random.Random, kind: str, dtype: torch.dtype) -> None:
    shape = linear.Shape(
        heads=8, key_heads=4, key_size=128, value_size=128, requests=((300,), (1,), (64, 64, 5))
    )
    call = linear.Call(shape, dtype, rng, torch.float32)
    run = getattr(call, kind)
    linear.assert_same(run(), run(wide=True), dtype)


@pytest.mark.gpu
def test_captured_steps_read_and_write_other_blocks() -> None:
    tokens, heads, size = 4, 4, 64
    sources = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    segments = decode_segments([0, 1, 2, 3], [0, 1, 2, 3])
    conv, memory = torch.randn(9, 3, 96), torch.randn(9, heads, size, size)
    x, weight = torch.randn(tokens, 96), torch.randn(4, 96)
    q, k, v = torch.randn(3, tokens, heads, size).unbind(0)
    gate, beta = torch.randn(2, tokens, heads).unbind(0)
    rates, biases = torch.rand(heads), torch.randn(heads)
    out = torch.empty(tokens, heads, size)

    def step() -> torch.Tensor:
        linear_attention(
            q, k, v, gate, beta, rates, biases, memory, segments, size**-0.5, True, out
        )
        return triton_ops.causal_conv1d(x, weight, None, conv, segments)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixed = step()
    segments.sources.copy_(sources + 4)
    segments.targets.copy_(sources + 4)
    before = conv.clone(), memory.clone()
    graph.replay()
    replayed = mixed.clone(), out.clone(), conv.clone(), memory.clone()
    conv.copy_(before[0])
    memory.copy_(before[1])
    again = step()
    for ours, theirs in zip(replayed, (again, out, conv, memory), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(conv[:4], before[0][:4]) and not torch.equal(conv[4:8], before[0][4:8])
