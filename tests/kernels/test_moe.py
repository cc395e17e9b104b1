"""A mixture of experts in one call, against routing by its definition and plain products."""

import random

import pytest
import torch
import torch.nn.functional as F

from vllm import _custom_ops as ops
from vllm._extension import GATES
from vllm._moe_op import MoeKernel
from vllm.model_executor.layers.fused_moe import Routing, select_experts

pytestmark = pytest.mark.skipif(not ops.has_extension(), reason="vllm._C is not built")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LIMIT, ALPHA = 1.5, 1.7
ROUTINGS = [
    Routing(num_experts=8, top_k=2),
    Routing(num_experts=21, top_k=3, renormalize=False, routed_scaling_factor=2.5),
    Routing(num_experts=12, top_k=3, scoring_func="sigmoid", num_expert_group=4, topk_group=2),
    Routing(num_experts=40, top_k=4, scoring_func="sqrtsoftplus"),
    Routing(num_experts=3, top_k=3),
]


def gated(name: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if name == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if name == "swiglu_oai":
        gate = gate.clamp(max=LIMIT)
        return (up.clamp(-LIMIT, LIMIT) + 1) * gate * torch.sigmoid(ALPHA * gate)
    if name == "clamped_silu":
        return F.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)
    return F.silu(gate) * up


class Experts:
    """Random ones, as the kernel takes them and as float64."""

    def __init__(
        self, routing: Routing, hidden: int, inner: int, dtype: torch.dtype, has_bias: bool
    ) -> None:
        count = routing.num_experts
        self.routing, self.inner = routing, inner
        self.gate_up = (torch.randn(count, 2 * inner, hidden) / hidden**0.5).to(dtype)
        self.down = (torch.randn(count, hidden, inner) / inner**0.5).to(dtype)
        self.biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if has_bias:
            self.biases = (
                torch.randn(count, 2 * inner).to(dtype),
                torch.randn(count, hidden).to(dtype),
            )

    def kernel(
        self, gate: str, correction: torch.Tensor | None, weigh_input: bool
    ) -> MoeKernel | None:
        routing = self.routing
        return MoeKernel.make(
            top_k=routing.top_k,
            scoring=routing.scoring_func,
            renormalize=routing.renormalize,
            num_groups=routing.num_expert_group,
            topk_group=routing.topk_group,
            scaling=routing.routed_scaling_factor,
            correction=correction,
            gate=gate,
            alpha=ALPHA,
            limit=LIMIT,
            weights=(ops.pack_experts(self.gate_up), ops.pack_experts(self.down)),
            biases=self.biases,
            weigh_input=weigh_input,
        )

    def expected(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate: str, on_input: bool
    ) -> torch.Tensor:
        out = torch.zeros(x.shape, dtype=torch.float64)
        for t, (token, row_weights, row_ids) in enumerate(zip(x, weights, ids, strict=True)):
            for weight, e in zip(row_weights.double(), row_ids.tolist(), strict=True):
                row = (token.double() * weight).to(x.dtype).double() if on_input else token.double()
                inner = self.gate_up[e].double() @ row
                if self.biases[0] is not None:
                    inner = inner + self.biases[0][e].double()
                row = self.down[e].double() @ gated(gate, *inner.chunk(2))
                if self.biases[1] is not None:
                    row = row + self.biases[1][e].double()
                out[t] += row if on_input else weight * row
        return out


@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda r: f"{r.scoring_func}-{r.num_experts}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_call_is_the_sum_over_the_chosen_experts(
    isa: str, rng: random.Random, routing: Routing, dtype: torch.dtype
) -> None:
    hidden, inner = rng.choice([(64, 32), (100, 96), (600, 64), (96, 544)])
    has_bias, on_input = rng.random() < 0.5, rng.random() < 0.3
    gate = rng.choice(sorted(GATES))
    experts = Experts(routing, hidden, inner, dtype, has_bias)
    is_grouped = routing.num_expert_group > 1
    correction = torch.randn(routing.num_experts) if is_grouped or rng.random() < 0.3 else None
    kernel = experts.kernel(gate, correction, on_input)
    assert kernel is not None
    for num_tokens in (1, 8, 37):
        x = torch.randn(num_tokens, hidden + 8).to(dtype)[:, :hidden]
        # No two of a token are within rounding of each other: any of them could be chosen.
        count = routing.num_experts
        order = torch.stack([torch.randperm(count) for _ in range(num_tokens)])
        logits = (order + torch.rand(num_tokens, count) / 2) * 6 / count - 3
        weights, ids = select_experts(logits, routing, correction)
        got = kernel.run(x, logits)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(
            got.double(),
            experts.expected(x, weights, ids, gate, on_input),
            atol=tolerance * routing.top_k,
            rtol=tolerance,
        )


def test_a_token_comes_out_the_same_alone_and_among_thousands() -> None:
    routing = Routing(num_experts=4, top_k=2)
    kernel = Experts(routing, 64, 32, torch.bfloat16, False).kernel("silu", None, False)
    assert kernel is not None
    # More pairs than are in scratch at a time, and more rows of an expert than are one run.
    x = torch.randn(5000, 64).to(torch.bfloat16)
    logits = torch.randn(5000, 4)
    together = kernel.run(x, logits)
    for rows in (slice(0, 1), slice(2490, 2510), slice(4999, 5000)):
        assert torch.equal(kernel.run(x[rows], logits[rows]), together[rows])


def test_experts_that_were_chosen_already_are_only_weighed() -> None:
    routing = Routing(num_experts=6, top_k=2, scoring_func="sigmoid")
    experts = Experts(routing, 64, 32, torch.float32, False)
    kernel = experts.kernel("silu", None, False)
    assert kernel is not None
    x, logits = torch.randn(7, 64), torch.randn(7, 6)
    chosen = torch.stack([torch.randperm(6)[:2] for _ in range(7)])
    weights, ids = select_experts(logits, routing, None, chosen)
    expected = experts.expected(x, weights, ids, "silu", False)
    torch.testing.assert_close(
        kernel.run(x, logits, chosen).double(), expected, atol=1e-4, rtol=1e-4
    )
    with pytest.raises(IndexError, match="expert 6 is not below 6"):
        kernel.run(x, logits, torch.full((7, 2), 6))


def test_logits_in_the_dtype_of_the_weights_and_not_a_number() -> None:
    routing = Routing(num_experts=8, top_k=2)
    kernel = Experts(routing, 64, 32, torch.bfloat16, False).kernel("silu", None, False)
    assert kernel is not None
    x = torch.randn(3, 64).to(torch.bfloat16)
    logits = torch.arange(24.0).view(3, 8).to(torch.bfloat16)
    assert torch.equal(kernel.run(x, logits), kernel.run(x, logits.float()))
    logits[1] = float("nan")
    assert kernel.run(x, logits)[[0, 2]].isfinite().all()


def test_what_the_kernel_does_not_know_is_left_to_others() -> None:
    routing = Routing(num_experts=3, top_k=1)
    no_whole_panels = Experts(routing, 64, 40, torch.float32, False)
    assert no_whole_panels.kernel("silu", None, False) is None
    assert Experts(routing, 64, 32, torch.float32, False).kernel("tanh", None, False) is None
    assert Experts(routing, 64, 32, torch.float64, False).kernel("silu", None, False) is None
