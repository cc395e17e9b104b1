"""Figures of a serving benchmark from the outcomes of its requests. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm.benchmarks.client import Outcome
from vllm.errors import ConfigError

__all__ = ["METRICS", "parse_goodput", "parse_metrics", "parse_percentiles", "report", "summarize"]

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
_DEFAULT_METRICS = "ttft,tpot,itl"


def parse_metrics(text: str | None) -> list[str]:
    """Names out of --percentile-metrics.

    Raises:
        ConfigError: an unknown one.
    """
    names = [name.strip() for name in (text or _DEFAULT_METRICS).split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            raise ConfigError(
                f"--percentile-metrics takes {', '.join(METRICS)}, not {name!r}",
                parameter="percentile_metrics",
                value=name,
            )
    return names


def parse_percentiles(text: str) -> list[float]:
    """Numbers out of --metric-percentiles.

    Raises:
        ConfigError: one that is no percentile.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 100 for value in values):
        raise ConfigError(
            f"--metric-percentiles takes numbers between 0 and 100 such as 50,90,99, not {text!r}",
            parameter="metric_percentiles",
            value=text,
        )
    return values


def parse_goodput(pairs: Sequence[str] | None) -> dict[str, float]:
    """Limits in seconds out of --goodput.

    Raises:
        ConfigError: not METRIC:MILLISECONDS.
    """
    limits = {}
    for pair in pairs or ():
        name, _, text = pair.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = -1.0
        if name not in ("ttft", "tpot", "e2el") or not limit > 0:
            raise ConfigError(
                f"--goodput takes ttft:MS, tpot:MS or e2el:MS, not {pair!r}",
                parameter="goodput",
                value=pair,
            )
        limits[name] = limit / 1000
    return limits


def _seconds(outcome: Outcome, name: str) -> float | None:
    if name == "ttft":
        return outcome.ttft
    return outcome.tpot if name == "tpot" else outcome.latency


def _peak(outcomes: Sequence[Outcome]) -> tuple[float, int]:
    """Most output tokens that came within one second, and most requests in flight at once."""
    if not outcomes:
        return 0.0, 0
    arrivals = np.concatenate(
        [o.start + o.ttft + np.concatenate([[0.0], np.cumsum(o.itl)]) for o in outcomes]
    )
    edges = np.arange(arrivals.min(), arrivals.max() + 1.0, 1.0)
    tokens = np.histogram(arrivals, bins=np.append(edges, edges[-1] + 1.0))[0].max()
    events = sorted([(o.start, 1) for o in outcomes] + [(o.end, -1) for o in outcomes])
    in_flight = np.cumsum([change for _, change in events]).max()
    return float(tokens), int(in_flight)


def summarize(
    outcomes: Sequence[Outcome],
    duration: float,
    *,
    percentiles: Sequence[float],
    goodput: dict[str, float],
) -> dict[str, Any]:
    """All figures under the names that vLLM's result files use.

    Args:
        duration: seconds from the first request to the last answer.
        goodput: limits in seconds per metric; empty for none.
    """
    done = [outcome for outcome in outcomes if outcome.success]
    input_tokens = sum(o.prompt_tokens or o.sample.prompt_len for o in done)
    output_tokens = sum(o.output_tokens for o in done)
    good = sum(
        all(
            (value := _seconds(o, name)) is None or value <= limit
            for name, limit in goodput.items()
        )
        for o in done
    )
    peak_rate, peak_requests = _peak(done)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(done) / duration,
        "request_goodput": good / duration if goodput else None,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (input_tokens + output_tokens) / duration,
        "max_output_tokens_per_s": peak_rate,
        "max_concurrent_requests": peak_requests,
    }
    series = {
        "ttft": [o.ttft for o in done],
        "tpot": [o.tpot for o in done if o.tpot is not None],
        "itl": [gap for o in done for gap in o.itl],
        "e2el": [o.latency for o in done],
    }
    for name, seconds in series.items():
        values = np.array(seconds or [0.0]) * 1000
        result[f"mean_{name}_ms"] = float(values.mean())
        result[f"median_{name}_ms"] = float(np.median(values))
        result[f"std_{name}_ms"] = float(values.std())
        for percentile in percentiles:
            result[f"p{percentile:g}_{name}_ms"] = float(np.percentile(values, percentile))
    return result


def report(result: dict[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The table that ``vllm bench serve`` prints."""
    rows: list[tuple[str, Any]] = [
        ("Successful requests:", result["completed"]),
        ("Failed requests:", result["failed"]),
        ("Benchmark duration (s):", result["duration"]),
        ("Total input tokens:", result["total_input_tokens"]),
        ("Total generated tokens:", result["total_output_tokens"]),
        ("Request throughput (req/s):", result["request_throughput"]),
    ]
    if result["request_goodput"] is not None:
        rows.append(("Request goodput (req/s):", result["request_goodput"]))
    rows += [
        ("Output token throughput (tok/s):", result["output_throughput"]),
        ("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"]),
        ("Peak concurrent requests:", result["max_concurrent_requests"]),
        ("Total token throughput (tok/s):", result["total_token_throughput"]),
    ]
    lines = [f"{' Serving Benchmark Result ':=^54}"]
    lines += [_row(label, value) for label, value in rows]
    for name in metrics:
        short = name.upper()
        lines.append(f"{METRICS[name]:-^54}")
        lines.append(_row(f"Mean {short} (ms):", result[f"mean_{name}_ms"]))
        lines.append(_row(f"Median {short} (ms):", result[f"median_{name}_ms"]))
        lines += [
            _row(f"P{percentile:g} {short} (ms):", result[f"p{percentile:g}_{name}_ms"])
            for percentile in percentiles
        ]
    lines.append("=" * 54)
    return "\n".join(lines) + "\n"


def _row(label: str, value: float) -> str:
    return f"{label:<42}{value:>12.2f}" if isinstance(value, float) else f"{label:<42}{value:>12}"
