"""``--calculate-kv-scales``: scales of an fp8 or nvfp4 cache come from a run at start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.conftest import ENGINE_ARGS
from tests.loader.test_default_loader import edit
from tests.models.checkpoints import make_hf_model, save
from tests.models.linear_attention_checkpoints import make_linear_model
from tests.models.test_bart import make_bart
from tests.worker.driver import make_config
from tests.worker.interpreted import make_interpreted_config
from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer.kv_connector.v1.compatibility import (
    check_factors,
    compatibility_factors,
    compatibility_hash,
)
from vllm.errors import ConfigError, KVTransferError, UnsupportedError
from vllm.model_executor.layers.attention.kv_scales import scale_for
from vllm.v1.attention.ops.kv_formats import FORMATS
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.worker.kv_scales import kv_scales_of

PROMPT = [3, 9, 27, 5, 15, 45, 7, 21, 63, 11, 33, 99, 4, 12, 36]
LARGE = 2.0**20

Start = Callable[..., LLM]


def enlarge(tensors: dict[str, torch.Tensor]) -> None:
    """Values a million times as large, which e4m3 only holds with a scale; same logits."""
    for name in list(tensors):
        if name.endswith("v_proj.weight"):
            tensors[name] *= LARGE
        if name.endswith("o_proj.weight"):
            tensors[name] /= LARGE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large-values")
    save(make_hf_model("llama"), folder)
    edit(folder, enlarge)
    return folder


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    started: list[LLM] = []

    def make(folder: Path, cache_dtype: str = "fp8", **options: Any) -> LLM:
        options = {"max_model_len": 64, "calculate_kv_scales": True} | options
        llm = LLM(
            str(folder), kv_cache_dtype=cache_dtype, skip_tokenizer_init=True,
            **ENGINE_ARGS | options,
        )  # fmt: skip
        started.append(llm)
        return llm

    yield make
    for llm in started:
        llm.shutdown()


def scales_of_worker(worker: Any) -> dict[str, tuple[float, float]]:
    return kv_scales_of(worker.model_runner.layers)


def scales_of(llm: LLM) -> list[dict[str, tuple[float, float]]]:
    """By rank."""
    return llm.collective_rpc(scales_of_worker)


def log_probs(llm: LLM) -> torch.Tensor:
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    rows = zip(output.prompt_logprobs[1:], PROMPT[1:], strict=True)
    return torch.tensor([row[token].logprob for row, token in rows])


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "nvfp4"])
@pytest.mark.parametrize("magnitude", [1e-3, 0.7, 448.0, 3e6])
def test_a_scale_leaves_room_for_twice_what_was_seen(name: str, magnitude: float) -> None:
    fmt = FORMATS[name]
    scale = scale_for(fmt, magnitude)
    assert 1 / 4 < magnitude / (scale * fmt.largest_value) <= 1 / 2
    assert scale.hex().startswith("0x1.0000000000000p")
    x = magnitude * torch.linspace(-2, 2, 64)
    read = fmt.dequantise(fmt.quantise(x, scale), scale)
    # Half a step of the format, of the largest number: none was cut off.
    step = {"fp8_e4m3": 1 / 16, "fp8_e5m2": 1 / 8, "nvfp4": 1 / 4}[name]
    assert (read - x).abs().max() <= step * 2 * magnitude


def test_a_side_of_zeros_keeps_a_scale_that_divides() -> None:
    assert scale_for(FORMATS["fp8"], 0.0) == 1.0


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("fp8_e4m3", "CPU_ATTN"),
        ("nvfp4", "CPU_ATTN"),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in (
                ("fp8_e5m2", "CPU_ATTN"),
                ("fp8_e4m3", "TORCH_REF"),
                ("fp8_e5m2", "TORCH_REF"),
                ("nvfp4", "TORCH_REF"),
            )
        ),
    ],
)
def test_what_a_scale_of_one_cuts_off_is_kept(
    start: Start, model: Path, name: str, backend: str
) -> None:
    exact = log_probs(start(model, "auto", calculate_kv_scales=False))
    found = start(model, name, attention_backend=backend)
    cut_off = log_probs(start(model, name, calculate_kv_scales=False, attention_backend=backend))
    ours = (log_probs(found) - exact).abs().mean()
    assert ours < 0.25 * (cut_off - exact).abs().mean()
    (scales,) = scales_of(found)
    assert all(v > 1000 * k for k, v in scales.values())


def test_what_is_found_is_said(start: Start, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vllm"):
        start(model)
    (line,) = [r.getMessage() for r in caplog.records if "KV scales" in r.getMessage()]
    assert line.startswith("KV scales of 3 layers after 63 tokens: K ")
    assert line.endswith("; 0 are the checkpoint's")


def test_scales_of_the_checkpoint_stay(start: Start, tmp_path: Path) -> None:
    save(make_hf_model("llama"), tmp_path)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(0.7)
        tensors["model.layers.1.self_attn.kv_scale"] = torch.tensor(0.3)

    edit(tmp_path, add)
    (scales,) = scales_of(start(tmp_path))
    first, second, third = (scales[f"model.layers.{i}.self_attn.attn"] for i in range(3))
    assert first[0] == pytest.approx(0.7)
    assert second == pytest.approx((0.3, 0.3))
    for found in (first[1], *third):
        assert found.hex().startswith("0x1.0000000000000p")
        assert found < 0.25


def test_ranks_agree_and_find_what_one_finds(start: Start, model: Path) -> None:
    """Two KV heads, one on each rank; the largest number is on one of them."""
    (alone,) = scales_of(start(model))
    together = start(model, tensor_parallel_size=2)
    first, second = scales_of(together)
    assert first == second == alone


def test_layers_that_are_skipped_or_share_a_cache_are_left_alone(start: Start, model: Path) -> None:
    (scales,) = scales_of(start(model, kv_cache_dtype_skip_layers=["1"]))
    assert scales["model.layers.1.self_attn.attn"] == (1.0, 1.0)
    assert scales["model.layers.2.self_attn.attn"] != (1.0, 1.0)


@pytest.mark.slow
def test_a_model_with_states_beside_attention(start: Start, tmp_path: Path) -> None:
    save(make_linear_model("qwen3_next"), tmp_path)
    plain = start(tmp_path, calculate_kv_scales=False)
    found = start(tmp_path)
    (scales,) = scales_of(found)
    assert scales
    assert all(1.0 not in pair for pair in scales.values())
    # Nothing of the calibrating run is left in a state that a request begins with.
    assert (log_probs(found) - log_probs(plain)).abs().max() < 0.5
    assert torch.equal(log_probs(found), log_probs(found))


def test_they_outlive_the_weights(start: Start, model: Path) -> None:
    llm = start(model, enable_sleep_mode=True)
    before, expected = scales_of(llm), log_probs(llm)
    llm.sleep(level=2)
    llm.wake_up()
    assert scales_of(llm) == before
    assert torch.equal(log_probs(llm), expected)


@pytest.mark.slow
def test_the_runner_of_a_gpu_finds_the_same(start: Start, model: Path) -> None:
    (expected,) = scales_of(start(model, max_model_len=24))
    config = make_interpreted_config(model, overlapped=True)
    config = replace(
        config,
        model_config=replace(config.model_config, max_model_len=24),
        scheduler_config=replace(config.scheduler_config, max_model_len=24),
        cache_config=replace(config.cache_config, cache_dtype="fp8", calculate_kv_scales=True),
    )
    core = EngineCore(config, UniProcExecutor, log_stats=False)
    (found,) = core.executor.collective_rpc(scales_of_worker)
    core.shutdown()
    # The interpreter rounds fp8 its own way, and layers read what those before them stored.
    for name, pair in expected.items():
        assert all(
            ours / theirs in (0.5, 1, 2) for ours, theirs in zip(found[name], pair, strict=True)
        )


@pytest.mark.parametrize("name", ["auto", "int8_per_token_head", "turboquant_k8v4"])
def test_formats_without_such_scales_are_refused(start: Start, model: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"--kv-cache-dtype {name} has not: drop it, or use"):
        start(model, name)


def test_a_model_with_an_encoder_says_what_works(start: Start, tmp_path: Path) -> None:
    save(make_bart(), tmp_path / "bart")
    with pytest.raises(UnsupportedError, match="fp8_per_token_head"):
        start(tmp_path / "bart")


def test_a_small_pool_sees_fewer_tokens(
    start: Start, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="vllm"):
        llm = start(model, num_gpu_blocks_override=3, block_size=16, max_model_len=32)
    assert "3 layers after 31 tokens" in caplog.text
    assert log_probs(llm).isfinite().all()


def test_numbers_that_are_not_finite_are_refused(start: Start, tmp_path: Path) -> None:
    save(make_hf_model("llama"), tmp_path)
    edit(
        tmp_path,
        lambda t: t["model.layers.1.self_attn.v_proj.weight"].fill_(float("inf")),
    )
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.attn are not finite"):
        start(tmp_path)


@pytest.mark.parametrize(
    ("connector", "extra"),
    [
        ("ExampleConnector", {"shared_storage_path": "{folder}"}),
        (
            "OffloadingConnector",
            {"num_cpu_blocks": 8, "file_path": "{folder}", "file_bytes_to_use": 1 << 20},
        ),
    ],
)
def test_blocks_that_outlive_the_engine_need_scales_that_do(
    start: Start, model: Path, tmp_path: Path, connector: str, extra: dict[str, Any]
) -> None:
    extra = {k: str(tmp_path) if v == "{folder}" else v for k, v in extra.items()}
    transfer = {
        "kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": extra,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="keeps blocks for engines to come"):
        start(model, kv_transfer_config=transfer)


def test_engines_with_other_scales_exchange_nothing(model: Path) -> None:
    config = make_config(model)
    cache = replace(config.cache_config, cache_dtype="fp8", calculate_kv_scales=True)
    config = replace(config, cache_config=cache)

    def factors(scales: dict[str, tuple[float, float]]) -> dict[str, str]:
        return compatibility_factors(config, "TestConnector 1", scales)

    mine = factors({"a": (0.5, 0.25), "b": (1.0, 1.0)})
    same = factors({"b": (1.0, 1.0), "a": (0.5, 0.25)})
    check_factors(mine, same, compatibility_hash(same))
    for scales in ({"a": (0.5, 0.5)}, {}, {"a": (0.25, 0.5)}):
        other = factors(scales)
        with pytest.raises(KVTransferError, match=r"kv_scales: .* \(--calculate-kv-scales\) here"):
            check_factors(mine, other, compatibility_hash(other))


def test_who_asks_for_nothing_has_scales_of_one(start: Start, model: Path) -> None:
    (scales,) = scales_of(start(model, "fp8", calculate_kv_scales=False))
    assert set(scales.values()) == {(1.0, 1.0)}
