"""Experts: routing by its definitions, products against a plain loop, loading in every form."""

import pytest
import torch

from tests.models.test_linear import seen_from
from vllm import _custom_ops as ops
from vllm.errors import ConfigError, UnsupportedError
from vllm.model_executor.layers.activation import GeluAndMul, SwigluOAI
from vllm.model_executor.layers.fused_moe import FusedMoE, Routing, layer, select_experts
from vllm.model_executor.layers.weight_loading import WeightShapeError

EXPERTS, HIDDEN, INNER = 6, 24, 32


class Weights:
    """Random experts, and what they compute by the definition."""

    def __init__(self, inner=INNER, biases=False):
        self.gate = torch.randn(EXPERTS, inner, HIDDEN) * 0.3
        self.up = torch.randn(EXPERTS, inner, HIDDEN) * 0.3
        self.down = torch.randn(EXPERTS, HIDDEN, inner) * 0.3
        scale = 1.0 if biases else 0.0
        self.gate_bias = torch.randn(EXPERTS, inner) * scale
        self.up_bias = torch.randn(EXPERTS, inner) * scale
        self.down_bias = torch.randn(EXPERTS, HIDDEN) * scale

    def expert(self, index, x, act=torch.nn.functional.silu):
        gate = x @ self.gate[index].T + self.gate_bias[index]
        up = x @ self.up[index].T + self.up_bias[index]
        return (act(gate) * up) @ self.down[index].T + self.down_bias[index]

    def mixture(self, x, weights, ids, on_input=False, **kwargs):
        rows = []
        for token, row_weights, row_ids in zip(x, weights, ids, strict=True):
            total = torch.zeros(HIDDEN)
            for weight, index in zip(row_weights, row_ids.tolist(), strict=True):
                if on_input:
                    total += self.expert(index, token * weight, **kwargs)
                else:
                    total += weight * self.expert(index, token, **kwargs)
            rows.append(total)
        return torch.stack(rows)

    def plain(self):
        """Up and down projections, as of experts without a gate."""
        return zip(self.up, self.down, strict=True)

    def load(self, moe):
        """One expert and projection at a time."""
        for e in range(EXPERTS):
            moe.w13_weight.weight_loader(moe.w13_weight, self.gate[e], (e, "gate"))
            moe.w13_weight.weight_loader(moe.w13_weight, self.up[e], (e, "up"))
            moe.w2_weight.weight_loader(moe.w2_weight, self.down[e], (e, "down"))
            if moe.w13_bias is not None:
                moe.w13_bias.weight_loader(moe.w13_bias, self.gate_bias[e], (e, "gate"))
                moe.w13_bias.weight_loader(moe.w13_bias, self.up_bias[e], (e, "up"))
                moe.w2_bias.weight_loader(moe.w2_bias, self.down_bias[e], (e, "down"))
        return moe


def make_routing(top_k=2, **kwargs):
    return Routing(num_experts=EXPERTS, top_k=top_k, **kwargs)


# ---- routing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalize", [False, True])
def test_softmax_over_all_then_the_best(renormalize):
    logits = torch.randn(9, EXPERTS)
    weights, ids = select_experts(logits, make_routing(3, renormalize=renormalize))
    probabilities = logits.softmax(-1)
    for row in range(9):
        best = sorted(range(EXPERTS), key=lambda e: -probabilities[row, e])[:3]
        assert ids[row].tolist() == best
        expected = probabilities[row, best]
        torch.testing.assert_close(weights[row], expected / (expected.sum() if renormalize else 1))


def test_renormalised_softmax_is_the_softmax_of_the_chosen():
    logits = torch.randn(9, EXPERTS)
    weights, ids = select_experts(logits, make_routing(3))
    torch.testing.assert_close(weights, logits.gather(-1, ids).softmax(-1))


def test_sigmoid_scores_are_each_their_own():
    logits = torch.randn(9, EXPERTS)
    routing = make_routing(2, scoring_func="sigmoid", renormalize=False, routed_scaling_factor=2.5)
    weights, ids = select_experts(logits, routing)
    assert torch.equal(ids, logits.topk(2).indices)
    torch.testing.assert_close(weights, logits.gather(-1, ids).sigmoid() * 2.5)


def test_sixteen_bit_logits_are_scored_in_float32():
    logits = torch.randn(9, EXPERTS, dtype=torch.bfloat16)
    weights, _ = select_experts(logits, make_routing(2))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(9))


def test_only_the_best_groups_are_chosen_from():
    # Group 1 holds the single best expert, group 2 the best pair.
    logits = torch.tensor([[0.0, 0.1, 3.0, -5.0, 2.5, 2.4]])
    by_best = make_routing(2, num_expert_group=3, topk_group=1)
    assert select_experts(logits, by_best)[1].tolist() == [[2, 3]]
    by_pair = make_routing(2, num_expert_group=3, topk_group=1, scoring_func="sigmoid")
    assert select_experts(logits, by_pair, torch.zeros(EXPERTS))[1].tolist() == [[4, 5]]


def test_a_correction_bias_chooses_and_does_not_weigh():
    logits = torch.randn(9, EXPERTS)
    bias = torch.tensor([10.0, 0, 0, 0, 0, 9.0])
    routing = make_routing(2, scoring_func="sigmoid", renormalize=False)
    weights, ids = select_experts(logits, routing, bias)
    assert {tuple(sorted(row)) for row in ids.tolist()} == {(0, 5)}
    torch.testing.assert_close(weights, logits.gather(-1, ids).sigmoid())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"top_k": None}, "num_experts_per_tok None must be between 1 and the number of experts"),
        ({"num_expert_group": 0}, "6 experts in 0 groups"),
        ({"top_k": 7}, "num_experts_per_tok 7 must be between 1 and the number of experts, 6"),
        ({"scoring_func": "tanh"}, "scored by softmax, sigmoid, sqrtsoftplus, not 'tanh'"),
        ({"num_expert_group": 4, "topk_group": 2}, "6 experts in 4 groups"),
        ({"top_k": 4, "num_expert_group": 3, "topk_group": 1}, "fewer than num_experts_per_tok 4"),
    ],
)
def test_impossible_routing_is_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        make_routing(**kwargs)


# ---- the product ------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize("inner", [32, 20])
def test_equals_a_loop_over_experts(inner, num_tokens, packed):
    """20 is no multiple of a panel: gate and up are then multiplied before silu, not within."""
    weights, routing = Weights(inner), make_routing(3)
    moe = weights.load(FusedMoE(routing, HIDDEN, inner))
    if packed:
        moe.process_weights_after_loading()
        assert dict(moe.named_parameters()) == {}
        moe.process_weights_after_loading()  # a second call changes nothing
    x, logits = torch.randn(num_tokens, HIDDEN), torch.randn(num_tokens, EXPERTS)
    kept = x.clone()
    expected = weights.mixture(x, *select_experts(logits, routing))
    torch.testing.assert_close(moe(x, logits), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(x, kept)


def test_biases_and_another_activation():
    weights, routing = Weights(biases=True), make_routing(2)
    moe = FusedMoE(routing, HIDDEN, INNER, activation="gelu_pytorch_tanh", has_bias=True)
    weights.load(moe).process_weights_after_loading()
    x, logits = torch.randn(7, HIDDEN), torch.randn(7, EXPERTS)

    def gelu(gate):
        return torch.nn.functional.gelu(gate, approximate="tanh")

    expected = weights.mixture(x, *select_experts(logits, routing), act=gelu)
    torch.testing.assert_close(moe(x, logits), expected, atol=1e-4, rtol=1e-4)


def test_weights_on_the_input():
    weights = Weights()
    routing = make_routing(2, scoring_func="sigmoid", renormalize=False)
    moe = weights.load(FusedMoE(routing, HIDDEN, INNER, apply_router_weight_on_input=True))
    x, logits = torch.randn(7, HIDDEN), torch.randn(7, EXPERTS)
    expected = weights.mixture(x, *select_experts(logits, routing), on_input=True)
    torch.testing.assert_close(moe(x, logits), expected, atol=1e-4, rtol=1e-4)


def test_a_token_does_not_depend_on_the_others():
    weights, routing = Weights(), make_routing(3)
    moe = weights.load(FusedMoE(routing, HIDDEN, INNER))
    moe.process_weights_after_loading()
    x, logits = torch.randn(17, HIDDEN), torch.randn(17, EXPERTS)
    together = moe(x, logits)
    for row in range(17):
        assert torch.equal(moe(x[row : row + 1], logits[row : row + 1])[0], together[row])


def test_many_tokens_are_computed_in_parts(monkeypatch):
    moe = Weights().load(FusedMoE(make_routing(3), HIDDEN, INNER))
    x, logits = torch.randn(17, HIDDEN), torch.randn(17, EXPERTS)
    whole = moe(x, logits)
    monkeypatch.setattr(layer, "_PAIRS_AT_ONCE", 15)
    torch.testing.assert_close(moe(x, logits), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_experts(dtype):
    weights, routing = Weights(), make_routing(2)
    moe = weights.load(FusedMoE(routing, HIDDEN, INNER, params_dtype=dtype))
    moe.process_weights_after_loading()
    x, logits = torch.randn(9, HIDDEN), torch.randn(9, EXPERTS)
    got = moe(x.to(dtype), logits)
    assert got.dtype == dtype
    expected = weights.mixture(x, *select_experts(logits, routing))
    assert torch.cosine_similarity(got.float(), expected).min() > 0.999


def test_gpt_oss_activation_clamps():
    gate_up = torch.tensor([[1.0, 9.0, -9.0, 2.0, 8.0, -8.0]])
    gate, up = torch.tensor([1.0, 7.0, -9.0]), torch.tensor([2.0, 7.0, -7.0])
    expected = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    torch.testing.assert_close(SwigluOAI()(gate_up)[0], expected)


def test_gelu_and_mul():
    x = torch.randn(3, 10)
    for approximate in ("none", "tanh"):
        expected = torch.nn.functional.gelu(x[:, :5], approximate=approximate) * x[:, 5:]
        torch.testing.assert_close(GeluAndMul(approximate)(x), expected)


def test_an_unknown_activation_is_refused():
    with pytest.raises(UnsupportedError, match="'relu2' is not supported; these are: silu"):
        FusedMoE(make_routing(), HIDDEN, INNER, activation="relu2")
    with pytest.raises(UnsupportedError, match="'silu' is not supported; these are: relu2"):
        FusedMoE(make_routing(), HIDDEN, INNER, activation="silu", is_gated=False)


# ---- without a gate -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("together", [False, True])
def test_experts_without_a_gate(together, size, dtype):
    weights, routing = Weights(), make_routing(3)
    x, logits = torch.randn(9, HIDDEN).to(dtype), torch.randn(9, EXPERTS)
    total = torch.zeros(9, HIDDEN)
    for rank in range(size):
        with seen_from(rank, size):
            moe = FusedMoE(
                routing,
                HIDDEN,
                INNER,
                activation="relu2",
                is_gated=False,
                reduce_results=False,
                params_dtype=dtype,
            )
            assert moe.w13_weight.shape == (EXPERTS, INNER // size, HIDDEN)
            assert moe.w13_weight.shard_ids == tuple((e, "up") for e in range(EXPERTS))
            if together:
                moe.w13_weight.weight_loader(moe.w13_weight, weights.up)
                moe.w2_weight.weight_loader(moe.w2_weight, weights.down)
            else:
                for e in range(EXPERTS):
                    moe.w13_weight.weight_loader(moe.w13_weight, weights.up[e], (e, "up"))
                    moe.w2_weight.weight_loader(moe.w2_weight, weights.down[e], (e, "down"))
            moe.process_weights_after_loading()
            total += moe(x, logits).float()
    chosen, ids = select_experts(logits, routing)
    wide = x.float()
    each = torch.stack([(wide @ up.T).relu().square() @ down.T for up, down in weights.plain()])
    expected = (each[ids, torch.arange(9).unsqueeze(1)] * chosen.unsqueeze(-1)).sum(1)
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.05}
    torch.testing.assert_close(total, expected, **close)


# ---- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_tensors_of_all_experts_load_like_single_ones(transposed, interleaved):
    weights = Weights(biases=True)
    single = weights.load(FusedMoE(make_routing(), HIDDEN, INNER, has_bias=True))
    fused = FusedMoE(
        make_routing(),
        HIDDEN,
        INNER,
        has_bias=True,
        transposed=transposed,
        interleaved=interleaved,
    )

    def join(gate, up):
        return torch.stack((gate, up), 2).flatten(1, 2) if interleaved else torch.cat((gate, up), 1)

    gate_up, down = join(weights.gate, weights.up), weights.down
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    loaded = {
        "w13_weight": gate_up,
        "w2_weight": down,
        "w13_bias": join(weights.gate_bias, weights.up_bias),
        "w2_bias": weights.down_bias,
    }
    for name, tensor in loaded.items():
        param = getattr(fused, name)
        param.weight_loader(param, tensor)
        assert torch.equal(param.data, getattr(single, name).data), name


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("together", [False, True])
def test_ranks_sum_to_the_whole(size, together):
    weights, routing = Weights(biases=True), make_routing(2)
    x, logits = torch.randn(7, HIDDEN), torch.randn(7, EXPERTS)
    total = torch.zeros(7, HIDDEN)
    for rank in range(size):
        with seen_from(rank, size):
            moe = FusedMoE(routing, HIDDEN, INNER, has_bias=True, reduce_results=False)
            if together:
                tensors = {
                    "w13_weight": torch.cat((weights.gate, weights.up), 1),
                    "w13_bias": torch.cat((weights.gate_bias, weights.up_bias), 1),
                    "w2_weight": weights.down,
                    "w2_bias": weights.down_bias,
                }
                for name, tensor in tensors.items():
                    getattr(moe, name).weight_loader(getattr(moe, name), tensor)
            else:
                weights.load(moe)
            assert moe.w13_weight.shape == (EXPERTS, 2 * INNER // size, HIDDEN)
            moe.process_weights_after_loading()
            total += moe(x, logits)
    expected = weights.mixture(x, *select_experts(logits, routing))
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-4)


def test_an_inner_size_that_the_ranks_do_not_divide():
    with (
        seen_from(0, 3),
        pytest.raises(ConfigError, match="-size 3 does not divide the inner size of an expert"),
    ):
        FusedMoE(make_routing(), HIDDEN, INNER)


@pytest.mark.parametrize(
    ("name", "shape", "shard"),
    [
        ("w13_weight", (INNER + 1, HIDDEN), (0, "gate")),
        ("w2_weight", (HIDDEN, INNER + 1), (0, "down")),
        ("w13_weight", (EXPERTS + 1, 2 * INNER, HIDDEN), None),
        ("w13_weight", (EXPERTS, HIDDEN, 2 * INNER), None),
        ("w2_weight", (EXPERTS, INNER, HIDDEN), None),
    ],
)
def test_wrong_shapes_are_told(name, shape, shard):
    param = getattr(FusedMoE(make_routing(), HIDDEN, INNER), name)
    with pytest.raises(WeightShapeError):
        param.weight_loader(param, torch.zeros(shape), shard)


# ---- the operator -------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 40, 700])
def test_runs_of_rows_have_a_weight_each(rows, dtype, packed):
    """700 rows are more than one region of threads takes."""
    plain = (torch.randn(EXPERTS, 64, HIDDEN) * 0.3).to(dtype)
    bias = torch.randn(EXPERTS, 64).to(dtype)
    weights = ops.pack_experts(plain) if packed else plain
    assert weights.shape == plain.shape
    ids = torch.randint(0, EXPERTS - 1, (rows,)).sort().values  # the last gets none
    counts = torch.bincount(ids, minlength=EXPERTS)
    x = torch.randn(rows, 2 * HIDDEN).to(dtype)[:, :HIDDEN]
    products = torch.einsum("mk,mnk->mn", x.float(), plain.float()[ids])
    close = {"atol": 0.05, "rtol": 0.02} if dtype != torch.float32 else {}
    got = ops.experts_linear(x, weights, counts, bias)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), products + bias.float()[ids], **close)
    gate, up = products.chunk(2, dim=-1)
    got = ops.experts_gate_up_silu(x, weights, counts)
    torch.testing.assert_close(got.float(), torch.nn.functional.silu(gate) * up, **close)


@pytest.mark.parametrize("packed", [False, True])
def test_products_check_what_they_get(packed):
    weights = torch.randn(3, 8, HIDDEN)
    if packed:
        weights = ops.pack_experts(weights)
    x, counts = torch.randn(5, HIDDEN), torch.tensor([2, 0, 3])
    with pytest.raises(ValueError, match="rows are 4 in sum, not 5"):
        ops.experts_linear(x, weights, torch.tensor([2, 0, 2]))
    with pytest.raises(ValueError, match=r"int64 counts \(2,\) for 3 weights"):
        ops.experts_linear(x, weights, torch.tensor([2, 3]))
    if packed and ops.has_extension():
        with pytest.raises(ValueError, match="does not fit weights"):
            ops.experts_linear(x.double(), weights, counts)
        with pytest.raises(ValueError, match=r"biases \(3, 7\) must be \(3, 8\), dense"):
            ops.experts_linear(x, weights, counts, torch.zeros(3, 7))
