"""The decoder layer in one call gives, bit for bit, what its operators give one by one."""

import random
from dataclasses import dataclass

import pytest
import torch

from tests.kernels.test_cpu_attention import Batch, Step, make_step
from vllm import _custom_ops as ops
from vllm._decoder_layer_op import DecoderLayerKernel, run_decoder_layers

pytestmark = pytest.mark.skipif(not ops.has_extension(), reason="vllm._C is not built")


@dataclass
class Layer:
    """Random weights of one layer."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    bias: bool
    head_norms: bool
    is_neox: bool = True
    branch_norms: bool = False
    float_norms: bool = False
    gate: str = "silu"

    def __post_init__(self) -> None:
        def random_weight(n: int, k: int) -> ops.PackedWeight:
            return ops.pack_weight((torch.randn(n, k) / k**0.5).to(self.dtype))

        def vector(n: int, there: bool = True) -> torch.Tensor | None:
            return torch.randn(n).to(self.dtype) if there else None

        width = (self.heads + 2 * self.kv_heads) * self.head_size
        self.weights = (
            random_weight(width, self.hidden),
            random_weight(self.hidden, self.heads * self.head_size),
            random_weight(2 * self.inner, self.hidden),
            random_weight(self.hidden, self.inner),
        )
        self.biases = tuple(vector(weight.n, self.bias) for weight in self.weights)

        def norm(n: int, there: bool = True) -> torch.Tensor | None:
            weight = vector(n, there)
            return weight if weight is None or not self.float_norms else weight.float()

        self.norms = (norm(self.hidden), norm(self.hidden))
        self.per_head = tuple(norm(self.head_size, self.head_norms) for _ in range(2))
        self.of_branches = tuple(norm(self.hidden, self.branch_norms) for _ in range(2))
        self.table = torch.randn(1000, self.head_size)

    def kernel(self) -> DecoderLayerKernel | None:
        return DecoderLayerKernel.make(
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_size=self.head_size,
            eps=1e-5,
            norms=self.norms,
            head_norms=self.per_head,
            weights=self.weights,
            biases=self.biases,
            cos_sin_cache=self.table,
            is_neox=self.is_neox,
            alibi_slopes=None,
            sinks=None,
            scale=0.2,
            logits_soft_cap=0.0,
            sliding_window=70,
            branch_norms=self.of_branches,
            gate=self.gate,
        )

    def one_by_one(
        self, x: torch.Tensor | None, residual: torch.Tensor, positions: torch.Tensor, step: Step
    ) -> torch.Tensor:
        if x is None:
            x = ops.rms_norm(residual, self.norms[0], 1e-5)
        else:
            ops.fused_add_rms_norm(x, residual, self.norms[0], 1e-5)
        qkv = ops.linear(x, self.weights[0], self.biases[0])
        widths = [n * self.head_size for n in (self.heads, self.kv_heads, self.kv_heads)]
        parts = [p.unflatten(-1, (-1, self.head_size)) for p in qkv.split(widths, dim=-1)]
        for part, weight in zip(parts[:2], self.per_head, strict=True):
            if weight is not None:
                ops.rms_norm(part, weight, 1e-5, out=part)
        ops.rope_and_store(
            positions, *parts, self.table, self.is_neox, step.cache, step.slot_mapping
        )
        out = torch.empty(x.shape[0], self.heads, self.head_size, dtype=self.dtype)
        tables = (step.query_start_loc, step.seq_lens, step.block_table)
        ops.paged_attention(parts[0], step.cache, out, *tables, 0.2, sliding_window=70)
        x = ops.linear(out.flatten(1), self.weights[1], self.biases[1])
        if self.of_branches[0] is not None:
            x = ops.rms_norm(x, self.of_branches[0], 1e-5)
        ops.fused_add_rms_norm(x, residual, self.norms[1], 1e-5)
        is_silu = self.gate == "silu"
        if self.bias:
            activation = ops.silu_and_mul if is_silu else ops.gelu_tanh_and_mul
            x = activation(ops.linear(x, self.weights[2], self.biases[2]))
        else:
            product = ops.gate_up_silu if is_silu else ops.gate_up_gelu_tanh
            x = product(x, self.weights[2])
        x = ops.linear(x, self.weights[3], self.biases[3])
        return x if self.of_branches[1] is None else ops.rms_norm(x, self.of_branches[1], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("is_gemma", [False, True])
def test_one_call_equals_the_operators(
    isa: str, rng: random.Random, dtype: torch.dtype, bias: bool, head_norms: bool, is_gemma: bool
) -> None:
    layer = Layer(
        hidden=rng.choice([64, 100]),
        inner=rng.choice([96, 72]),  # 72 is no whole number of panels
        heads=6,
        kv_heads=2,
        head_size=16,
        dtype=dtype,
        bias=bias,
        head_norms=head_norms,
        is_neox=rng.random() < 0.5,
        branch_norms=is_gemma,
        float_norms=is_gemma,
        gate="gelu_tanh" if is_gemma else "silu",
    )
    kernel = layer.kernel()
    assert kernel is not None
    for batch in (Batch([1, 1], [33, 190]), Batch([1, 80, 5], [10, 0, 100])):
        step = make_step(
            batch,
            dtype=dtype,
            cache_dtype=dtype,
            heads=6,
            kv_heads=2,
            head_size=16,
            block_size=16,
            layout="BHLNC",
        )
        tokens = sum(batch.new)
        positions = torch.randint(0, 1000, (tokens,))
        untouched = step.cache.clone()
        for has_branch in (False, True):
            hidden = torch.randn(tokens, layer.hidden).to(dtype)
            residual = torch.randn(tokens, layer.hidden).to(dtype)
            step.cache.copy_(untouched)
            expected_residual = residual.clone()
            branch = hidden.clone() if has_branch else None
            expected = layer.one_by_one(branch, expected_residual, positions, step)
            expected_cache = step.cache.clone()
            step.cache.copy_(untouched)
            kernel.bind(step.cache)
            run_decoder_layers(
                [kernel],
                hidden,
                has_branch,
                residual,
                positions,
                step.slot_mapping,
                step.query_start_loc,
                step.seq_lens,
                step.block_table,
                True,
            )
            assert torch.equal(hidden, expected)
            assert torch.equal(residual, expected_residual)
            assert torch.equal(step.cache.nan_to_num(5), expected_cache.nan_to_num(5))


def test_layers_in_one_call_equal_layers_in_turn(rng: random.Random) -> None:
    sizes = {"hidden": 64, "inner": 96, "heads": 4, "kv_heads": 2, "head_size": 16}
    layers = [Layer(**sizes, dtype=torch.bfloat16, bias=False, head_norms=False) for _ in range(3)]
    kernels = [layer.kernel() for layer in layers]
    step = make_step(
        Batch([1, 4], [10, 0]),
        dtype=torch.bfloat16,
        cache_dtype=torch.bfloat16,
        heads=4,
        kv_heads=2,
        head_size=16,
        block_size=16,
        layout="LBHNC",
    )
    caches = [step.cache.clone() for _ in layers]
    residual = torch.randn(5, 64).bfloat16()
    expected, expected_residual = None, residual.clone()
    positions = torch.arange(5)
    for layer, cache, kernel in zip(layers, caches, kernels, strict=True):
        kernel.bind(cache.clone())
        step.cache = cache
        expected = layer.one_by_one(expected, expected_residual, positions, step)
    hidden = torch.full((5, 64), float("nan")).bfloat16()
    tables = (step.query_start_loc, step.seq_lens, step.block_table)
    run_decoder_layers(
        kernels, hidden, False, residual, positions, step.slot_mapping, *tables, True
    )
    assert torch.equal(hidden, expected) and torch.equal(residual, expected_residual)
    with pytest.raises(IndexError, match="position 1000 is not below 1000"):
        run_decoder_layers(
            kernels, hidden, True, residual, positions + 996, step.slot_mapping, *tables, True
        )


def test_weights_that_are_not_packed_have_no_kernel(seed: int) -> None:
    layer = Layer(64, 64, 2, 1, 16, torch.float32, bias=False, head_norms=False)
    plain = ops.PackedWeight(n=64, k=64, dtype=torch.float32, plain=torch.randn(64, 64))
    layer.weights = (*layer.weights[:3], plain)
    assert layer.kernel() is None
