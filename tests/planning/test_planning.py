"""`osmium plan`: equal to what loading does, also for other machines, with valid suggestions."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from osmium import loader
from osmium.config import EngineConfig
from osmium.engine.plan import CUDA_CONTEXT_BYTES, DoesNotFit, HardwareInfo, MemoryPlan
from osmium.errors import ConfigError
from osmium.planning import hardware as planned_hardware
from osmium.planning import memory_plan, plan_for, plan_report
from osmium.planning.alternatives import SMALLER, plan_shapes
from osmium.planning.report import PlanReport
from osmium.planning.text import WIDTH, report_text
from osmium.weights import ModelInfo, inspect_model, open_model, shapes_info
from osmium.weights.checkpoint import Formats
from osmium.weights.synthetic import open_synthetic
from tests.engine.fake_gpu import FakeGpu
from tests.weights.files import write
from tests.weights.stand_in_hub import StandInHub, folder_files, use

GIB = 1 << 30

LARGE, SMALL = (f"synthetic:{name}" for name in SMALLER)

HUB = "owner/Small-7B-A1B"

OPTIONS: dict[str, Any] = {"context": 256, "page_size": 16, "prefill_chunk": 64, "ram": 2 * GIB}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("planning") / "model", shards=2)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInHub]:
    with StandInHub({HUB: folder_files(folder)}) as made:
        use(monkeypatch, made, tmp_path / "hub")
        yield made


def listing(*folders: Path) -> dict[str, float]:
    """Every file in these folders, with its modification time."""
    return {
        str(path): path.stat().st_mtime_ns
        for folder in folders
        for path in [folder, *folder.rglob("*")]
        if path.exists()
    }


def report(model: str, **options: Any) -> PlanReport:
    return plan_report(model, **options)


# -- equal to loading ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_plans_of_a_folder_and_of_the_hub_equal_the_loaded_plan(
    device: str,
    folder: Path,
    hub: StandInHub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if device == "gpu":
        FakeGpu(4 << 30).install(monkeypatch)
    more = {**OPTIONS, "cache_dir": str(tmp_path / "cache"), "expert_slots": 3,
            "gpu_expert_bits": 16}  # fmt: skip
    plans = [plan_for(model, device, **more) for model in (folder, HUB)]
    assert hub.tensor_bytes == 0 and not (tmp_path / "cache").exists()
    engine = loader.load(folder, device, **more)
    loaded = engine.plan
    engine.close()
    packed = open_model(folder, EngineConfig(cache_dir=str(tmp_path / "cache"), gpu_expert_bits=16))
    plans += [plan_for(folder, device, **more), plan_for(packed.path, device, **more)]
    assert isinstance(loaded, MemoryPlan)
    assert plans == [loaded] * 4


def test_a_plan_of_a_folder_writes_nothing(folder: Path, tmp_path: Path) -> None:
    before = listing(folder, tmp_path)
    found = report(str(folder), cache_dir=str(tmp_path / "cache"), device="cpu")
    assert found.plan is not None and not found.model.is_packed
    assert listing(folder, tmp_path) == before


@pytest.mark.parametrize("name", [None, "synthetic:tiny:3"])
def test_the_demo_and_synthetic_models_are_planned_without_files(
    name: str | None, tmp_path: Path
) -> None:
    found = plan_report(name, device="cpu", cache_dir=str(tmp_path / "cache"))
    assert found.plan is not None and not list(tmp_path.iterdir())


def test_the_demo_is_planned_beyond_its_trained_context() -> None:
    found = plan_report("demo", device="cpu", context=32768)
    assert found.plan is not None and found.plan.context == 32768


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_model_that_cannot_fit_is_neither_packed_nor_downloaded(
    where: str, folder: Path, hub: StandInHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(planned_hardware, "available_ram", lambda: (100_000, 0))
    options = {**OPTIONS, "ram": None, "cache_dir": str(tmp_path / "cache")}
    for start in (loader.load, loader.Loader):
        with pytest.raises(DoesNotFit, match="host memory"):
            start(folder if where == "folder" else HUB, "cpu", **options)
    assert hub.tensor_bytes == 0
    assert not list((tmp_path / "cache").glob("*.osmium"))


def test_a_loader_packs_when_a_smaller_context_would_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A benchmark gives each engine its own context, so the default's need not fit."""
    fits = sum(plan_for(folder, "cpu", **OPTIONS).ram.values())
    monkeypatch.setattr(planned_hardware, "available_ram", lambda: (fits, 0))
    options = {**OPTIONS, "ram": None, "context": 2048, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(DoesNotFit):
        loader.load(folder, "cpu", **options)
    assert not list((tmp_path / "cache").glob("*.osmium"))
    made = loader.Loader(folder, "cpu", **options)
    made.engine(context=256).close()
    made.close()


# -- other machines --------------------------------------------------------------------------------


def test_a_named_gpu_is_planned_without_a_local_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(config: EngineConfig) -> None:
        raise AssertionError("this machine's GPU is not opened")

    monkeypatch.setattr(planned_hardware, "open_gpu", none)
    found = report(LARGE, gpu="RTX 4090", ram=64 * GIB)
    assert found.hardware.name == "RTX 4090" and found.plan is not None
    assert found.plan.vram_limit == found.hardware.vram_total
    assert "by its specification" in found.assumptions[0] and len(found.assumptions) == 1
    assert found.plan.expected_tokens_per_s is not None


def test_each_vram_size_has_its_plan_without_a_gpu() -> None:
    plans = [plan_for(SMALL, vram=gib * GIB, ram=64 * GIB) for gib in (8, 12, 24, 32)]
    assert len({plan.expert_slots for plan in plans}) == 3  # 24 and 32 GiB hold every expert
    assert [plan.vram_limit for plan in plans] == [gib * GIB for gib in (8, 12, 24, 32)]
    speeds = [plan.expected_tokens_per_s or 0 for plan in plans]
    assert speeds == sorted(speeds) and speeds[0] > 0
    (said,) = report(SMALL, vram=12 * GIB, ram=64 * GIB).assumptions
    for word in ("no GPU here", "12 GiB", "500 GB/s", "PCIe 4.0", "--gpu"):
        assert word in said


def test_without_a_gpu_the_cpu_is_planned_with_a_hint_at_flags() -> None:
    found = plan_report(None)
    assert found.plan is not None and found.plan.device == "cpu"
    assert found.plan.expected_tokens_per_s is None
    assert "--gpu" in found.assumptions[0]
    assert plan_report(None, "cpu").assumptions == ()


def test_vram_of_a_named_gpu_is_limited_by_its_memory() -> None:
    assert plan_for(SMALL, gpu="4090", vram=12 * GIB, ram=64 * GIB).vram_limit == 12 * GIB
    with pytest.raises(ConfigError, match=r"--vram is 30\.00 GiB, 23\.52 GiB"):
        plan_for(SMALL, gpu="4090", vram=30 * GIB)


def test_ram_defaults_to_this_machines_and_the_report_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planned_hardware, "available_ram", lambda: (100 * GIB, 128 * GIB))
    found = report(LARGE, gpu="5090")
    assert found.plan is not None and found.plan.ram_limit == 100 * GIB - 128 * GIB // 10
    assert "128.0 GiB" in found.assumptions[1] and "--ram" in found.assumptions[1]
    assert report(LARGE, gpu="5090", ram=96 * GIB).plan is not None


def test_the_link_rate_can_be_set() -> None:
    speeds = [
        plan_for(LARGE, gpu="5090", ram=96 * GIB, link_gb_s=link).expected_tokens_per_s or 0
        for link in (12, 25, 53)
    ]
    assert speeds == sorted(speeds) and speeds[2] > 1.5 * speeds[0]
    assert speeds[2] == plan_for(LARGE, gpu="5090", ram=96 * GIB).expected_tokens_per_s
    for bad in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(ConfigError, match="--link"):
            plan_for(LARGE, gpu="5090", link_gb_s=bad)


def test_the_link_rate_of_the_local_gpu_can_be_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeGpu(4 << 30).install(monkeypatch)
    found = plan_report(folder, link_gb_s=12.5, **OPTIONS)
    assert found.hardware.link_gb_s == 12.5 and found.assumptions == ("a link of 12.5 GB/s",)


def test_a_named_gpu_with_the_cpu_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="contradict"):
        plan_for(SMALL, "cpu", gpu="4090")


# -- answers ---------------------------------------------------------------------------------------


def test_the_longest_context_fits_and_a_page_more_does_not() -> None:
    cases: list[dict[str, Any]] = [
        {"gpu": "3060 12GB"},
        {"gpu": "4090"},
        {"gpu": "4090", "kv_cache_mb": 300},
    ]
    for options in cases:
        common: dict[str, Any] = {**options, "ram": 64 * GIB, "attention_quant": "int4"}
        found = report(LARGE, **common)
        most = found.max_context
        assert found.plan is not None and most >= found.plan.context
        wide = {key: value for key, value in common.items() if key != "kv_cache_mb"}
        at_most = plan_for(LARGE, context=most, **wide)
        assert at_most.tokens_per_s_at(most) == found.max_context_tokens_per_s
        if most < 262144 and "kv_cache_mb" not in options:
            with pytest.raises(DoesNotFit):
                plan_for(LARGE, context=most + 64, **wide)
    tight = report(LARGE, gpu="3060 12GB", vram=9 * GIB, ram=64 * GIB, attention_quant="int4")
    assert 2048 < tight.max_context < 262144
    with pytest.raises(DoesNotFit):
        plan_for(
            LARGE, gpu="3060 12GB", vram=9 * GIB, ram=64 * GIB, attention_quant="int4",
            context=tight.max_context + 64,
        )  # fmt: skip


def test_the_bottleneck_is_the_largest_part_of_the_time() -> None:
    streaming = report(LARGE, gpu="RTX 4060 Ti 16GB", ram=64 * GIB, attention_quant="int4")
    assert streaming.binds == "link"
    assert report(SMALL, gpu="RTX A6000", ram=64 * GIB).binds == "vram"
    assert report(SMALL, gpu="H200", ram=64 * GIB, attention_quant="int4").binds == "overhead"
    assert report(LARGE, gpu="3060 12GB", ram=64 * GIB).binds == "memory"


def test_every_suggested_change_is_faster_and_valid() -> None:
    found = report(LARGE, gpu="4090", ram=64 * GIB)
    assert found.plan is not None and found.plan.expected_tokens_per_s is not None
    names = [change.name for change in found.changes]
    assert names[0] == "+1 GiB of VRAM" and "--attention-quant int4" in names
    assert any("PCIe 5.0" in name for name in names) and "RTX 5090" in names
    for change in found.changes:
        assert (change.tokens_per_s or 0) > found.plan.expected_tokens_per_s
    quant = next(one for one in found.changes if one.name == "--attention-quant int4")
    planned = plan_for(LARGE, gpu="4090", ram=64 * GIB, attention_quant="int4")
    assert (quant.expert_slots, quant.tokens_per_s) == (
        planned.expert_slots, planned.expected_tokens_per_s,
    )  # fmt: skip
    card = next(one for one in found.changes if one.name == "RTX 5090")
    assert card.tokens_per_s == plan_for(LARGE, gpu="5090", ram=64 * GIB).expected_tokens_per_s


def test_a_resident_model_has_no_link_bottleneck() -> None:
    found = report(SMALL, gpu="4090", ram=64 * GIB)
    assert found.plan is not None and found.plan.resident
    assert "host experts" not in found.plan.ram
    assert not [one for one in found.changes if "PCIe" in one.name or "+1 GiB" in one.name]


# -- refusals --------------------------------------------------------------------------------------


def options_of(name: str) -> dict[str, Any]:
    """A suggestion's flags as options."""
    words = name.split()
    return {
        flag.removeprefix("--").replace("-", "_"): int(value) if value.isdigit() else value
        for flag, value in zip(words[::2], words[1::2], strict=False)
        if flag.startswith("--")
    }


def fits_on(card: HardwareInfo, model: ModelInfo, config: EngineConfig) -> bool:
    try:
        plan_shapes(model, config, card)
    except DoesNotFit:
        return False
    return True


@pytest.mark.parametrize(
    "misfit",
    [
        {"model": LARGE, "gpu": "3060 12GB", "ram": 64 * GIB},
        {"model": LARGE, "gpu": "RTX 3070", "ram": 64 * GIB},
        {"model": LARGE, "gpu": "RTX 5090", "ram": 48 * GIB},
        {"model": LARGE, "gpu": "RTX 5090", "ram": 64 * GIB, "gpu_expert_bits": 8},
        {"model": LARGE, "gpu": "RTX 5090", "ram": 96 * GIB, "gpu_expert_bits": 16},
        {"model": SMALL, "gpu": "RTX 3060 Laptop", "ram": 32 * GIB, "context": 262144},
        {"model": SMALL, "gpu": "RTX 3060 Laptop", "ram": 8 * GIB},
        {"model": LARGE, "ram": 64 * GIB},
        {"model": "synthetic:qwen3.5-397b-a17b", "gpu": "H200", "ram": 128 * GIB},
        {"model": SMALL, "gpu": "RTX 3060 Laptop", "ram": 32 * GIB, "vram": 2 * GIB},
    ],
    ids=lambda misfit: "-".join(map(str, misfit.values())),
)
def test_every_suggestion_for_a_misfit_fits(misfit: dict[str, Any]) -> None:
    """Each suggestion, used as printed, gives a valid plan; none is redundant."""
    model = misfit.pop("model")
    found = report(model, **misfit)
    assert found.plan is None and found.misfit is not None
    assert found.misfit.need > found.misfit.limit
    for change in found.changes:
        if change.name.startswith("--"):
            plan_for(model, **{**misfit, **options_of(change.name)})
            assert options_of(change.name).items() - misfit.items()
        elif change.name.startswith("a GPU with"):
            gib = int(change.name.split()[3])
            config = EngineConfig(**{k: v for k, v in misfit.items() if k != "gpu"})
            shapes = inspect_model(model, config)
            for size, fits in ((gib, True), (gib - 1, False)):
                free, total = size * GIB - CUDA_CONTEXT_BYTES, size * GIB
                card = replace(found.hardware, vram_free=free, vram_total=total)
                budget = config if config.vram is None else replace(config, vram=size * GIB)
                assert fits_on(card, shapes, budget) is fits
        elif "host memory" in change.name:
            gib = int(change.name.split()[0])
            plan_for(model, **{**misfit, "ram": gib * GIB})
            with pytest.raises(DoesNotFit):
                plan_for(model, **{**misfit, "ram": (gib - 1) * GIB})
        else:
            (shape,) = [name for name in SMALLER if name in f"synthetic:{change.name.lower()}"
                        .replace("qwen/", "")]  # fmt: skip
            plan_for(f"synthetic:{shape}", **misfit)


def test_lowering_the_lowest_bit_width_is_not_suggested() -> None:
    found = report(LARGE, ram=64 * GIB)
    assert found.misfit is not None
    text = report_text(found)
    assert "--gpu-expert-bits" not in text
    names = [change.name for change in found.changes]
    assert names == ["73 GiB of host memory", "Qwen/Qwen3.5-35B-A3B"]


def test_ram_reserved_for_other_programs_is_suggested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planned_hardware, "available_ram", lambda: (60 * GIB, 63 * GIB))
    found = report(LARGE, gpu="4090")
    assert found.plan is None
    assert found.changes[0].name.startswith("--ram 58G")
    assert plan_for(LARGE, gpu="4090", ram=58 * GIB).expert_slots == found.changes[0].expert_slots
    monkeypatch.setattr(planned_hardware, "available_ram", lambda: (57 * GIB, 63 * GIB))
    assert not [c for c in report(LARGE, gpu="4090").changes if "--ram" in c.name]


def test_a_refused_load_suggests_only_what_helps() -> None:
    card = HardwareInfo(True, 11 * GIB, 24 * GIB, 90 * GIB, 96 * GIB)
    config = EngineConfig()
    model = inspect_model(LARGE, config)
    with pytest.raises(DoesNotFit, match=r"--attention-quant int8.*other programs closed.*12\.41"):
        memory_plan(model, config, card)
    quantized = replace(config, attention_quant="int4", context=262144)
    shapes = shapes_info("", model.config, Formats.of(quantized))
    with pytest.raises(DoesNotFit) as refused:
        memory_plan(shapes, quantized, replace(card, vram_free=8 * GIB, vram_total=9 * GIB))
    assert "--attention-quant int4;" not in str(refused.value)
    assert "--context" in str(refused.value) and "other programs" not in str(refused.value)


def test_a_packed_file_keeps_its_formats(folder: Path, tmp_path: Path) -> None:
    config, card = EngineConfig(), HardwareInfo(True, 11 * GIB, 12 * GIB, 90 * GIB, 96 * GIB)
    info = inspect_model(LARGE, config)
    for kind, again in (("folder", False), ("hub", False), ("packed", True)):
        with pytest.raises(DoesNotFit, match="--attention-quant int8") as refused:
            memory_plan(replace(info, kind=kind), config, card)  # type: ignore[arg-type]
        assert ("pack the checkpoint with" in str(refused.value)) is again
    packed = open_model(folder, EngineConfig(cache_dir=str(tmp_path)))
    for path, kind in ((packed.path, "packed"), (folder, "folder")):
        made = loader.Loader(path, "cpu", cache_dir=str(tmp_path))
        assert made._model_info.kind == kind
        made.close()


# -- output ----------------------------------------------------------------------------------------


def screens() -> list[PlanReport]:
    machines: list[dict[str, Any]] = [
        {"gpu": "RTX 3060 12GB", "ram": 64 * GIB},
        {"gpu": "RTX 4090"},
        {"gpu": "RTX 5090", "ram": 96 * GIB},
        {"gpu": "H200", "attention_quant": "int4"},
        {"vram": 24 * GIB, "kv_dtype": "bf16", "context": 131072},
        {"device": "cpu"},
    ]
    return [report(model, **machine) for machine in machines for model in (SMALL, LARGE)]


def test_a_report_fits_one_screen_and_answers_yes_or_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned_hardware, "available_ram", lambda: (100 * GIB, 128 * GIB))
    for found in screens():
        text = report_text(found)
        lines = text.splitlines()
        assert len(lines) <= 40 and max(map(len, lines)) <= WIDTH, text
        answer = next(line for line in lines if line.startswith("runs "))
        assert answer.split()[1].strip(":;,.") == ("no" if found.plan is None else "yes")
        if found.plan is not None:
            for name in (*found.plan.vram, *found.plan.ram):
                assert name in text


def test_an_estimate_states_its_error() -> None:
    here = report_text(report(SMALL, gpu="H200", ram=64 * GIB))
    assert "within 15% of what was measured on H100 and H200" in here.replace("\n           ", " ")
    other = report_text(report(SMALL, gpu="RTX 4090", ram=64 * GIB))
    assert "not measured on this GPU" in other.replace("\n           ", " ")


def test_a_hub_models_report_has_its_download_size(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    text = report_text(report(HUB, cache_dir=cache, gpu="4090", ram=64 * GIB))
    for word in ("download", str(tmp_path / "hub"), "1 Gbit/s", "pack", cache, "disk", "load"):
        assert word in text
    assert report(HUB, cache_dir=cache, gpu="4090", ram=64 * GIB).disk_fits
    with monkeypatch.context() as full:
        full.setattr("osmium.weights.disk.free_bytes", lambda folder: 1000)
        found = report(HUB, cache_dir=cache, gpu="4090", ram=64 * GIB)
        assert not found.disk_fits and not found.as_dict()["disk_fits"]
        for word in ("too little", "HF_HOME", "--cache-dir", "1.0 kB free"):
            assert word in report_text(found)
    open_model(HUB, EngineConfig(cache_dir=cache))
    after = report_text(report(HUB, cache_dir=cache, gpu="4090", ram=64 * GIB))
    assert "packed already" in after and "download" not in after


def test_json_has_every_value_with_its_unit() -> None:
    for found in (report(LARGE, gpu="4090", ram=64 * GIB), report(LARGE, gpu="3060 12GB")):
        read = json.loads(json.dumps(found.as_dict()))
        assert read["runs"] is (found.plan is not None)
        assert read["hardware"]["link_gb_s"] == 25.0
        assert len(read["changes"]) == len(found.changes) > 0
        for key in ("pack_s", "load_s", "max_context_tokens", "assumptions", "binds", "reason"):
            assert key in read
        assert read["model"]["packed_bytes"] == found.model.packed_bytes
        if found.plan is not None:
            assert read["vram_bytes"] == found.plan.vram
            assert read["expert_slots"] == found.plan.expert_slots
            assert read["token_time_ms"]["total"] == pytest.approx(
                1e3 / read["expected_tokens_per_s"], rel=0.01
            )
        else:
            assert read["need_bytes"] > read["limit_bytes"]


def test_a_synthetic_model_in_other_formats_has_the_same_shapes() -> None:
    config = EngineConfig(attention_quant="int4")
    made = open_synthetic(SMALL, config)
    info = shapes_info("x", made.config, made.formats)
    assert (info.layout, info.parts) == (made.layout, made.parts)
    card = HardwareInfo(True, 30 * GIB, 32 * GIB, 90 * GIB, 96 * GIB)
    assert plan_shapes(info, config, card) == plan_shapes(made, config, card)


def test_planning_works_with_an_unwritable_cache_folder(folder: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    found = plan_for(folder, "cpu", **{**OPTIONS, "cache_dir": str(blocked / "below")})
    assert found.ram and os.path.isfile(blocked)
