"""``/metrics``, and the HTTP server's own metrics.

The names, labels and buckets of the ``http_*`` metrics are those of the instrumentator that
dashboards for vLLM expect. The engine's metrics are the engine's.
"""

import time
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["HTTPMetrics", "HTTPMetricsMiddleware", "metrics_response"]

_FINE_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10,
    30, 60,
)  # fmt: skip
_COARSE_BUCKETS = (0.1, 0.5, 1)
_UNCOUNTED = frozenset(("/metrics", "/health", "/load", "/ping", "/version"))


class HTTPMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "http_requests_total",
            "Requests, by method, status and handler.",
            ("method", "status", "handler"),
            registry=registry,
        )
        self.request_size = Summary(
            "http_request_size_bytes",
            "Content length of requests.",
            ("handler",),
            registry=registry,
        )
        self.response_size = Summary(
            "http_response_size_bytes",
            "Content length of answers; 0 for streams.",
            ("handler",),
            registry=registry,
        )
        self.fine_duration = Histogram(
            "http_request_duration_highr_seconds",
            "Time to answer, in fine buckets and without labels.",
            buckets=_FINE_BUCKETS,
            registry=registry,
        )
        self.duration = Histogram(
            "http_request_duration_seconds",
            "Time to answer, by method and handler.",
            ("method", "handler"),
            buckets=_COARSE_BUCKETS,
            registry=registry,
        )


@cache
def http_metrics(registry: CollectorRegistry) -> HTTPMetrics:
    """The metrics of ``registry``, which may be registered once only."""
    return HTTPMetrics(registry)


def _content_length(headers: list[tuple[bytes, bytes]]) -> int:
    for name, value in headers:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


class HTTPMetricsMiddleware:
    """Counts requests and their times by the route that answers them."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._metrics = http_metrics(registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _UNCOUNTED:
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        status = 500
        size = 0

        async def watch(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                size = _content_length(message.get("headers", []))
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            self._record(scope, status, size, time.perf_counter() - begin)

    def _record(self, scope: Scope, status: int, size: int, seconds: float) -> None:
        # Unknown paths share one label: anybody can make up new ones.
        handler = getattr(scope.get("route"), "path", "none")
        method = scope["method"]
        metrics = self._metrics
        metrics.requests.labels(method, f"{status // 100}xx", handler).inc()
        metrics.request_size.labels(handler).observe(_content_length(scope["headers"]))
        metrics.response_size.labels(handler).observe(size)
        metrics.fine_duration.observe(seconds)
        metrics.duration.labels(method, handler).observe(seconds)


def metrics_response(registry: CollectorRegistry) -> Response:
    """All metrics in Prometheus's text format."""
    return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})
