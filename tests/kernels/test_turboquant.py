"""TurboQuant: the formulae, the slots, and the Triton kernels over them."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tests.kernels.attention_case import (
    TOLERANCE,
    Case,
    attend,
    exact,
    make_step,
    relative_error,
    store,
)
from vllm.errors import ConfigError
from vllm.v1.attention.backends.turboquant_attn import TurboQuantBackend
from vllm.v1.attention.ops.turboquant import (
    TURBOQUANT_FORMATS,
    hadamard,
    normal_levels,
    pack,
    unpack,
)
from vllm.v1.kv_cache.declare import turboquant_slot_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = list(TURBOQUANT_FORMATS)


def test_levels_are_those_of_the_literature() -> None:
    """Max, Quantizing for Minimum Distortion (1960), table I: 8 and 16 levels."""
    assert normal_levels(3)[0][4:] == pytest.approx((0.2451, 0.7560, 1.344, 2.152), abs=1e-3)
    assert normal_levels(4)[0][8:12] == pytest.approx((0.1284, 0.3881, 0.6568, 0.9424), abs=1e-3)
    # His mean squared errors.
    x = torch.randn(400_000, dtype=torch.float64)
    for bits, expected in ((3, 0.03454), (4, 0.009497)):
        levels, thresholds = (torch.tensor(v, dtype=torch.float64) for v in normal_levels(bits))
        error = (levels[torch.bucketize(x, thresholds)] - x).pow(2).mean()
        assert float(error) == pytest.approx(expected, rel=0.03)


def test_the_rotation_is_its_own_inverse() -> None:
    matrix = hadamard(64, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix, torch.eye(64))
    assert matrix.abs().unique().numel() == 1


@pytest.mark.parametrize("bits", [3, 4])
def test_codes_come_out_as_they_went_in(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, 64))
    data = pack(codes, bits)
    assert data.shape == (5, 8 * bits)
    assert torch.equal(unpack(data, bits), codes)
    # Code d begins at bit d * bits.
    whole = int.from_bytes(bytes(data[0].tolist()), "little")
    assert [whole >> (bits * d) & ((1 << bits) - 1) for d in range(64)] == codes[0].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_slot_keeps_lengths_and_the_range_of_values(name: str) -> None:
    fmt = TURBOQUANT_FORMATS[name]
    key, value = torch.randn(2, 200, 3, 64) * torch.logspace(-2, 2, 200)[:, None, None]
    key[7] = 0
    value[8] = 3.5
    slots = fmt.quantise_kv(key, value)
    assert slots.shape[-1] == turboquant_slot_bytes(name, 64)
    back_k, back_v = fmt.dequantise_kv(slots).split(64, dim=-1)
    if fmt.rotates:
        lengths = back_k.norm(dim=-1), key.norm(dim=-1)
        torch.testing.assert_close(*lengths, rtol=2e-3, atol=1e-6)
    assert not back_k[7].any()
    # Mean squared error of a coordinate of unit variance, and of a uniform step.
    expected = {3: math.sqrt(0.03454), 4: math.sqrt(0.0095), 8: 0.03}[fmt.key_bits]
    live = torch.arange(200) != 7
    error = (back_k - key).norm(dim=-1) / key.norm(dim=-1).clamp(min=1e-9)
    assert float(error[live].mean()) == pytest.approx(expected, rel=0.15)
    step = (value.amax(-1) - value.amin(-1)) / ((1 << fmt.value_bits) - 1)
    assert ((back_v - value).abs().amax(-1) <= 0.51 * step + 2e-3 * value.abs().amax(-1)).all()
    torch.testing.assert_close(back_v[8], value[8], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_attention_over_slots_equals_float64(name: str, rng: random.Random) -> None:
    options = rng.choice([{}, {"window": 24}, {"soft_cap": 20.0}, {"alibi": True}, {"sinks": True}])
    case = Case(
        lengths=((70, 5), (300, 1), (33, 2), (1, 1)), kv_heads=2, group=rng.choice([1, 3]),
        head_size=rng.choice([32, 64]), page=rng.choice([16, 64]),
        layout=rng.choice(["LBHNC", "LBNHC", "BLHNC", "BHLNC", "padded"]), cache_dtype=name,
        dtype=rng.choice([torch.float32, torch.float16]), shared=16, **options,
    )  # fmt: skip
    print(case)
    step = make_step(case, rng, DEVICE)
    store(step, "TORCH_REF")
    assert relative_error(attend(step, "TURBOQUANT"), exact(step)) < TOLERANCE[case.dtype]


# The interpreter rounds to fp8 in its own way.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.gpu] * (n == "turboquant_k8v4")) for n in NAMES]
)
@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "padded"])
def test_stored_slots_are_those_of_the_format(name: str, layout: str, rng: random.Random) -> None:
    case = Case(
        lengths=((40, 1),), kv_heads=3, group=1, head_size=64, cache_dtype=name, layout=layout
    )
    step = make_step(case, rng, DEVICE)
    step.keys[0][3], step.values[0][4] = 0.0, 1.25
    theirs = store(step, "TORCH_REF", step.cache.clone())
    store(step, "TURBOQUANT")
    # A number between two codes may fall on either side.
    assert (step.cache != theirs).float().mean() < 2e-3
    used = torch.zeros(step.cache.shape[0] * case.page, dtype=torch.bool, device=DEVICE)
    used[step.slots[0]] = True
    rest = step.cache.transpose(1, 2).flatten(0, 1)[~used]
    assert (rest == 255).all()


def test_what_cannot_be_rotated_is_refused() -> None:
    with pytest.raises(ConfigError, match="power of two, not 80"):
        turboquant_slot_bytes("turboquant_4bit_nc", 80)
    reasons = TurboQuantBackend.validate_configuration(
        head_size=64, dtype=torch.float16, kv_cache_dtype="int8_per_token_head"
    )
    assert "kv cache dtype int8_per_token_head not supported" in reasons


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_attention_over_slots_in_bfloat16(name: str, rng: random.Random) -> None:
    for lengths in (((133, 20), (60, 60), (70, 1), (1, 1)), ((1700, 1), (300, 1))):
        case = Case(
            lengths=lengths, kv_heads=2, group=4, head_size=128, page=64, cache_dtype=name,
            dtype=torch.bfloat16,
        )  # fmt: skip
        step = make_step(case, rng, DEVICE)
        store(step, "TURBOQUANT")
        assert relative_error(attend(step, "TURBOQUANT"), exact(step)) < TOLERANCE[torch.bfloat16]
