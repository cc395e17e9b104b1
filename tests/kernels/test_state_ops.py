"""Operators on states: one step after another in float64 is the judge of every form of them."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from vllm import _custom_ops, _torch_state_ops
from vllm import _state_ops as ops
from vllm._state_ops import StateSegments

FORMS = ["pytorch", *_custom_ops.supported_isas()]
TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.bfloat16: {"atol": 3e-2, "rtol": 3e-2},
    torch.float16: {"atol": 5e-3, "rtol": 5e-3},
    torch.float64: {"atol": 1e-10, "rtol": 1e-10},
}
CUTS = {
    "decoding": [[1], [1], [1], [1]],
    "one chunk": [[37]],
    "mixed": [[1], [5, 16, 3], [70], [2]],
}
"""Lengths of the segments of each request."""
SOURCES = [-1, 7, 3, 9]
NUM_BLOCKS = 14


def make_segments(cuts):
    lengths = [length for request in cuts for length in request]
    blocks = itertools.chain([5, 7, 2], range(10, NUM_BLOCKS))
    return StateSegments(
        token_starts=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        request_starts=torch.tensor([0, *itertools.accumulate(map(len, cuts))], dtype=torch.int32),
        sources=torch.tensor(SOURCES[: len(cuts)], dtype=torch.int32),
        targets=torch.tensor([next(blocks) for _ in lengths], dtype=torch.int32),
        num_tokens=sum(lengths),
        num_requests=len(cuts),
    )


def padded_blocks(shape, dtype, gap=24):
    """(B, *shape) with other bytes between blocks, and those bytes."""
    size = torch.Size(shape).numel()
    raw = torch.randn(NUM_BLOCKS, size + gap).to(dtype)
    return raw[:, :size].unflatten(1, shape), raw[:, size:]


def strided(rows, width, dtype):
    """(rows, width) as columns of a wider tensor."""
    return torch.randn(rows, width + 9).to(dtype)[:, 3 : 3 + width]


def step_by_step(segments, state, step):
    """Run ``step(state, token) -> (state, output)`` in order; writes states and returns outputs."""
    outputs = [torch.empty(0)] * segments.num_tokens
    before = state.double()
    for source, runs in segments.runs():
        current = before[source] if source >= 0 else torch.zeros_like(before[0])
        for start, end, target in runs:
            for t in range(start, end):
                current, outputs[t] = step(current, t)
            state[target] = current.to(state.dtype)
    return torch.stack(outputs)


def assert_near(got, expected, dtype):
    torch.testing.assert_close(got.double(), expected.double(), **TOLERANCE[dtype])


@pytest.fixture(autouse=True)
def inputs():
    torch.manual_seed(0)


@pytest.fixture(params=FORMS)
def form(request):
    """The operators in PyTorch, then in C++ for each instruction set."""
    if request.param == "pytorch":
        yield _torch_state_ops
        return
    _custom_ops.set_isa(request.param)
    yield ops
    _custom_ops.set_isa(_custom_ops.supported_isas()[0])


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES)
@pytest.mark.parametrize("order", ["SD", "DS"])
@pytest.mark.parametrize(
    ("kernel", "channels", "bias", "activation"),
    [(4, 40, True, "silu"), (2, 96, False, "silu"), (3, 33, True, None), (6, 18, False, None)],
)
def test_convolution(form, cuts, dtype, state_dtype, order, kernel, channels, bias, activation):
    segments = make_segments(CUTS[cuts])
    shape = (kernel - 1, channels) if order == "SD" else (channels, kernel - 1)
    cache, gaps = padded_blocks(shape, state_dtype)
    state = cache if order == "SD" else cache.transpose(1, 2)
    x = strided(segments.num_tokens, channels, dtype)
    weight = torch.randn(kernel, channels)
    offset = torch.randn(channels) if bias else None
    expected_state, kept_gaps = state.clone(), gaps.clone()

    def step(past, t):
        rows = torch.cat([past, x[t : t + 1].double()])
        out = (rows * weight.double()).sum(0) + (0 if offset is None else offset.double())
        return rows[1:], F.silu(out) if activation else out

    expected = step_by_step(segments, expected_state, step)
    got = form.causal_conv1d(x, weight, offset, state, segments, activation)
    assert got.dtype is dtype
    assert_near(got, expected, dtype)
    assert_near(state, expected_state, state_dtype)
    assert torch.equal(gaps, kept_gaps)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES)
@pytest.mark.parametrize(
    ("channels", "size", "gate", "bias"), [(48, 16, True, True), (37, 5, False, False)]
)
def test_selective_scan(form, cuts, dtype, state_dtype, channels, size, gate, bias):
    segments = make_segments(CUTS[cuts])
    tokens = segments.num_tokens
    state, gaps = padded_blocks((channels, size), state_dtype)
    x, dt = strided(tokens, channels, dtype), strided(tokens, channels, dtype)
    z = strided(tokens, channels, dtype) if gate else None
    b, c = strided(tokens, size, dtype), strided(tokens, size, dtype)
    a, d = -torch.rand(channels, size) * 2, torch.randn(channels)
    dt_bias = torch.randn(channels) if bias else None
    expected_state, kept_gaps = state.clone(), gaps.clone()

    def step(h, t):
        delta = dt[t].double() + (0 if dt_bias is None else dt_bias.double())
        delta = F.softplus(delta)[:, None]
        h = torch.exp(delta * a.double()) * h + delta * b[t].double() * x[t].double()[:, None]
        y = h @ c[t].double() + d.double() * x[t].double()
        return h, y if z is None else y * F.silu(z[t].double())

    expected = step_by_step(segments, expected_state, step)
    got = form.selective_scan(x, dt, a, b, c, d, z, dt_bias, state, segments)
    assert got.dtype is dtype
    assert_near(got, expected, dtype)
    assert_near(state, expected_state, state_dtype)
    assert torch.equal(gaps, kept_gaps)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES)
@pytest.mark.parametrize(
    ("heads", "width", "groups", "size", "limit"),
    [
        (4, 8, 2, 16, (0.0, float("inf"))),
        (3, 20, 1, 128, (0.3, 0.9)),
        (6, 5, 3, 24, (0.0, float("inf"))),
    ],
)
def test_ssd_scan(form, cuts, dtype, state_dtype, heads, width, groups, size, limit):
    segments = make_segments(CUTS[cuts])
    tokens = segments.num_tokens
    state, gaps = padded_blocks((heads, width, size), state_dtype)
    x = strided(tokens, heads * width, dtype).unflatten(-1, (heads, width))
    b, c = (
        (strided(tokens, groups * size, dtype) / size**0.5).unflatten(-1, (groups, size))
        for _ in range(2)
    )
    dt = strided(tokens, heads, dtype)
    a, d, dt_bias = -torch.rand(heads) * 2, torch.randn(heads), torch.randn(heads)
    expected_state, kept_gaps = state.clone(), gaps.clone()
    group = torch.arange(heads) // (heads // groups)

    def step(h, t):
        delta = F.softplus(dt[t].double() + dt_bias.double()).clamp(*limit)
        new = torch.einsum("h,hp,hn->hpn", delta, x[t].double(), b[t, group].double())
        h = torch.exp(delta * a.double())[:, None, None] * h + new
        return h, torch.einsum("hpn,hn->hp", h, c[t, group].double()) + d.double()[:, None] * x[
            t
        ].double()

    expected = step_by_step(segments, expected_state, step)
    got = form.ssd_scan(x, dt, a, b, c, d, dt_bias, limit, state, segments)
    assert got.dtype is dtype
    assert_near(got, expected, dtype)
    assert_near(state, expected_state, state_dtype)
    assert torch.equal(gaps, kept_gaps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("width", "groups"), [(96, 1), (96, 3), (50, 2)])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gated_norm(form, dtype, width, groups, norm_before_gate):
    x, gate = strided(7, width, dtype), strided(7, width, dtype)
    weight = torch.rand(width)
    rows, gates = x.double(), F.silu(gate.double())
    rows = rows if norm_before_gate else rows * gates
    parts = rows.view(7, groups, -1)
    rows = (parts / (parts.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).view(7, width) * weight
    rows = rows * gates if norm_before_gate else rows
    got = form.gated_rms_norm(x, gate, weight, 1e-5, groups, norm_before_gate)
    assert got.dtype is dtype
    assert_near(got, rows, dtype)


def test_a_block_that_holds_nan_is_not_read_by_a_request_without_a_state():
    segments = make_segments([[1], [1]])
    state = torch.randn(NUM_BLOCKS, 3, 8)
    state[0] = float("nan")
    state[-1] = float("nan")
    out = ops.causal_conv1d(torch.randn(2, 8), torch.randn(4, 8), None, state, segments)
    assert not out.isnan().any()
