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
from vllm.v1.attention.ops.triton_byte_decode import fits_byte_decode
from vllm.v1.attention.ops.triton_paged_attention import default_config
from vllm.v1.attention.ops.triton_slot_codes import key_codes_asm, value_codes_asm
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


@pytest.mark.parametrize("name", NAMES)
def test_decodes_over_slots_equal_float64(name: str, rng: random.Random) -> None:
    """By the kernel that reads words: any page stride, any page a multiple of 16."""
    options = rng.choice([{}, {"window": 24}, {"soft_cap": 20.0}, {"alibi": True}, {"sinks": True}])
    case = Case(
        lengths=((70, 1), (33, 1), (1, 1)), kv_heads=rng.choice([1, 3]),
        group=rng.choice([1, 3, 7]), head_size=rng.choice([64, 128, 256]),
        page=rng.choice([16, 32]), layout=rng.choice(["LBHNC", "LBNHC", "BHLNC", "padded"]),
        cache_dtype=name, dtype=rng.choice([torch.float32, torch.float16]), **options,
    )  # fmt: skip
    print(case)
    assert fits_byte_decode(case.format, case.head_size, case.page, case.group)
    step = make_step(case, rng, DEVICE)
    store(step, "TORCH_REF")
    assert relative_error(attend(step, "TURBOQUANT"), exact(step)) < TOLERANCE[case.dtype]


def run_ptx(source: str, words: tuple[int, int]) -> list[int]:
    """The eight results of inline PTX over two words: what the instructions say, in integers."""
    registers: dict[str, int] = {"$8": words[0], "$9": words[1]}

    def prmt(a: int, b: int, selector: int) -> int:
        data, result = (a | b << 32).to_bytes(8, "little"), 0
        for place in range(4):
            nibble = selector >> (4 * place) & 15
            byte = data[nibble & 7]
            result |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << (8 * place)
        return result

    def lop3(a: int, b: int, c: int, table: int) -> int:
        return sum(
            1 << bit for bit in range(32)
            if table >> ((a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)) & 1
        )  # fmt: skip

    def halves(a: int, b: int) -> int:
        x, y = (torch.tensor([v & 65535, v >> 16]).to(torch.uint16).view(torch.float16)
                for v in (a, b))  # fmt: skip
        low, high = (x - y).view(torch.uint16).tolist()
        return low | high << 16

    operations = {
        "mov.b32": lambda a: a, "prmt.b32": prmt, "and.b32": lambda a, b: a & b,
        "shr.u32": lambda a, b: a >> b, "shl.b32": lambda a, b: a << b,
        "sub.u32": lambda a, b: a - b, "lop3.b32": lop3, "sub.f16x2": halves,
    }  # fmt: skip
    for line in source.strip("{}\n").splitlines()[1:]:
        name, operands = line.rstrip(";").split(" ", 1)
        target, *others = operands.split(", ")
        values = (int(x, 0) if x[0].isdigit() else registers[x] for x in others)
        registers[target] = operations[name](*values) & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(8)]


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("side", ["key", "value"])
def test_the_ptx_turns_every_code_into_its_number(side: str, bits: int, rng: random.Random) -> None:
    if side == "key":
        source = key_codes_asm(bits)
        numbers = torch.tensor(normal_levels(bits)[0]).half()
    else:
        source = value_codes_asm(bits)
        numbers = (torch.arange(1 << bits) - (1 << (bits - 1))).half()
    for _ in range(64):
        codes = [[rng.randrange(1 << bits) for _ in range(8)] for _ in range(2)]
        words = [sum(code << (4 * i) for i, code in enumerate(row)) for row in codes]
        found = torch.tensor(run_ptx(source, (words[0], words[1])), dtype=torch.int64)
        both = torch.stack([found & 65535, found >> 16]).to(torch.uint16).view(torch.float16)
        assert torch.equal(both, numbers[torch.tensor(codes)])


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
@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "padded"])
def test_decodes_over_slots_in_bfloat16(name: str, layout: str, rng: random.Random) -> None:
    for head_size, page, group in ((128, 64, 4), (64, 16, 7), (256, 32, 16), (32, 16, 1)):
        case = Case(
            lengths=((1700, 1), (300, 1), (17, 1)), kv_heads=3, group=group, head_size=head_size,
            page=page, layout=layout, cache_dtype=name, dtype=torch.bfloat16,
        )  # fmt: skip
        step = make_step(case, rng, DEVICE)
        store(step, "TURBOQUANT")
        error = relative_error(attend(step, "TURBOQUANT"), exact(step))
        assert error < TOLERANCE[torch.bfloat16], case


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_over_slots_on_a_gpu(
    name: str, dtype: torch.dtype, head_size: int, rng: random.Random
) -> None:
    for group, page, options in ((4, 64, {}), (1, 16, {"soft_cap": 20.0}), (2, 16, {"window": 40})):
        case = Case(
            lengths=((133, 20), (60, 60), (300, 300), (70, 1), (1, 1)), kv_heads=2, group=group,
            head_size=head_size, page=page, cache_dtype=name, dtype=dtype, **options,
        )  # fmt: skip
        step = make_step(case, rng, DEVICE)
        store(step, "TURBOQUANT")
        assert relative_error(attend(step, "TURBOQUANT"), exact(step)) < TOLERANCE[dtype], case


@pytest.mark.parametrize("size", [1e-3, 2e3])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "turboquant_k8v4"])
def test_small_and_large_values_stay_within_float16(
    name: str, size: float, rng: random.Random
) -> None:
    """Weights times steps of values are float16, as are the numbers that codes stand for."""
    case = Case(
        lengths=((90, 3), (33, 2), (70, 1)), kv_heads=1, group=2, head_size=rng.choice([32, 64]),
        cache_dtype=name, dtype=torch.float16,
    )  # fmt: skip
    step = make_step(case, rng, DEVICE)
    # The only head's have a magnitude of 0.1.
    step.values = [(10 * size * value.float()).half() for value in step.values]
    step.query = (step.query.float() * 4).half()
    store(step, "TORCH_REF")
    assert relative_error(attend(step, "TURBOQUANT"), exact(step)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_taken_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    wanted = {"head_size": 128, "kv_cache_dtype": name, "block_size": 64}
    for dtype in (torch.float16, torch.bfloat16):
        assert TurboQuantBackend.validate_configuration(dtype=dtype, **wanted) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_heads_are_multiplied_without_descriptors(name: str, dtype: torch.dtype) -> None:
    """Triton takes Hopper's grouped products for groups of four warps."""
    for head_size in (16, 32):
        config = default_config(64, head_size, dtype, True, TURBOQUANT_FORMATS[name])
        assert config.prefill_warps < 4
    assert default_config(64, 64, dtype, True, TURBOQUANT_FORMATS[name]).prefill_warps >= 4
