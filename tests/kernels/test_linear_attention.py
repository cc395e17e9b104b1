"""Gated delta rule and lightning attention: the kernels against PyTorch in float64."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from vllm import _custom_ops as ops
from vllm import _linear_attention_ops as linear_ops
from vllm._torch_state_ops import StateSegments

needs_kernels = pytest.mark.skipif(not ops.has_extension(), reason="vllm._C is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass
class Shape:
    """Sizes of one call, and how many new tokens each segment of each request has."""

    heads: int = 4
    key_heads: int = 2
    key_size: int = 32
    value_size: int = 32
    requests: tuple[tuple[int, ...], ...] = ((1,), (1,), (1,))

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.requests))


SHAPES = {
    "a token each": Shape(),
    "one request": Shape(requests=((70,),)),
    "both": Shape(requests=((1,), (33,), (1,), (2,))),
    "segments": Shape(requests=((16, 16, 5), (1,), (3, 1))),
    "odd sizes": Shape(heads=3, key_heads=3, key_size=20, value_size=37, requests=((1,), (41,))),
    "wide": Shape(heads=2, key_heads=1, key_size=128, value_size=160, requests=((1,), (40,))),
    "narrow": Shape(heads=2, key_heads=2, key_size=8, value_size=8, requests=((1,), (9,))),
}


def make_segments(
    counts: Sequence[int], starts: Sequence[int], sources: Sequence[int], targets: Sequence[int]
) -> StateSegments:
    tokens = [0, *itertools.accumulate(counts)]
    columns = (torch.tensor(x, dtype=torch.int32) for x in (tokens, starts, sources, targets))
    names = ("token_starts", "request_starts", "sources", "targets")
    return StateSegments(
        **dict(zip(names, columns, strict=True)),
        num_tokens=tokens[-1],
        num_requests=len(sources),
    )


class Call:
    """Random inputs, strided as a fused projection's are; states in pages with gaps."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, rng: random.Random, state_dtype: torch.dtype
    ) -> None:
        keys, values = shape.key_heads * shape.key_size, shape.heads * shape.value_size
        fused = torch.randn(shape.num_tokens, 2 * keys + values + 2 * shape.heads + 3).to(dtype)
        query, key, value, gate, beta, _ = fused.split(
            [keys, keys, values, shape.heads, shape.heads, 3], dim=-1
        )
        self.query, self.key = (
            x.unflatten(-1, (shape.key_heads, shape.key_size)) for x in (query, key)
        )
        self.value = value.unflatten(-1, (shape.heads, shape.value_size))
        self.gate, self.beta = gate * 3, beta
        self.rates = torch.rand(shape.heads) * 0.5
        self.biases = torch.randn(shape.heads)
        gates = torch.randn(shape.num_tokens, shape.heads * shape.key_size + 5) * 4
        gates[0, 0] = 50  # beyond 20 softplus is what it is of
        self.gates = gates.to(dtype)[:, :-5].unflatten(-1, (shape.heads, shape.key_size))
        self.gate_biases = torch.randn(shape.heads, shape.key_size)
        counts = [count for request in shape.requests for count in request]
        blocks = rng.sample(range(1, 4 * len(counts)), 2 * len(counts))
        sources = blocks[: len(shape.requests)]
        targets = blocks[len(counts) :]
        starts = [0]
        for r, request in enumerate(shape.requests):
            starts.append(starts[-1] + len(request))
            if r % 3 == 0:
                targets[starts[-1] - 1] = sources[r]  # written over where it was read
            elif r % 3 == 1:
                sources[r] = -1
        self.segments = make_segments(counts, starts, sources, targets)
        page = shape.heads * shape.value_size * shape.key_size
        pages = torch.randn(4 * len(counts), page + 24).to(state_dtype)
        self.state = pages[:, 8 : 8 + page].unflatten(
            -1, (shape.heads, shape.value_size, shape.key_size)
        )

    def gated(self, wide: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Output, and the states afterwards."""
        state = self._state(wide)
        inputs = (self.query, self.key, self.value, self.gate, self.beta)
        if wide:
            inputs = tuple(x.double() for x in inputs)
        out = linear_ops.gated_delta_rule(*inputs, self.rates, self.biases, state, self.segments)
        return out, state

    def kimi(self, wide: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``gated``, with a gate for each number of a key."""
        state = self._state(wide)
        inputs = (self.query, self.key, self.value, self.gates, self.beta)
        if wide:
            inputs = tuple(x.double() for x in inputs)
        out = linear_ops.gated_delta_rule(
            *inputs, self.rates, self.gate_biases, state, self.segments
        )
        return out, state

    def lightning(self, wide: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        state = self._state(wide)
        repeats = self.value.shape[1] // self.key.shape[1]
        inputs = (
            self.query.repeat_interleave(repeats, 1) / 4,
            self.key.repeat_interleave(repeats, 1) / 4,
            self.value,
        )
        if wide:
            inputs = tuple(x.double() for x in inputs)
        out = linear_ops.lightning_attention(*inputs, self.rates, state, self.segments)
        return out, state

    def _state(self, wide: bool) -> torch.Tensor:
        if wide:
            return self.state.double()
        page = self.state.flatten(1)
        copy = torch.empty(page.shape[0], page.shape[1] + 24, dtype=page.dtype)
        copy[:, 8:-16] = page
        copy = copy[:, 8:-16].unflatten(-1, self.state.shape[1:])
        assert not copy.is_contiguous()
        return copy


def assert_same(
    got: tuple[torch.Tensor, torch.Tensor],
    expected: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(
            ours.double() / scale, theirs / scale, atol=TOLERANCE[dtype], rtol=0
        )


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_delta_rule(isa: str, rng: random.Random, dtype: torch.dtype, shape: str) -> None:
    call = Call(SHAPES[shape], dtype, rng, dtype)
    assert_same(call.gated(), call.gated(wide=True), dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gate_for_each_number_of_a_key(
    isa: str, rng: random.Random, dtype: torch.dtype, shape: str
) -> None:
    call = Call(SHAPES[shape], dtype, rng, dtype)
    assert_same(call.kimi(), call.kimi(wide=True), dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_lightning_attention(isa: str, rng: random.Random, dtype: torch.dtype, shape: str) -> None:
    call = Call(SHAPES[shape], dtype, rng, dtype)
    assert_same(call.lightning(), call.lightning(wide=True), dtype)


@pytest.mark.parametrize("shape", ["both", "segments"])
def test_wide_states_of_narrow_layers(rng: random.Random, shape: str) -> None:
    call = Call(SHAPES[shape], torch.bfloat16, rng, torch.float32)
    got, expected = call.gated(), call.gated(wide=True)
    assert got[1].dtype is torch.float32
    assert_same(got, expected, torch.bfloat16)
    torch.testing.assert_close(got[1].double(), expected[1], atol=2e-5, rtol=2e-5)


@needs_kernels
@pytest.mark.parametrize("parts", [(40,), (7, 33), (1,) * 40])
def test_steps_need_not_end_anywhere(rng: random.Random, parts: tuple[int, ...]) -> None:
    """Tokens of several calls that continue one another, and of one call."""
    call = Call(Shape(requests=((40,),)), torch.float32, rng, torch.float32)
    expected, state = call.gated()
    running = call._state(wide=False)
    block, outputs, done = int(call.segments.sources[0]), [], 0
    for count in parts:
        rows = slice(done, done + count)
        done += count
        outputs.append(
            linear_ops.gated_delta_rule(
                *(x[rows] for x in (call.query, call.key, call.value, call.gate, call.beta)),
                call.rates,
                call.biases,
                running,
                make_segments([count], [0, 1], [block], [block]),
            )
        )
    torch.testing.assert_close(torch.cat(outputs), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        running[block], state[call.segments.targets[0]], atol=1e-5, rtol=1e-5
    )


def test_a_step_writes_its_targets_and_nothing_else(rng: random.Random) -> None:
    call = Call(SHAPES["segments"], torch.float32, rng, torch.float32)
    _, state = call.gated()
    targets = call.segments.targets
    others = sorted(set(range(len(state))) - set(targets.tolist()))
    assert torch.equal(state[others], call.state[others])
    assert not torch.equal(state[targets], call.state[targets])


def test_sizes_that_do_not_fit(rng: random.Random) -> None:
    call = Call(SHAPES["both"], torch.float32, rng, torch.float32)
    call.state = call.state[:, :, :, :-1]
    with pytest.raises(ValueError, match="do not fit each other"):
        call.gated(wide=True)
