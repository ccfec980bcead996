"""GET /metrics: what the engine's meter counts, in Prometheus' text form.

Made when somebody asks, of numbers that are there anyway; the first who asks has the experts'
counters looked at once a second from then on.  Names and units follow Prometheus' conventions:
seconds, bytes, _total for what only rises.
"""

from collections.abc import Iterator

import psutil
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from osmium.engine.engine import Engine
from osmium.engine.meter import Histogram, Meter

__all__ = ["CONTENT_TYPE", "EVERY_S", "exposition"]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

EVERY_S = 1.0
"""Seconds between looks at the experts' counters once somebody has asked."""


def exposition(engine: Engine | None) -> bytes:
    """The text; without an engine, that there is none."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(engine))
    return generate_latest(registry)


class _Collected(Collector):
    """An engine's numbers as families of metrics."""

    def __init__(self, engine: Engine | None) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        ready = engine is not None and engine.stopped is None
        yield GaugeMetricFamily("osmium_ready", "1 while requests are served.", ready)
        yield GaugeMetricFamily(
            "osmium_ram_bytes", "Resident host memory of this process.",
            psutil.Process().memory_info().rss,
        )  # fmt: skip
        if engine is None:
            return
        meter = engine.meter
        if meter.every is None or meter.every > EVERY_S:
            meter.every = EVERY_S
        yield from _requests(meter)
        yield from _experts(meter)
        yield from _memory(engine)


def _requests(meter: Meter) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "osmium_requests_running", "Requests that are read or answered.",
        len(meter.scheduler.running),
    )  # fmt: skip
    yield GaugeMetricFamily(
        "osmium_requests_waiting", "Requests that wait for room.", len(meter.scheduler.waiting)
    )
    finished = CounterMetricFamily(
        "osmium_requests_finished", "Requests that are over, by why.", labels=["reason"]
    )
    for reason, count in meter.finished.items():
        finished.add_metric([str(reason)], count)
    yield finished
    yield CounterMetricFamily(
        "osmium_prompt_tokens", "Tokens of prompts that were read.", meter.tokens["prompt"]
    )
    yield CounterMetricFamily(
        "osmium_generated_tokens", "Tokens that were said.", meter.tokens["completion"]
    )
    yield _histogram("osmium_token_seconds", "From a reply's token to its next.", meter.token_s)
    yield _histogram(
        "osmium_first_token_seconds", "From a request to its first token.", meter.first_s
    )


def _experts(meter: Meter) -> Iterator[Metric]:
    experts, nbytes = meter.experts, meter.record_bytes
    link = meter.link_now if meter.scheduler.running else 0.0
    for name, text, count in (
        ("routed", "Pairs of a token and an expert that were asked for.", experts.routed),
        ("hit", "Pairs whose expert was in VRAM.", experts.hit),
        ("fetched", "Pairs whose expert was fetched.", experts.fetched),
        ("copied", "Records copied from host memory to VRAM.", experts.copied),
        ("fetched_bytes", "Bytes of these records.", experts.copied * nbytes),
        ("guessed", "Experts to be fetched before anyone asked.", experts.guessed),
        ("guessed_right", "Those of them that were then asked for.", experts.right),
        ("early_bytes", "Bytes of these that had come by then.", experts.early),
    ):
        yield CounterMetricFamily(f"osmium_experts_{name}", text, count)
    yield GaugeMetricFamily(
        "osmium_expert_hit_rate", "Share of all pairs so far that hit.",
        experts.hit / experts.routed if experts.routed else 1.0,
    )  # fmt: skip
    yield GaugeMetricFamily(
        "osmium_link_measured_bytes_per_second", "What the link carried when it was measured.",
        meter.link_gb_s * 1e9,
    )  # fmt: skip
    yield GaugeMetricFamily(
        "osmium_link_bytes_per_second", "Fetched over the link, between the last two looks.",
        link * 1e9,
    )  # fmt: skip
    yield GaugeMetricFamily(
        "osmium_link_share", "That, as a share of what was measured.",
        link / meter.link_gb_s if meter.link_gb_s else 0.0,
    )  # fmt: skip


def _memory(engine: Engine) -> Iterator[Metric]:
    plan = engine.plan
    if plan is None:
        return
    for name, parts in (("vram", plan.vram), ("ram", plan.ram)):
        family = GaugeMetricFamily(
            f"osmium_planned_{name}_bytes", "Planned before loading, by what for.", labels=["part"]
        )
        for part, nbytes in parts.items():
            family.add_metric([part], nbytes)
        yield family
    if engine.meter.vram is not None:
        free, total = engine.meter.vram
        yield GaugeMetricFamily("osmium_vram_free_bytes", "Free on the GPU, for anyone.", free)
        yield GaugeMetricFamily("osmium_vram_total_bytes", "All of the GPU's memory.", total)


def _histogram(name: str, text: str, values: Histogram) -> Metric:
    buckets, below = [], 0
    for edge, count in zip((*values.edges, float("inf")), tuple(values.counts), strict=True):
        below += count
        buckets.append(("+Inf" if edge == float("inf") else str(edge), float(below)))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=values.sum)
