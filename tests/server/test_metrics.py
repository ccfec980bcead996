"""GET /metrics: parsed by Prometheus' own parser, with true values."""

import threading
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

import osmium
from osmium.config import Progress
from osmium.engine.engine import Engine
from osmium.engine.request import SamplingParams
from osmium.errors import CheckpointError
from osmium.server.app import BackgroundLoader, create_app
from tests.server.scripted import BASE_URL, PATIENCE_S, client_of


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
        "osmium_ready": 1, "osmium_requests_running": 0, "osmium_requests_waiting": 0,
        "osmium_prompt_tokens_total": 40, "osmium_generated_tokens_total": 9,
        "osmium_inter_token_latency_seconds_count": 8,
        "osmium_time_to_first_token_seconds_count": 1,
        "osmium_experts_routed_total": 48 * layers * top_k,
    }  # fmt: skip
    for name, value in wanted.items():
        assert after[name, ()] == value, name
    assert after["osmium_requests_finished_total", ("length",)] == 1
    hit, missed = (after[f"osmium_experts_{n}_total", ()] for n in ("hit", "missed"))
    assert hit + missed == after["osmium_experts_routed_total", ()]
    assert after["osmium_expert_hit_rate", ()] == hit / (hit + missed)
    copied = after["osmium_experts_copies_total", ()]
    expert_bytes = engine.runner.expert_runner.cache.layout.nbytes
    assert after["osmium_experts_fetched_bytes_total", ()] == copied * expert_bytes
    assert after["osmium_inter_token_latency_seconds_bucket", ("+Inf",)] == 8
    assert after["osmium_planned_ram_bytes", ("KV cache",)] > 0
    assert after["process_resident_memory_bytes", ()] > 1 << 20


def test_without_an_engine_ready_is_zero() -> None:
    with client_of(CheckpointError("model-00002 is missing")) as client:
        assert read(client)["osmium_ready", ()] == 0


def test_an_api_key_protects_the_metrics() -> None:
    with client_of(CheckpointError("none"), api_key="k") as client:
        assert client.get("/metrics").status_code == 401
        answer: Any = client.get("/metrics", headers={"Authorization": "Bearer k"})
        assert answer.status_code == 200
