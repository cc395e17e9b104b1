"""``vllm bench serve`` against a real HTTP server: load, timing, figures, result file."""

import asyncio
import collections
import json

import numpy as np
import pytest

from vllm.benchmarks import client, load

TOKENIZER = ["--tokenizer", "smollm2"]


@pytest.fixture
def bench(vllm_command, peer):
    def run(*argv: str):
        return vllm_command(
            "bench",
            "serve",
            "--base-url",
            peer.url,
            *TOKENIZER,
            "--disable-tqdm",
            "--random-input-len",
            "8",
            "--random-output-len",
            "4",
            *argv,
        )

    return run


def test_the_flags_of_the_comparison_script(bench, peer, tmp_path):
    answer = bench(
        "--backend", "openai", "--endpoint", "/v1/completions", "--model", "words",
        "--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "6",
        "--random-range-ratio", "0", "--num-prompts", "9", "--max-concurrency", "3",
        "--request-rate", "inf", "--burstiness", "1.0", "--ignore-eos", "--temperature", "0",
        "--seed", "5", "--metadata", "busy_before=3", "--percentile-metrics",
        "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99", "--save-result",
        "--result-dir", str(tmp_path / "new"), "--result-filename", "out.json",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    result = json.loads((tmp_path / "new" / "out.json").read_text())
    assert (result["completed"], result["failed"], result["num_prompts"]) == (9, 0, 9)
    assert result["total_output_tokens"] == 54
    assert result["busy_before"] == "3"
    assert result["max_concurrency"] == 3
    assert result["model_id"] == "words"
    assert result["output_throughput"] == pytest.approx(54 / result["duration"])
    assert result["request_throughput"] == pytest.approx(9 / result["duration"])
    assert result["total_token_throughput"] > result["output_throughput"]
    for metric in ("ttft", "tpot", "itl", "e2el"):
        for figure in ("mean", "median", "std", "p50", "p90", "p99"):
            assert np.isfinite(result[f"{figure}_{metric}_ms"]), (figure, metric)
    assert result["p50_ttft_ms"] == pytest.approx(result["median_ttft_ms"])
    assert len(peer.requests) == 9
    for request in peer.requests:
        assert request["model"] == "words"
        assert request["max_tokens"] == 6
        assert request["ignore_eos"] is True
        assert request["temperature"] == 0
        assert request["stream"] is True
    assert len({request["prompt"] for request in peer.requests}) == 9
    assert "Median TTFT (ms):" in answer.out
    assert "P99 E2EL (ms):" in answer.out


def test_concurrency_is_kept(bench, peer):
    peer.gathers = 4
    assert bench("--num-prompts", "12", "--max-concurrency", "4").status == 0
    assert peer.most_in_flight == 4


def test_several_client_processes_share_the_load(bench, peer, tmp_path):
    peer.gathers = 7
    answer = bench(
        "--num-prompts", "11", "--max-concurrency", "7", "--client-processes", "3",
        "--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (11, 44)
    assert peer.most_in_flight == result["max_concurrent_requests"] == 7
    assert len({request["prompt"] for request in peer.requests}) == 11


def test_hundreds_of_streams_at_once(bench, peer, tmp_path):
    peer.gathers = 300
    answer = bench(
        "--num-prompts", "300", "--save-result", "--result-dir", str(tmp_path),
        "--result-filename", "r.json",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    assert peer.most_in_flight == 300
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["max_concurrent_requests"] == 300


def test_times_are_those_of_the_server(bench, peer, tmp_path):
    peer.delay = 0.05
    bench(
        "--num-prompts", "2", "--max-concurrency", "1", "--save-result", "--result-dir",
        str(tmp_path), "--result-filename", "r.json", "--save-detailed",
    )  # fmt: skip
    result = json.loads((tmp_path / "r.json").read_text())
    # Lower bounds; an upper one would time the machine, on which words may be read late, too.
    assert result["median_ttft_ms"] > 45
    assert result["median_e2el_ms"] > 4 * 45
    assert result["median_ttft_ms"] == pytest.approx(1e3 * np.median(result["ttfts"]))
    gaps = np.array(result["itls"])
    assert result["median_itl_ms"] == pytest.approx(1e3 * np.median(gaps))
    assert result["median_tpot_ms"] == pytest.approx(1e3 * np.median(gaps.mean(1)), rel=0.05)
    whole = np.array(result["ttfts"]) + gaps.sum(1)
    assert result["median_e2el_ms"] == pytest.approx(1e3 * np.median(whole), rel=0.05)
    assert [len(gaps) for gaps in result["itls"]] == [3, 3]
    assert result["generated_texts"] == ["tik tik tik tik "] * 2


class FastTime:
    """Goes by when somebody sleeps, once all others have gone on; else it is ``asyncio``."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now

    monotonic = perf_counter

    async def sleep(self, seconds):
        await asyncio.sleep(0)
        self.now += seconds

    def __getattr__(self, name):
        return getattr(asyncio, name)


def test_a_rate_spreads_the_requests(bench, peer, tmp_path, monkeypatch):
    fast = FastTime()
    for module, name in ((load, "time"), (load, "asyncio"), (client, "time")):
        monkeypatch.setattr(module, name, fast)
    bench(
        "--num-prompts", "10", "--request-rate", "20", "--burstiness", "100", "--save-result",
        "--result-dir", str(tmp_path), "--result-filename", "r.json", "--save-detailed",
    )  # fmt: skip
    result = json.loads((tmp_path / "r.json").read_text())
    gaps = np.diff(sorted(result["start_times"]))
    assert gaps.mean() == pytest.approx(0.05, rel=0.2)
    assert gaps == pytest.approx(np.diff(load.due_times(10, 20, 100, 0)))


def test_chat_backend(bench, peer):
    answer = bench("--backend", "openai-chat", "--num-prompts", "3")
    assert answer.status == 0, answer.err
    request = peer.requests[0]
    assert request["messages"][0]["role"] == "user"
    assert request["max_completion_tokens"] == 4


def test_without_usage_the_pieces_are_counted(bench, peer, tmp_path):
    peer.send_usage = False
    bench(
        "--num-prompts", "3", "--save-result", "--result-dir", str(tmp_path),
        "--result-filename", "r.json",
    )  # fmt: skip
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["total_output_tokens"] == 12
    assert result["total_input_tokens"] == 3 * 8


def test_failed_requests_are_counted_and_said(bench, peer, tmp_path):
    peer.fail_every = 2
    answer = bench(
        "--num-prompts", "6", "--max-concurrency", "1", "--save-result", "--result-dir",
        str(tmp_path), "--result-filename", "r.json",
    )  # fmt: skip
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["completed"], result["failed"]) == (3, 3)
    assert "3 of 6 requests failed; first: status 500" in answer.err
    assert answer.status == 0


def test_no_success_is_a_failure(bench, peer):
    peer.fail_every = 1
    assert bench("--num-prompts", "2").status == 1


def test_goodput_counts_requests_within_the_limits(bench, peer, tmp_path):
    peer.delay = 0.02
    bench(
        "--num-prompts", "2", "--goodput", "ttft:1", "--save-result", "--result-dir",
        str(tmp_path), "--result-filename", "r.json",
    )  # fmt: skip
    assert json.loads((tmp_path / "r.json").read_text())["request_goodput"] == 0


def test_warm_ups_headers_and_extra_fields(bench, peer):
    bench(
        "--num-prompts", "2", "--num-warmups", "3", "--header", "X-Who=me", "--extra-body.min_p",
        "0.1",
    )  # fmt: skip
    assert len(peer.requests) == 5
    assert all(headers["x-who"] == "me" for headers in peer.headers)
    assert all(request["min_p"] == 0.1 for request in peer.requests)


def test_results_can_be_appended(bench, tmp_path):
    for _ in range(2):
        bench(
            "--num-prompts", "1", "--append-result", "--result-dir", str(tmp_path),
            "--result-filename", "r.jsonl",
        )  # fmt: skip
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    assert [json.loads(line)["completed"] for line in lines] == [1, 1]


def test_custom_and_sharegpt_files(bench, peer, tmp_path):
    custom = tmp_path / "custom.jsonl"
    custom.write_text('{"prompt": "one two three", "output_tokens": 2}\n{"prompt": "four"}\n')
    assert bench(
        "--dataset-name", "custom", "--dataset-path", str(custom), "--num-prompts", "3",
        "--disable-shuffle", "--custom-output-len", "5",
    ).status == 0  # fmt: skip
    sent = {(request["prompt"], request["max_tokens"]) for request in peer.requests}
    assert sent == {("one two three", 2), ("four", 5)}
    peer.requests.clear()
    talk = tmp_path / "talk.json"
    turns = [{"value": "How far is the moon from here?"}, {"value": "Some 384,000 km, on average."}]
    talk.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}]))
    assert bench(
        "--dataset-name", "sharegpt", "--dataset-path", str(talk), "--num-prompts", "1"
    ).status == 0  # fmt: skip
    assert peer.requests[0]["prompt"] == "How far is the moon from here?"
    assert peer.requests[0]["max_tokens"] > 4


def test_prompts_share_a_few_prefixes(bench, peer):
    assert bench(
        "--dataset-name", "prefix_repetition", "--num-prompts", "5",
        "--prefix-repetition-num-prefixes", "2", "--prefix-repetition-prefix-len", "8",
        "--input-len", "4", "--output-len", "3",
    ).status == 0  # fmt: skip
    prompts = [request["prompt"] for request in peer.requests]
    assert {request["max_tokens"] for request in peer.requests} == {3}
    assert len(set(prompts)) == 5
    starts = collections.Counter(prompt[:8] for prompt in prompts)
    assert sorted(starts.values()) == [2, 3]


def test_lengths_have_short_names(bench, peer):
    assert bench("--num-prompts", "1", "--input-len", "6", "--output-len", "2").status == 0
    assert peer.requests[0]["max_tokens"] == 2


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--metadata", "x"], "--metadata takes KEY=VALUE, not 'x'"),
        (["--header", "x"], "--header takes KEY=VALUE"),
        (["--percentile-metrics", "speed"], "--percentile-metrics takes ttft, tpot, itl, e2el"),
        (["--metric-percentiles", "101"], "--metric-percentiles takes numbers between 0 and 100"),
        (["--goodput", "itl:3"], "--goodput takes ttft:MS"),
        (["--backend", "openai-chat", "--endpoint", "/v1/completions"], "does not fit --endpoint"),
        (["--backend", "tgi"], "--backend tgi: vLLM has this"),
        (["--dataset-name", "sonnet"], "--dataset-name sonnet: vLLM has this"),
        (["--dataset-name", "custom"], "--dataset-name custom needs --dataset-path"),
        (["--dataset-name", "custom", "--dataset-path", "/no"], "--dataset-path /no: "),
        (["--request-rate", "0"], "--request-rate must be at least"),
        (["--profile"], "--profile: vLLM has this"),
        (["--tokenizer", "/nowhere/at/all"], "--tokenizer '/nowhere/at/all'"),
        (["--base-url", "localhost:1"], "--base-url must begin with http://"),
    ],
)
def test_bad_option_is_one_line(bench, argv, part):
    answer = bench(*argv)
    assert answer.status == 2
    assert part in answer.err
    assert answer.err.count("\n") == 1


def test_no_server(vllm_command):
    answer = vllm_command(
        "bench", "serve", "--port", "1", *TOKENIZER, "--ready-check-timeout-sec", "0"
    )
    assert answer.status == 1
    assert "no server is ready at http://127.0.0.1:1" in answer.err
