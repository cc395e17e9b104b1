"""The options of ``vllm bench``: one table per benchmark. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.utils.flags import Kind, NotYet, arg

__all__ = ["NOT_YET", "LatencyArgs", "ServeArgs", "ThroughputArgs"]

DATASETS = ("random", "prefix_repetition", "sharegpt", "custom")
_LATER_DATASETS = (
    "burstgpt",
    "sonnet",
    "hf",
    "random-mm",
    "random-rerank",
    "spec_bench",
)


@dataclass(frozen=True, kw_only=True)
class DatasetArgs:
    """Which prompts are sent."""

    dataset_name: str = arg(
        "random",
        "Dataset",
        Kind.STR,
        "Where prompts come from: random tokens, random tokens behind a few common prefixes, a "
        "ShareGPT file, or a JSON Lines file (custom).",
        choices=DATASETS,
        later=_LATER_DATASETS,
    )
    dataset_path: str | None = arg(
        None, "Dataset", Kind.STR, "File of a sharegpt or custom dataset."
    )
    num_prompts: int = arg(1000, "Dataset", Kind.INT, "Prompts to send.", minimum=1)
    input_len: int | None = arg(
        None,
        "Dataset",
        Kind.INT,
        "The same as --random-input-len, or --prefix-repetition-suffix-len.",
        minimum=1,
    )
    output_len: int | None = arg(
        None, "Dataset", Kind.INT, "Tokens asked for with each prompt, of any dataset.", minimum=1
    )
    random_input_len: int = arg(1024, "Dataset", Kind.INT, "Tokens of a random prompt.", minimum=1)
    random_output_len: int = arg(
        128, "Dataset", Kind.INT, "Tokens asked for with a random prompt.", minimum=1
    )
    random_range_ratio: float = arg(
        0.0,
        "Dataset",
        Kind.FLOAT,
        "Spread of random lengths: each is uniform in [len * (1 - r), len * (1 + r)].",
        minimum=0.0,
        maximum=1.0,
    )
    random_prefix_len: int = arg(
        0, "Dataset", Kind.INT, "Tokens that all random prompts begin with.", minimum=0
    )
    prefix_repetition_num_prefixes: int = arg(
        10, "Dataset", Kind.INT, "Prefixes that prompts share out among them.", minimum=1
    )
    prefix_repetition_prefix_len: int = arg(
        256, "Dataset", Kind.INT, "Tokens of such a prefix.", minimum=1
    )
    prefix_repetition_suffix_len: int = arg(
        256, "Dataset", Kind.INT, "Tokens of a prompt behind its prefix.", minimum=1
    )
    prefix_repetition_output_len: int = arg(
        128, "Dataset", Kind.INT, "Tokens asked for with such a prompt.", minimum=1
    )
    sharegpt_output_len: int | None = arg(
        None,
        "Dataset",
        Kind.INT,
        "Tokens asked for with a ShareGPT prompt; by default its answer's length.",
        minimum=1,
    )
    custom_output_len: int = arg(
        256,
        "Dataset",
        Kind.INT,
        "Tokens asked for with a custom prompt that does not say (output_tokens).",
        minimum=1,
    )
    disable_shuffle: bool = arg(
        False, "Dataset", Kind.SWITCH, "Take the prompts of a file in its order."
    )


@dataclass(frozen=True, kw_only=True)
class ServeArgs(DatasetArgs):
    """Options of ``vllm bench serve``."""

    backend: str = arg(
        "openai",
        "Server",
        Kind.STR,
        "Kind of server and endpoint; vllm is the same as openai.",
        choices=("openai", "vllm", "openai-chat"),
        later=("tgi", "tensorrt-llm", "llama.cpp", "sglang", "openai-audio", "openai-embeddings"),
    )
    base_url: str | None = arg(
        None, "Server", Kind.STR, "URL of the server, in place of --host and --port."
    )
    host: str = arg("127.0.0.1", "Server", Kind.STR, "Host of the server.")
    port: int = arg(8000, "Server", Kind.INT, "Port of the server.", minimum=1, maximum=65535)
    endpoint: str | None = arg(
        None,
        "Server",
        Kind.STR,
        "Path; by default /v1/completions, or /v1/chat/completions with openai-chat.",
    )
    header: list[str] | None = arg(None, "Server", Kind.LIST, "HTTP headers, each as KEY=VALUE.")
    model: str | None = arg(
        None, "Server", Kind.STR, "Model to ask for; by default the server's first."
    )
    served_model_name: str | None = arg(
        None, "Server", Kind.STR, "Name of the model in requests, where --model is a path."
    )
    tokenizer: str | None = arg(
        None, "Server", Kind.STR, "Tokenizer that counts tokens; by default --model's."
    )
    tokenizer_mode: str = arg("auto", "Server", Kind.STR, "How the tokenizer is loaded.")
    trust_remote_code: bool = arg(
        False, "Server", Kind.SWITCH, "Run Python code that comes with the tokenizer."
    )
    ready_check_timeout_sec: int = arg(
        600, "Server", Kind.INT, "Seconds to wait for the server; 0: do not wait.", minimum=0
    )

    max_concurrency: int | None = arg(
        None, "Load", Kind.INT, "Requests in flight, at most; by default no limit.", minimum=1
    )
    request_rate: float = arg(
        float("inf"),
        "Load",
        Kind.FLOAT,
        "Requests started per second; inf: all at once.",
        minimum=1e-6,
        words=(("inf", float("inf")),),
    )
    burstiness: float = arg(
        1.0,
        "Load",
        Kind.FLOAT,
        "Shape of the gamma distribution of the gaps at a finite rate: 1 is a Poisson process, "
        "less is burstier, more is steadier.",
        minimum=1e-6,
    )
    client_processes: int = arg(
        1,
        "Load",
        Kind.INT,
        "Processes that send and read requests, which share --max-concurrency; one cannot keep up "
        "with some hundred fast streams.",
        minimum=1,
    )
    num_warmups: int = arg(
        0, "Load", Kind.INT, "Times the first request is sent before the clock starts.", minimum=0
    )
    seed: int = arg(0, "Load", Kind.INT, "Seed of prompts, lengths and gaps.", minimum=0)
    ignore_eos: bool = arg(
        False, "Sampling", Kind.SWITCH, "Generate the tokens asked for, come what may."
    )
    temperature: float | None = arg(
        None, "Sampling", Kind.FLOAT, "Temperature; by default the server's.", minimum=0.0
    )
    top_p: float | None = arg(
        None, "Sampling", Kind.FLOAT, "Top-p of requests.", minimum=0.0, maximum=1.0
    )
    top_k: int | None = arg(None, "Sampling", Kind.INT, "Top-k of requests.", minimum=-1)
    min_p: float | None = arg(
        None, "Sampling", Kind.FLOAT, "Min-p of requests.", minimum=0.0, maximum=1.0
    )
    logprobs: int | None = arg(
        None, "Sampling", Kind.INT, "Log-probabilities asked for per token.", minimum=0
    )
    extra_body: dict[str, Any] = arg({}, "Sampling", Kind.JSON, "Fields added to each request.")

    percentile_metrics: str | None = arg(
        None,
        "Results",
        Kind.STR,
        "Metrics that percentiles are printed of: ttft,tpot,itl,e2el; by default ttft,tpot,itl.",
    )
    metric_percentiles: str = arg("99", "Results", Kind.STR, "Percentiles, such as 50,90,99.")
    goodput: list[str] | None = arg(
        None,
        "Results",
        Kind.LIST,
        "Limits in ms, such as ttft:200 tpot:50; requests within all of them are counted.",
    )
    disable_tqdm: bool = arg(False, "Results", Kind.SWITCH, "Show no progress bar.")
    label: str | None = arg(None, "Results", Kind.STR, "Name of this run, kept in the result.")
    metadata: list[str] | None = arg(
        None, "Results", Kind.LIST, "Facts kept in the result, each as KEY=VALUE."
    )
    save_result: bool = arg(False, "Results", Kind.SWITCH, "Write the result as JSON.")
    save_detailed: bool = arg(
        False, "Results", Kind.SWITCH, "Keep each request's figures and text in that file."
    )
    append_result: bool = arg(
        False, "Results", Kind.SWITCH, "Add the result to the file as one more line."
    )
    result_dir: str | None = arg(None, "Results", Kind.STR, "Directory of the result.")
    result_filename: str | None = arg(None, "Results", Kind.STR, "File name of the result.")


@dataclass(frozen=True, kw_only=True)
class ThroughputArgs(DatasetArgs):
    """Options of ``vllm bench throughput``, beside the engine's."""

    n: int = arg(1, "Benchmark", Kind.INT, "Outputs per prompt.", minimum=1)
    backend: str = arg(
        "vllm",
        "Benchmark",
        Kind.STR,
        "What runs the model.",
        choices=("vllm",),
        later=("hf", "mii", "vllm-chat"),
    )
    disable_detokenize: bool = arg(
        False, "Benchmark", Kind.SWITCH, "Do not turn the output into text."
    )
    output_json: str | None = arg(None, "Benchmark", Kind.STR, "File to write the result to.")


@dataclass(frozen=True, kw_only=True)
class LatencyArgs:
    """Options of ``vllm bench latency``, beside the engine's."""

    input_len: int = arg(32, "Benchmark", Kind.INT, "Tokens of a prompt.", minimum=1)
    output_len: int = arg(128, "Benchmark", Kind.INT, "Tokens generated per prompt.", minimum=1)
    batch_size: int = arg(8, "Benchmark", Kind.INT, "Prompts in a batch.", minimum=1)
    n: int = arg(1, "Benchmark", Kind.INT, "Outputs per prompt.", minimum=1)
    num_iters_warmup: int = arg(10, "Benchmark", Kind.INT, "Batches before timing.", minimum=0)
    num_iters: int = arg(30, "Benchmark", Kind.INT, "Batches timed.", minimum=1)
    disable_detokenize: bool = arg(
        False, "Benchmark", Kind.SWITCH, "Do not turn the output into text."
    )
    output_json: str | None = arg(None, "Benchmark", Kind.STR, "File to write the result to.")


_LATER_SWITCHES = (
    "async-engine",
    "profile",
    "plot-dataset-stats",
    "plot-timeline",
    "use-beam-search",
)
_LATER_VALUES = (
    "hf-name",
    "hf-split",
    "hf-subset",
    "lora-modules",
    "lora-path",
    "ramp-up-end-rps",
    "ramp-up-start-rps",
    "ramp-up-strategy",
)

NOT_YET: tuple[NotYet, ...] = tuple(
    NotYet(name=name.replace("-", "_"), group="Benchmark", takes_value=False, off=(f"--no-{name}",))
    for name in _LATER_SWITCHES
) + tuple(
    NotYet(name=name.replace("-", "_"), group="Benchmark", takes_value=True)
    for name in _LATER_VALUES
)
"""Options of vLLM's benchmarks that these do not have yet."""
