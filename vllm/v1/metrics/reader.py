"""The engine's metrics as plain values, for programs that embed it (``LLM.get_metrics``)."""

from dataclasses import dataclass

from vllm.v1.metrics.prometheus import get_prometheus_registry

__all__ = ["Counter", "Gauge", "Histogram", "Metric", "get_metrics_snapshot"]


@dataclass(slots=True)
class Metric:
    name: str
    labels: dict[str, str]


@dataclass(slots=True)
class Counter(Metric):
    """Only grows; ``name`` is without ``_total``."""

    value: int


@dataclass(slots=True)
class Gauge(Metric):
    value: float


@dataclass(slots=True)
class Histogram(Metric):
    """``buckets`` maps upper bounds, "+Inf" the last, to how many values are at most that."""

    count: int
    sum: float
    buckets: dict[str, int]


def get_metrics_snapshot() -> list[Metric]:
    """All ``vllm:`` metrics of this process, one entry per combination of labels."""
    snapshot: list[Metric] = []
    for family in get_prometheus_registry().collect():
        if not family.name.startswith("vllm:"):
            continue
        histograms: dict[tuple[tuple[str, str], ...], Histogram] = {}
        for sample in family.samples:
            labels = dict(sample.labels)
            bound = labels.pop("le", None)
            if family.type == "gauge":
                snapshot.append(Gauge(family.name, labels, sample.value))
            elif family.type == "counter" and sample.name.endswith("_total"):
                snapshot.append(Counter(family.name, labels, int(sample.value)))
            elif family.type == "histogram":
                key = tuple(sorted(labels.items()))
                entry = histograms.setdefault(key, Histogram(family.name, labels, 0, 0.0, {}))
                if bound is not None:
                    entry.buckets[bound] = int(sample.value)
                elif sample.name.endswith("_count"):
                    entry.count = int(sample.value)
                elif sample.name.endswith("_sum"):
                    entry.sum = sample.value
        snapshot.extend(histograms.values())
    return snapshot
