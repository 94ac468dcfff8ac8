"""The service's metrics, for Prometheus on a port of their own."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from accord.errors import AccordError

_log = logging.getLogger(__name__)

_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
# How old the numbers of campaigns may be: to count them reads all of a campaign's answers. In a large store
# that takes seconds; however often it is scraped, the database does so for a small part of its time.
_KEPT_S = 15.0
_KEPT_TIMES = 50.0

_GAUGES = {
    "answers": "Answers that count",
    "answers_wanted": "Answers wanted in all",
    "leases_held": "Tasks that are with a rater now",
    "leases_expired": "Leases that ran out without an answer",
    "tasks_stuck": "Open tasks whose leases ran out again and again",
    "raters": "Raters who answered",
    "good_ratio": "Share of good among good and bad judgements",
    "agreement_alpha": "Krippendorff's alpha of good and bad judgements",
}

CampaignNumbers = Mapping[str, Mapping[str, float]]
"""By campaign, then by the gauge's name; what is not known is left out."""


class Metrics:
    """What happened in this process, and how the campaigns stand."""

    def __init__(self, read_campaigns: Callable[[], CampaignNumbers]) -> None:
        self.registry = CollectorRegistry()
        self.judgements = self._counter("judgements", "Judgements counted", ("kind", "verdict"))
        self.leases = self._counter("leases", "Tasks handed to raters", ("kind",))
        self.undos = self._counter("undos", "Answers taken back", ())
        self.refusals = self._counter("refusals", "Requests refused", ("reason",))
        self.seconds = Histogram(
            "accord_feedback_operation_seconds",
            "Time that the store took",
            ("operation",),
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self.registry.register(_CampaignCollector(read_campaigns))

    @contextlib.contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Counts the block's time, whether it ends well or not."""
        with self.seconds.labels(operation).time():
            yield

    def count_answer(self, kind: str, verdicts: Sequence[str]) -> None:
        """An answer that was counted, and that was not counted before."""
        for verdict in verdicts:
            self.judgements.labels(kind, verdict).inc()

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(f"accord_feedback_{name}", text, labels, registry=self.registry)


class _CampaignCollector:
    """Reads the campaigns when it is scraped, and at most every `_KEPT_S` seconds."""

    def __init__(self, read: Callable[[], CampaignNumbers]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._kept: CampaignNumbers = {}
        self._until = 0.0

    def describe(self) -> Iterable[Metric]:
        return []  # so that registering does not read the store

    def collect(self) -> Iterable[Metric]:
        numbers = self._numbers()
        for name, text in _GAUGES.items():
            gauge = GaugeMetricFamily(f"accord_feedback_{name}", text, labels=("campaign",))
            for campaign, values in numbers.items():
                if name in values:
                    gauge.add_metric((campaign,), values[name])
            yield gauge

    def _numbers(self) -> CampaignNumbers:
        with self._lock:
            start_s = time.monotonic()
            if start_s >= self._until:
                try:
                    self._kept = self._read()
                except AccordError as error:  # the counters are still worth a scrape
                    _log.warning("the campaigns' metrics are left out: %s", error)
                    self._kept = {}
                end_s = time.monotonic()
                self._until = end_s + max(_KEPT_S, _KEPT_TIMES * (end_s - start_s))
            return self._kept
