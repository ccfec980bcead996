"""`osmium.load` on tiny real models: logits, responses, memory, options."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

import osmium
from osmium import loader
from osmium.config import EngineConfig
from osmium.cuda import select
from osmium.engine.engine import Engine
from osmium.engine.perplexity import perplexity
from osmium.engine.plan import HardwareInfo, MemoryPlan, make_plan
from osmium.engine.request import SamplingParams
from osmium.errors import CheckpointError, ConfigError, DeviceError, NoDevice, OutOfMemory
from osmium.ops import Fill
from osmium.ops.reference import ReferenceOps
from osmium.weights import DEMO, PackedModel, open_model
from tests.engine.fakes import Response
from tests.models.build import CASES, Case, prompt, write_checkpoint
from tests.models.run import make_driver
from tests.server.scripted import TEMPLATE
from tests.text.byte_level import byte_level_json
from tests.tolerance import close, distance

MIXED = CASES[0]

GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=12)


def load(case: Case, folder: Path, **options: Any) -> Engine:
    """An engine of a seeded model, BF16 unless given otherwise."""
    model = folder / case.name
    if not model.exists():
        write_checkpoint(case, model)
    settings = {
        "gpu_expert_bits": 16,
        "context": 256,
        "prefill_chunk": 64,
        "page_size": 16,
        **options,
    }
    engine: Engine = loader.load(model, device="cpu", cache_dir=str(folder / "cache"), **settings)
    return engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    made = load(MIXED, folder)
    yield made
    made.close()


def generate(engine: Engine, ids: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return [token.id for token in engine.generate(ids, params)]


def is_greedy(engine: Engine, ids: list[int], response: list[int]) -> None:
    """Assert that every token of the response is the most likely one, within rounding.

    Other batch shapes sum in another order, and that may change a near-tie.
    """
    rows = engine.logits([*ids, *response])[len(ids) - 1 : -1]
    chosen = rows[np.arange(len(response)), response]
    assert (rows.max(axis=1) - chosen <= 1e-3).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_engine_logits_equal_the_models_logits(folder: Path, case: Case) -> None:
    ids = prompt(case)
    made = load(case, folder)
    got = made.logits(ids.tolist())
    made.close()
    wanted = make_driver(case).logits(ids, len(ids))
    assert close(got, wanted, "logits"), distance(got, wanted)


def test_a_greedy_response_is_the_most_likely_token_at_each_position(engine: Engine) -> None:
    ids = prompt(MIXED).tolist()
    response = generate(engine, ids)
    assert len(response) == 12
    is_greedy(engine, ids, response)


@pytest.mark.parametrize(
    "options", [{"prefill_chunk": 7}, {"page_size": 1}, {"expert_slots": 2}, {"max_num_seqs": 1}]
)
def test_chunk_page_and_cache_sizes_do_not_change_a_response(
    folder: Path, options: dict[str, int]
) -> None:
    ids = prompt(MIXED).tolist()
    plain, other = load(MIXED, folder), load(MIXED, folder, **{"max_num_seqs": 2, **options})
    assert close(other.logits(ids), plain.logits(ids), "logits")
    response = generate(other, ids)
    is_greedy(plain, ids, response)
    plain.close()
    other.close()


def test_the_longest_gap_between_tokens_reaches_the_engine(folder: Path) -> None:
    options: dict[str, Any]
    for options, seconds in (({}, 0.1), ({"decode_gap_ms": 250}, 0.25)):
        with_gap = load(MIXED, folder, **options)
        assert with_gap._passes.decode_gap_s == seconds
        with_gap.close()
    with pytest.raises(
        ConfigError, match="--decode-gap-ms is 0; it must be an integer of at least"
    ):
        EngineConfig(decode_gap_ms=0)


def test_batched_requests_give_greedy_responses(folder: Path) -> None:
    """Ten requests share two sequences' memory: they wait, interleave and are preempted."""
    made = load(MIXED, folder, max_num_seqs=2, prefill_chunk=16)
    rng = np.random.default_rng(5)
    all_prompts = [rng.integers(0, MIXED.vocab, int(n)).tolist() for n in rng.integers(1, 120, 10)]
    responses = [Response() for _ in all_prompts]
    for ids, response in zip(all_prompts, responses, strict=True):
        made.submit(ids, GREEDY, response.on_event)
    for ids, response in zip(all_prompts, responses, strict=True):
        assert response.wait().error is None
        assert len(response.ids) == 12
        is_greedy(made, ids, response.ids)
    made.close()


def test_a_seed_gives_the_same_response_twice(engine: Engine) -> None:
    ids = prompt(MIXED).tolist()
    params = SamplingParams(temperature=1.0, seed=3, ignore_eos=True, max_tokens=30)
    first = generate(engine, ids, params)
    assert generate(engine, ids, params) == first
    other = SamplingParams(temperature=1.0, seed=4, ignore_eos=True, max_tokens=30)
    assert generate(engine, ids, other) != first


def test_perplexity_by_prefill_equals_perplexity_by_decode(engine: Engine) -> None:
    ids = np.random.default_rng(1).integers(0, MIXED.vocab, 330).tolist()
    prefill, decode = (perplexity(engine, ids, 64, path) for path in ("prefill", "decode"))
    assert prefill["tokens"] == decode["tokens"] == 5 * 63
    assert prefill["nll"] == pytest.approx(decode["nll"], rel=1e-5)
    rows = engine.logits(ids[:64]).astype(np.float64)
    logprobs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    first = -float(logprobs[np.arange(63), ids[1:64]].mean())
    assert perplexity(engine, ids[:64], 64)["nll"] == pytest.approx(first, rel=1e-5)


def test_every_routed_expert_is_counted_as_hit_or_miss(folder: Path) -> None:
    made = load(MIXED, folder, expert_slots=4)
    ids = prompt(MIXED).tolist()
    generate(made, ids)
    experts = made.status()["experts"]
    made.close()
    num_computed = len(ids) + 12 - 1  # the last token is not computed
    layers, top_k = len(MIXED.kinds), MIXED.experts[1]
    assert experts["routed"] == num_computed * layers * top_k
    assert experts["hit"] + experts["missed"] == experts["routed"]
    assert 0 < experts["missed"] < experts["routed"]


# -- memory plan -----------------------------------------------------------------------------------


class CountingOps(ReferenceOps):
    """Counts allocated bytes."""

    allocated = 0

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        array = super().empty(shape, dtype)
        type(self).allocated += array.nbytes
        return array

    def empty_mapped(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, fill: Fill | None = None
    ) -> Any:
        array = super().empty_mapped(shape, dtype, fill)
        type(self).allocated += array.nbytes
        return array


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[CountingOps]:
    monkeypatch.setattr(CountingOps, "allocated", 0)
    monkeypatch.setattr(loader, "ReferenceOps", CountingOps)
    return CountingOps


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"expert_slots": 3},
        {"max_num_seqs": 7, "page_size": 5},
        {"prefill_chunk": 128},
        {"kv_dtype": "bf16"},
        {"kv_dtype": "fp8_e4m3"},
    ],
)
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_allocated_bytes_equal_planned_bytes(
    folder: Path, counted: type[CountingOps], case: Case, options: dict[str, Any]
) -> None:
    made = load(case, folder, **options)
    parts = made.plan.ram
    made.close()
    planned = sum(parts[name] for name in ("KV cache", "recurrent state", "workspace", "prefill"))
    planned += parts.get("expert slots", 0)
    assert 0.9 * planned <= counted.allocated <= 1.01 * planned + 8192  # a resident cache's tables


def test_serving_allocates_no_arrays(folder: Path, counted: type[CountingOps]) -> None:
    made = load(MIXED, folder, expert_slots=3)
    before = counted.allocated
    generate(made, prompt(MIXED).tolist())
    made.logits([1, 2, 3])
    made.close()
    assert counted.allocated == before > 0


@pytest.mark.parametrize(
    "options",
    [{"ram": 1}, {"expert_slots": 1}, {"context": 2049}, {"max_num_seqs": 9, "prefill_chunk": 8}],
)
def test_a_refused_plan_allocates_and_reads_nothing(
    folder: Path,
    counted: type[CountingOps],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, int],
) -> None:
    load(MIXED, folder).close()  # packs the model
    counted.allocated = 0
    read: list[str] = []
    for method in ("tensor", "all_packed_experts", "read_packed_experts"):
        monkeypatch.setattr(PackedModel, method, lambda self, *args, m=method: read.append(m))
    with pytest.raises(ConfigError):
        load(MIXED, folder, **options)
    assert counted.allocated == 0
    assert read == []


class Spilling:
    """A GPU that spills these bytes to host memory, one value per attempt."""

    def __init__(self, *spilled: int) -> None:
        self.spilled, self.memory_gb_s = list(spilled), 1500.0
        self.pool = SimpleNamespace(used=0)


def allocate(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *spilled: int
) -> tuple[list[int], list[int], Any]:
    """Planned and allocated slots per attempt, and a function that runs the loader's attempts."""
    attempt = loader.Loader(
        folder / MIXED.name,
        "cpu",
        cache_dir=str(folder / "cache"),
        gpu_expert_bits=16,
        expert_slots=6,
    )
    spilling_gpu = Spilling(*spilled)
    attempt.gpu = cast(Any, spilling_gpu)
    monkeypatch.setattr(loader, "spilled_bytes", lambda gpu: gpu.spilled.pop(0))
    planned, made = [], []

    def plan(packed: Any, options: Any, *rest: Any) -> MemoryPlan:
        planned.append(options.expert_slots)
        hardware_info = HardwareInfo(True, 8 << 30, 8 << 30, 8 << 30, 8 << 30)
        weights = [(name, part.nbytes) for name, part in packed.parts.items()]
        return make_plan(packed.config, packed.layout, weights, options, hardware_info)

    def runner(self: Any, plan: MemoryPlan, options: Any, heat: None) -> Any:
        made.append(plan.expert_slots)
        return SimpleNamespace()

    monkeypatch.setattr(loader, "memory_plan", plan)
    monkeypatch.setattr(loader, "hardware_of", lambda *what: None)
    monkeypatch.setattr(loader.Loader, "_runner", runner)
    first = plan(attempt.packed, attempt.options)
    planned.clear()
    return planned, made, lambda: attempt._allocate(first, attempt.options, None)


def test_spilled_bytes_are_replaced_by_fewer_slots(
    monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(MIXED, folder).close()  # packs the model
    planned, made, run = allocate(monkeypatch, folder, 1000, 0)
    plan, _ = run()
    assert (planned, made, plan.expert_slots) == ([5], [6, 5], 5)
    assert "5 expert slots" in caplog.text and "1500 GB/s" in caplog.text
    planned, made, run = allocate(monkeypatch, folder, 0)
    plan, _ = run()
    assert (planned, made, plan.expert_slots) == ([], [6], 6)


def test_a_driver_that_spills_at_every_attempt_is_an_error(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    load(MIXED, folder).close()
    _, made, run = allocate(monkeypatch, folder, *[100] * 9)
    with pytest.raises(OutOfMemory, match="host memory"):
        run()
    assert len(made) == loader.SPILL_TRIES


# -- options and names -----------------------------------------------------------------------------


def test_an_unknown_option_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_dtipe"):
        loader.load(tmp_path, kv_dtipe="f32")


def test_a_requested_gpu_that_is_missing_raises_no_device(folder: Path) -> None:
    from osmium.cuda.driver import Device

    try:
        Device()
    except NoDevice:
        pass
    else:
        pytest.skip("there is a GPU here")
    with pytest.raises(NoDevice):
        loader.load(folder / MIXED.name, device="gpu")


def test_an_unusable_gpu_does_not_fall_back_to_the_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise DeviceError("cuda-bindings is not installed")

    monkeypatch.setattr(select, "Device", fails)
    with pytest.raises(DeviceError, match="cuda-bindings"):
        loader.load(folder / MIXED.name, device="auto")


@pytest.mark.parametrize(("version", "level"), [(None, "INFO"), (13000, "WARNING")])
def test_using_the_cpu_next_to_an_unsupported_gpu_is_logged(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: int | None,
    level: str,
) -> None:
    def fails() -> None:
        raise NoDevice("GTX 1650 is sm_75; Osmium needs sm_80 (RTX 30 series) or newer.")

    monkeypatch.setattr(select, "Device", fails)
    monkeypatch.setattr(select, "cuda_version", lambda: version)
    caplog.set_level("INFO", logger="osmium.cuda")
    assert select.open_gpu(EngineConfig()) is None
    (record,) = caplog.records
    assert record.levelname == level and "GTX 1650" in record.message
    with pytest.raises(NoDevice):
        select.open_gpu(EngineConfig(device="gpu"))


def test_public_names_exist() -> None:
    for name in osmium.__all__:
        assert getattr(osmium, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        osmium.nothing_of_the_kind  # noqa: B018


def test_importing_the_package_loads_no_numpy() -> None:
    code = "import sys, osmium; print('numpy' in sys.modules, callable(osmium.load))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "True"]


# -- checks before weights -------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the calls that would read weights."""
    read: list[str] = []

    def recorder(method: str) -> Any:
        return lambda self, *args, **named: read.append(method)

    for method in ("tensor", "all_packed_experts", "read_packed_experts", "reading"):
        monkeypatch.setattr(PackedModel, method, recorder(method))
    monkeypatch.setattr("osmium.weights.write_packed", lambda *args: read.append("write_packed"))
    return read


TEXT = {"tokenizer.json": byte_level_json(), "chat_template.jinja": TEMPLATE.encode()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("files", "needs", "named"),
    [
        ({}, ["tokenizer"], "tokenizer.json"),
        ({}, ["tokenizer", "chat_template"], "tokenizer.json"),
        ({"tokenizer.json": TEXT["tokenizer.json"]}, ["tokenizer", "chat_template"], "template"),
        ({**TEXT, "tokenizer.json": b"{}"}, [], "tokenizer.json"),
        ({**TEXT, "chat_template.jinja": b"{% if %}"}, [], "template"),
        ({**TEXT, "tokenizer_config.json": b"[]"}, [], "tokenizer_config.json"),
        ({**TEXT, "generation_config.json": b"{"}, [], "generation_config.json"),
    ],
)
def test_missing_or_damaged_text_files_are_refused_before_weights_are_read(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    packed: bool,
    files: dict[str, bytes],
    needs: Any,
    named: str,
) -> None:
    folder = tmp_path / "model"
    write_checkpoint(MIXED, folder)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    options: dict[str, Any] = {"gpu_expert_bits": 16, "cache_dir": str(tmp_path / "cache")}
    if packed and "generation_config.json" not in files:  # packing reads that one
        open_model(folder, EngineConfig(**options))
    read = request.getfixturevalue("no_weights")
    with pytest.raises(CheckpointError, match=named):
        osmium.load(folder, "cpu", needs=needs, **options)
    assert read == []


def test_a_model_with_text_files_has_a_tokenizer_and_a_template(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_checkpoint(MIXED, folder)
    for name, raw in TEXT.items():
        (folder / name).write_bytes(raw)
    made = osmium.load(
        folder, "cpu", needs=["tokenizer", "chat_template"], gpu_expert_bits=16,
        cache_dir=str(tmp_path),
    )  # fmt: skip
    assert made.tokenizer is not None and made.template is not None
    made.close()


# -- the demo's context ----------------------------------------------------------------------------


def test_the_demo_accepts_a_longer_context_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    made = osmium.load("demo", "cpu", context=32768)
    longer = [attempt % 8000 for attempt in range(4200)]
    response = list(made.generate(longer, SamplingParams(max_tokens=4, ignore_eos=True)))
    made.close()
    assert len(response) == 4
    (warning,) = caplog.records
    assert "32768" in warning.getMessage() and "4096" in warning.getMessage()
    assert made.context == 32768
    caplog.clear()
    made = osmium.load(None, "cpu")
    made.close()
    assert made.context == 4096 and not caplog.records


def test_the_demo_refuses_an_absurd_context() -> None:
    with pytest.raises(ConfigError, match="4096"):
        osmium.load(None, "cpu", context=1 << 30)


def test_other_models_refuse_more_than_their_own_context(tmp_path: Path) -> None:
    copy = tmp_path / "copy.osmium"
    copy.write_bytes(DEMO.read_bytes())
    with pytest.raises(ConfigError, match="32768"):
        osmium.load(copy, "cpu", context=32768)
