"""What Prometheus reads: counts and times, never a text."""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable with the folder in which several workers count; prometheus_client reads it when it is imported."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Counters:
    """The proxy's own registry, so that several proxies in one process do not meet."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("davsp_requests", "Chat requests by final status.", ["status"], registry=registry)
        self.refused = Counter(
            "davsp_refused", "Requests without an answer, by error code.", ["code"], registry=registry
        )
        self.pictures = Counter("davsp_pictures", "Pictures that were defended.", registry=registry)
        self.gate = Counter(
            "davsp_gate", "Requests that a gate looked at, by the road taken.", ["road"], registry=registry
        )
        self.under_way = Gauge(
            "davsp_under_way", "Chat requests under way.", registry=registry, multiprocess_mode="livesum"
        )
        self.defense = Histogram(
            "davsp_defense_seconds", "From a body read to its defended form.", buckets=SECONDS, registry=registry
        )
        self.upstream = Histogram(
            "davsp_upstream_seconds",
            "From the defended form to the upstream's head.",
            buckets=SECONDS,
            registry=registry,
        )

    def page(self) -> bytes:
        """In Prometheus' text format; with several workers the sums over all of them, whichever is asked."""
        if FOLDER not in os.environ:
            return generate_latest(self.registry)
        everyone = CollectorRegistry()
        MultiProcessCollector(everyone)
        return generate_latest(everyone)
