"""GET /metrics: the engine's counters in the Prometheus text format.

A scrape only formats the engine's counters.  After the first scrape the engine reads the expert
counters once a second.  Metrics that vLLM has, too, have its names and units after `osmium_`.
docs/metrics.md lists all of them.
"""

from collections.abc import Iterator
from contextlib import suppress

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

import osmium
from osmium.engine.engine import Engine
from osmium.engine.request import FinishReason
from osmium.engine.stats import EngineStats, Histogram

__all__ = ["CONTENT_TYPE", "POLL_INTERVAL_S", "exposition"]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

FINISHED_REASONS = {
    FinishReason.STOP: "stop", FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort", FinishReason.ERROR: "error",
}  # fmt: skip
"""vLLM's names of finish reasons."""

POLL_INTERVAL_S = 1.0
"""Seconds between reads of the expert counters after the first scrape."""


def exposition(engine: Engine | None, name: str | None = None) -> bytes:
    """The metrics' text; without an engine, osmium_ready 0 and the process's memory.

    `name` is the served model's.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_EngineCollector(engine, name))
    return generate_latest(registry)


class _EngineCollector(Collector):
    """An engine's counters as families of metrics."""

    def __init__(self, engine: Engine | None, name: str | None) -> None:
        self._engine, self._name = engine, name

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        ready = engine is not None and engine.stopped is None
        yield GaugeMetricFamily("osmium_ready", "1 while requests are served, else 0.", ready)
        with suppress(OSError):  # without file descriptors /proc cannot be read
            yield GaugeMetricFamily(
                "process_resident_memory_bytes", "Resident memory of the server process.",
                psutil.Process().memory_info().rss,
            )  # fmt: skip
        info = GaugeMetricFamily(
            "osmium_info", "Always 1; the labels are the version and the served model.",
            labels=["version", "model_name"],
        )  # fmt: skip
        if engine is None:
            info.add_metric([osmium.__version__, ""], 1)
            yield info
            return
        info.add_metric([osmium.__version__, self._name or engine.name], 1)
        yield info
        meter = engine.stats
        if meter.poll_interval_s is None or meter.poll_interval_s > POLL_INTERVAL_S:
            meter.poll_interval_s = POLL_INTERVAL_S
        yield from _requests(meter)
        yield from _experts(meter)
        yield from _memory(engine)


def _requests(meter: EngineStats) -> Iterator[Metric]:
    scheduler = meter.scheduler
    for name, text, value in (
        ("osmium_num_requests_running", "Requests in prefill or decode.", len(scheduler.running)),
        ("osmium_num_requests_waiting", "Requests in the queue.", len(scheduler.waiting)),
        (
            "osmium_kv_cache_usage_perc",
            "Allocated KV pages / all, 0 to 1.",
            scheduler.kv_cache.usage,
        ),
        ("osmium_prefill_tokens_per_second", "Rate of the newest prefill.", meter.prefill_tokens_s),
    ):
        yield GaugeMetricFamily(name, text, value)
    finished = CounterMetricFamily(
        "osmium_request_success_total",
        "Finished requests by finish reason.",
        labels=["finished_reason"],
    )
    for reason, count in meter.finished.items():
        finished.add_metric([FINISHED_REASONS[reason]], count)
    yield finished
    for name, text, count in (
        ("osmium_prompt_tokens_total", "Prompt tokens computed.", meter.tokens["prompt"]),
        ("osmium_generation_tokens_total", "Generated tokens.", meter.tokens["completion"]),
        (
            "osmium_num_preemptions_total",
            "Times that a request lost its KV pages.",
            scheduler.preemptions,
        ),
        (
            "osmium_prefix_cache_queries_total",
            "Prompt tokens looked up in a prefix cache; there is none.",
            0,
        ),
        (
            "osmium_prefix_cache_hits_total",
            "Prompt tokens found in a prefix cache; there is none.",
            0,
        ),
    ):
        yield CounterMetricFamily(name, text, count)
    for name, text, values in (
        (
            "osmium_inter_token_latency_seconds",
            "Time between two tokens of a response.",
            meter.itl_s,
        ),
        (
            "osmium_time_to_first_token_seconds",
            "Time from a request to its first token.",
            meter.ttft_s,
        ),
        ("osmium_e2e_request_latency_seconds", "Time from a request to its end.", meter.e2e_s),
        (
            "osmium_request_queue_time_seconds",
            "Time from a request to its first step.",
            meter.queue_s,
        ),
        (
            "osmium_request_prefill_time_seconds",
            "Time from the first step to the first token.",
            meter.prefill_s,
        ),
        (
            "osmium_request_decode_time_seconds",
            "Time from the first token to the last.",
            meter.decode_s,
        ),
    ):
        yield _histogram(name, text, values)


def _experts(meter: EngineStats) -> Iterator[Metric]:
    experts, nbytes = meter.experts, meter.expert_bytes
    link = meter.fetch_gb_s if meter.scheduler.running else 0.0
    for name, text, count in (
        ("osmium_experts_routed_total", "Routed (token, expert) pairs.", experts.routed),
        ("osmium_experts_hit_total", "Routed pairs whose expert was in a VRAM slot.", experts.hit),
        (
            "osmium_experts_missed_total",
            "Routed pairs whose expert was not in a VRAM slot.",
            experts.missed,
        ),
        (
            "osmium_experts_copies_total",
            "Experts copied from host memory to VRAM.",
            experts.experts_copied,
        ),
        (
            "osmium_experts_fetched_bytes_total",
            "Bytes of experts copied from host memory to VRAM.",
            experts.experts_copied * nbytes,
        ),
        ("osmium_experts_prefetched_total", "Experts chosen for prefetch.", experts.prefetched),
        (
            "osmium_experts_prefetch_hits_total",
            "Prefetched experts that the next layer then used.",
            experts.prefetch_hits,
        ),
        (
            "osmium_experts_prefetch_bytes_total",
            "Bytes of prefetch hits copied before their layer ran.",
            experts.prefetch_bytes,
        ),
    ):
        yield CounterMetricFamily(name, text, count)
    yield GaugeMetricFamily(
        "osmium_expert_hit_rate", "Fraction of routed pairs that hit, 0 to 1.",
        experts.hit / experts.routed if experts.routed else 1.0,
    )  # fmt: skip
    yield GaugeMetricFamily(
        "osmium_link_measured_bytes_per_second", "PCIe bandwidth measured at start.",
        meter.link_gb_s * 1e9,
    )  # fmt: skip
    yield GaugeMetricFamily(
        "osmium_link_bytes_per_second", "PCIe throughput of expert copies in the last interval.",
        link * 1e9,
    )  # fmt: skip
    yield GaugeMetricFamily(
        "osmium_link_utilization_ratio", "PCIe throughput / measured bandwidth, 0 to 1.",
        link / meter.link_gb_s if meter.link_gb_s else 0.0,
    )  # fmt: skip


def _memory(engine: Engine) -> Iterator[Metric]:
    plan = engine.plan
    if plan is None:
        return
    for name, parts in (
        ("osmium_planned_vram_bytes", plan.vram), ("osmium_planned_ram_bytes", plan.ram),
    ):  # fmt: skip
        family = GaugeMetricFamily(name, "Planned memory by purpose.", labels=["part"])
        for part, nbytes in parts.items():
            family.add_metric([part], nbytes)
        yield family
    if engine.stats.vram is not None:
        free, total = engine.stats.vram
        yield GaugeMetricFamily("osmium_vram_free_bytes", "Free VRAM of the GPU.", free)
        yield GaugeMetricFamily("osmium_vram_total_bytes", "Total VRAM of the GPU.", total)


def _histogram(name: str, text: str, values: Histogram) -> Metric:
    buckets, cumulative = [], 0
    for edge, count in zip((*values.edges, float("inf")), tuple(values.counts), strict=True):
        cumulative += count
        buckets.append(("+Inf" if edge == float("inf") else str(edge), float(cumulative)))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=values.sum)
