"""GET /metrics: parsed by Prometheus' own parser, with true values."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

import osmium
from osmium.config import Progress
from osmium.engine.engine import Engine
from osmium.engine.request import Event, Finish, SamplingParams
from osmium.errors import CheckpointError
from osmium.server.app import BackgroundLoader, create_app
from osmium.server.metrics import exposition
from tests.server.scripted import BASE_URL, PATIENCE_S, client_of

ROOT = Path(__file__).resolve().parents[2]


def read(client: TestClient) -> dict[tuple[str, tuple[str, ...]], float]:
    """Samples by name and label values."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_requests_tokens_and_experts_are_counted() -> None:
    engine = osmium.load(
        "synthetic:tiny", device="cpu", expert_slots=4, context=256, prefill_chunk=64
    )

    def load(progress: Progress) -> Engine:
        return engine

    host, done = BackgroundLoader(load), threading.Event()
    host.on_done = done.set
    with TestClient(create_app(host), base_url=BASE_URL) as client:
        assert done.wait(PATIENCE_S)
        before = read(client)
        assert before["osmium_experts_routed_total", ()] == 0
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=9)
        list(engine.generate(list(range(40)), params))
        engine.status()
        after = read(client)
    layers, top_k = engine.config.num_layers, engine.config.top_k
    wanted = {
        "osmium_ready": 1, "osmium_num_requests_running": 0, "osmium_num_requests_waiting": 0,
        "osmium_prompt_tokens_total": 40, "osmium_generation_tokens_total": 9,
        "osmium_inter_token_latency_seconds_count": 8,
        "osmium_time_to_first_token_seconds_count": 1,
        "osmium_experts_routed_total": 48 * layers * top_k,
    }  # fmt: skip
    for name, value in wanted.items():
        assert after[name, ()] == value, name
    assert after["osmium_request_success_total", ("length",)] == 1
    hit, missed = (after[f"osmium_experts_{n}_total", ()] for n in ("hit", "missed"))
    assert hit + missed == after["osmium_experts_routed_total", ()]
    assert after["osmium_expert_hit_rate", ()] == hit / (hit + missed)
    copied = after["osmium_experts_copies_total", ()]
    expert_bytes = engine.runner.expert_runner.cache.layout.nbytes
    assert after["osmium_experts_fetched_bytes_total", ()] == copied * expert_bytes
    assert after["osmium_inter_token_latency_seconds_bucket", ("+Inf",)] == 8
    assert after["osmium_planned_ram_bytes", ("KV cache",)] > 0
    assert after["process_resident_memory_bytes", ()] > 1 << 20


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = osmium.load("synthetic:tiny", device="cpu", context=64, max_num_seqs=1, page_size=16)
    yield made
    made.close()


def families(engine: Engine | None) -> dict[str, Metric]:
    """Families of metrics by name, as a scrape sees them."""
    text = exposition(engine).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_the_exposition_has_the_form_that_promtool_checks(engine: Engine) -> None:
    """Each family once, with help and type; names by unit and kind; buckets that only grow."""
    text = exposition(engine).decode()
    names = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M)
    assert len(names) == len(set(names)) and text.endswith("\n")
    for family in families(engine).values():
        assert family.documentation.endswith("."), family.name
        assert re.fullmatch("[a-z][a-z0-9_]*", family.name)
        samples = [(one.name, tuple(one.labels.items())) for one in family.samples]
        assert len(samples) == len(set(samples)), family.name
        for one in family.samples:
            suffix = one.name.removeprefix(family.name)
            wanted = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count",
                                                                            "_sum")}  # fmt: skip
            assert suffix in wanted[family.type], one.name
        if family.type == "histogram":
            buckets = [one for one in family.samples if one.name.endswith("_bucket")]
            edges = [float(one.labels["le"]) for one in buckets]
            assert edges == sorted(edges) and edges[-1] == float("inf")
            assert [one.value for one in buckets] == sorted(one.value for one in buckets)


def test_the_documented_table_is_the_exposition(engine: Engine) -> None:
    engine.stats.vram = (1, 2)  # as on a GPU
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) \| ([^|]+) \|$", (ROOT / "docs" / "metrics.md").read_text(), re.M
    )
    found = []
    for family in families(engine).values():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found.append((name, family.type, family.documentation))
    assert rows == found


def test_times_and_reasons_of_requests_are_counted(engine: Engine) -> None:
    def values() -> dict[tuple[str, tuple[str, ...]], float]:
        return {
            (one.name, tuple(one.labels.values())): one.value
            for family in families(engine).values()
            for one in family.samples
        }

    before = values()
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=4)
    finish: SimpleQueue[str] = SimpleQueue()

    def on_event(event: Event) -> None:
        if isinstance(event, Finish):
            finish.put(event.reason)

    engine.submit([1, 2, 3], params, on_event)
    assert finish.get(timeout=PATIENCE_S) == "length"
    blocker = threading.Event()
    held = threading.Thread(target=engine.run_on_engine_thread, args=(blocker.wait,))
    held.start()
    waiting = engine.submit([1, 2, 3], params, on_event)
    engine.cancel(waiting)
    blocker.set()
    held.join(PATIENCE_S)
    assert finish.get(timeout=PATIENCE_S) == "cancelled"
    engine.status()
    after = values()

    def grown(name: str, *labels: str) -> float:
        return after[name, labels] - before[name, labels]

    assert grown("osmium_request_success_total", "length") == 1
    assert grown("osmium_request_success_total", "abort") == 1
    assert grown("osmium_e2e_request_latency_seconds_count") == 2
    for name in ("queue", "prefill", "decode"):
        assert grown(f"osmium_request_{name}_time_seconds_count") == 1
        assert grown(f"osmium_request_{name}_time_seconds_sum") > 0
    parts = sum(
        grown(f"osmium_request_{name}_time_seconds_sum") for name in ("queue", "prefill", "decode")
    )
    assert parts <= grown("osmium_e2e_request_latency_seconds_sum")
    assert after["osmium_prefill_tokens_per_second", ()] > 0
    assert after["osmium_kv_cache_usage_perc", ()] == 0


def test_kv_cache_usage_is_a_fraction_of_pages(engine: Engine) -> None:
    usage: list[float] = []

    done = threading.Event()

    def on_event(event: Event) -> None:
        usage.append(engine.stats.scheduler.kv_cache.usage)
        if isinstance(event, Finish):
            done.set()

    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=2)
    engine.submit([5] * 20, params, on_event)
    assert done.wait(PATIENCE_S)
    assert usage[0] == 2 / engine.status()["pages"], "20 tokens are in two pages of 16"
    assert usage[-1] == 0


def test_the_served_name_and_the_version_are_labels(engine: Engine) -> None:
    (sample,) = families(engine)["osmium_info"].samples
    assert sample.labels == {"version": osmium.__version__, "model_name": engine.name}
    text = exposition(engine, "mine").decode()
    assert 'model_name="mine"' in text


def test_without_an_engine_ready_is_zero() -> None:
    with client_of(CheckpointError("model-00002 is missing")) as client:
        assert read(client)["osmium_ready", ()] == 0


def test_an_api_key_protects_the_metrics() -> None:
    with client_of(CheckpointError("none"), api_key="k") as client:
        assert client.get("/metrics").status_code == 401
        answer: Any = client.get("/metrics", headers={"Authorization": "Bearer k"})
        assert answer.status_code == 200
