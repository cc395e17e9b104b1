"""``vllm bench throughput`` and ``latency`` with the real engine."""

import json

import pytest

ENGINE = ["--model", "smollm2", "--max-model-len", "256", "--kv-cache-memory-bytes", "64M"]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def test_throughput(vllm_command, tmp_path):
    file = tmp_path / "out.json"
    answer = vllm_command(
        "bench", "throughput", *ENGINE, "--input-len", "16", "--output-len", "4",
        "--num-prompts", "5", "--output-json", str(file),
    )  # fmt: skip
    assert answer.status == 0, answer.err
    result = json.loads(file.read_text())
    assert result["num_requests"] == 5
    assert result["total_num_tokens"] == 5 * (16 + 4)
    assert result["output_tokens_per_second"] == pytest.approx(20 / result["elapsed_time"])
    assert answer.out.startswith("Throughput: ")


def test_latency(vllm_command, tmp_path):
    file = tmp_path / "out.json"
    answer = vllm_command(
        "bench", "latency", *ENGINE, "--input-len", "8", "--output-len", "4", "--batch-size", "2",
        "--num-iters-warmup", "1", "--num-iters", "3", "--output-json", str(file),
    )  # fmt: skip
    assert answer.status == 0, answer.err
    result = json.loads(file.read_text())
    assert len(result["latencies"]) == 3
    assert min(result["latencies"]) <= result["avg_latency"] <= max(result["latencies"])
    assert "Avg latency:" in answer.out


def test_a_request_longer_than_the_model_takes(vllm_command):
    answer = vllm_command("bench", "latency", *ENGINE, "--input-len", "250", "--output-len", "7")
    assert answer.status == 2
    assert answer.err.splitlines()[-1] == (
        "vllm bench latency: error: --input-len and --output-len come to 257 tokens, "
        "more than --max-model-len 256"
    )
