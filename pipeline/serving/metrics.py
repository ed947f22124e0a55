"""What Prometheus reads at /metrics."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

if TYPE_CHECKING:
    from pipeline.serving.served_model import ServedModel

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # bounds of the histogram


class Metrics:
    """Counts of requests and images, and what others count or hold."""

    def __init__(self, gauges: dict[str, tuple[str, Callable[[], float]]], counters: Iterable[Counter]) -> None:
        """Make all metrics; `gauges` has a help text and a function by name, and `counters` are those of others."""
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "cxr_requests", "Requests answered, by route and HTTP status.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "cxr_request_seconds", "Seconds until an answer began.", ["route"], registry=registry, buckets=SECONDS
        )
        self.images = Counter(
            "cxr_images",
            "Images by outcome: classified, unusable, timeout (decoding took too long) or crash (of the decoder).",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("classified", "unusable", "timeout", "crash"):
            self.images.labels(outcome)
        for name, (text, read) in gauges.items():
            Gauge(f"cxr_{name}", text, registry=registry).set_function(read)
        for counter in counters:
            registry.register(counter)
        self._model = Info("cxr_model", "The model that answers.", registry=registry)
        ProcessCollector(registry=registry)

    def format(self, served: "ServedModel") -> bytes:
        self._model.info({"model": served.model, "version": served.version})
        return generate_latest(self._registry)
