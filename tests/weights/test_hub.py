"""Models on the hub: what is read before a download, refusals, downloads and the cache."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from osmium.config import EngineConfig
from osmium.errors import CheckpointError, ConfigError
from osmium.weights import CheckpointFiles, HubFiles, disk, inspect_model, open_model
from osmium.weights.choosing import INDEX
from osmium.weights.hub import download, hub_id, look_up
from osmium.weights.info import ModelInfo
from tests.models.build import hf_tensors
from tests.weights.files import CASE, write
from tests.weights.published import PUBLISHED, published
from tests.weights.stand_in_hub import HubFile, StandInHub, folder_files, use

ROOT = Path(__file__).resolve().parents[2]

NAME = "owner/Small-7B-A1B"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hub") / "model", shards=3)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInHub]:
    with StandInHub({NAME: folder_files(folder)}) as made:
        use(monkeypatch, made, tmp_path / "hub")
        yield made


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(cache_dir=str(tmp_path / "cache"))


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def shapes(info: ModelInfo) -> tuple[Any, ...]:
    return replace(info.config, eos_token_ids=()), info.formats, info.layout, info.parts


# -- before a download -----------------------------------------------------------------------------


def test_planning_reads_no_tensor_and_packs_nothing(
    hub: StandInHub, folder: Path, config: EngineConfig, tmp_path: Path
) -> None:
    info = inspect_model(NAME, config)
    here = inspect_model(folder, config)
    assert shapes(info) == shapes(here)
    assert (info.kind, info.is_packed, info.checkpoint_bytes) == (
        "hub",
        False,
        here.checkpoint_bytes,
    )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert info.checkpoint_bytes == info.download_bytes == size
    assert info.download_to == tmp_path / "hub"
    assert hub.tensor_bytes == 0
    assert not (tmp_path / "cache").exists()
    assert not list((tmp_path / "hub").rglob("*.safetensors"))
    assert hub.tokens >= {"Bearer hf_stand_in"}, "the token is sent"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_described_by_less_than_a_megabyte(
    name: str, hub: StandInHub, config: EngineConfig
) -> None:
    hub.models[name] = published(name)
    info = inspect_model(name, config)
    assert hub.tensor_bytes == 0 and hub.total < 1 << 20
    assert info.checkpoint_bytes is not None
    assert abs(info.checkpoint_bytes - PUBLISHED[name][2]) < 1 << 20
    assert shapes(info) == shapes(inspect_model(f"synthetic:{PUBLISHED[name][0]}", config))


def test_the_packed_files_size_is_computed_in_advance(
    hub: StandInHub, config: EngineConfig
) -> None:
    info = inspect_model(NAME, config)
    packed = open_model(NAME, config)
    assert packed.path == info.packed_path
    assert 0 <= packed.path.stat().st_size - info.packed_bytes <= 2 * 4096


def test_a_server_without_ranges_is_read_only_up_to_the_header(
    hub: StandInHub, config: EngineConfig
) -> None:
    hub.ranges = False
    file = hub.models[NAME]["part0.safetensors"]
    hub.models[NAME]["part0.safetensors"] = HubFile(file.head, file.nbytes)
    assert inspect_model(NAME, config).download_bytes


def test_requests_to_a_busy_server_are_retried(
    hub: StandInHub, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osmium.weights.hub.time.sleep", lambda _: None)
    hub.failures = 2
    assert inspect_model(NAME, config).checkpoint_bytes
    hub.failures = 100
    with pytest.raises(ConfigError, match=r"Small-7B-A1B could not be read.*503"):
        inspect_model(NAME, config)


def test_without_a_network_the_cached_config_is_enough_for_a_plan(
    hub: StandInHub, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = inspect_model(NAME, config)
    served = hub.total
    offline(monkeypatch)
    after = inspect_model(NAME, config)
    assert shapes(after) == shapes(before)
    assert (after.checkpoint_bytes, after.download_bytes) == (None, None)
    assert hub.total == served
    with pytest.raises(ConfigError, match=r"has 0 of 3 \.safetensors files"):
        open_model(NAME, config)


def test_an_unresponsive_hub_counts_as_no_network(
    hub: StandInHub, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect_model(NAME, config)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert inspect_model(NAME, config).download_bytes is None
    with pytest.raises(ConfigError, match=r"owner/other"):
        inspect_model("owner/other", config)


def test_a_cached_model_needs_no_network(
    hub: StandInHub, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(look_up(NAME))
    offline(monkeypatch)
    served = hub.total
    info = inspect_model(NAME, config)
    assert info.download_bytes == 0 and info.checkpoint_bytes
    open_model(NAME, config).verify()
    assert hub.total == served


# -- refusals before the first byte ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["owner/no-such-model", "another/" + NAME.split("/")[1]])
def test_an_unknown_model_is_refused_by_name(
    name: str, hub: StandInHub, config: EngineConfig
) -> None:
    with pytest.raises(ConfigError, match=rf"no model {name}.*private"):
        inspect_model(name, config)


def test_a_gated_model_is_refused_with_how_to_get_access(
    hub: StandInHub, config: EngineConfig
) -> None:
    hub.gated.add(NAME)
    with pytest.raises(ConfigError, match=r"gated.*HF_TOKEN"):
        inspect_model(NAME, config)


def test_a_checkpoint_in_another_format_is_refused_by_its_headers(
    hub: StandInHub, config: EngineConfig
) -> None:
    file = hub.models[NAME]["part1.safetensors"]
    hub.models[NAME]["part1.safetensors"] = HubFile(
        file.head.replace(b'"dtype": "BF16"', b'"dtype": "I16" ', 1), file.nbytes
    )
    for use_it in (inspect_model, open_model):
        with pytest.raises(CheckpointError, match=r"is I16 in part1\.safetensors"):
            use_it(NAME, config)
    assert hub.tensor_bytes == 0


@pytest.mark.parametrize("free", [0.9, 1.9])
def test_too_little_disk_space_is_refused_before_the_download(
    free: float,
    hub: StandInHub,
    config: EngineConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Both files are on one disk here; space for one of them is not enough."""
    size = inspect_model(NAME, config).checkpoint_bytes or 0
    monkeypatch.setattr(disk, "free_bytes", lambda folder: int(free * size))
    with pytest.raises(ConfigError) as refused:
        open_model(NAME, config)
    log = str(refused.value)
    for word in ("HF_HOME", "--cache-dir", str(tmp_path / "hub"), str(tmp_path / "cache")):
        assert word in log
    assert disk.gb(size) in log and disk.gb(int(free * size)) in log
    assert hub.tensor_bytes == 0


def test_a_check_can_stop_a_model_before_it_is_downloaded(
    hub: StandInHub, folder: Path, config: EngineConfig
) -> None:
    seen = []

    def check(info: ModelInfo, files: CheckpointFiles | HubFiles) -> None:
        assert files.json("config.json") and files.file("no_such.json") is None
        seen.append(info)
        raise ConfigError("too large")

    for model in (NAME, folder):
        with pytest.raises(ConfigError, match="too large"):
            open_model(model, config, check=check)
    assert [info.kind for info in seen] == ["hub", "folder"]
    assert shapes(seen[0]) == shapes(seen[1])
    assert hub.tensor_bytes == 0
    assert not list(Path(str(config.cache_dir)).glob("*.osmium"))
    open_model(folder, config)
    open_model(folder, config, check=check)  # already packed, so nothing is refused


# -- a download ------------------------------------------------------------------------------------


def test_a_downloaded_model_packs_to_the_same_file_as_its_folder(
    hub: StandInHub,
    folder: Path,
    config: EngineConfig,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    stages: list[tuple[str, int, int]] = []
    packed = open_model(NAME, config, lambda *report: stages.append(report))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for log in (NAME, disk.gb(size), "3 files", str(tmp_path / "hub"), str(tmp_path / "cache")):
        assert log in caplog.text
    done = [(at, of) for stage, at, of in stages if stage == "downloading"]
    assert done == sorted(done) and done[0] == (0, size) and done[-1] == (size, size)
    assert packed.path.name.startswith("Small-7B-A1B-")
    here = open_model(folder, EngineConfig(cache_dir=str(tmp_path / "other")))
    assert packed.fingerprint == here.fingerprint
    assert (packed.all_packed_experts() == here.all_packed_experts()).all()


def test_files_beside_the_model_are_not_downloaded_and_named(
    hub: StandInHub, folder: Path, config: EngineConfig, caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:  # fmt: skip
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in ("consolidated.safetensors", "optimizer.safetensors", "extra.safetensors"):
        (copy / name).write_bytes(b"x" * 100)
    hub.models[NAME] = folder_files(copy)
    packed = open_model(NAME, config)
    (line,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "left out: consolidated.safetensors, extra.safetensors, optimizer" in line
    found = {file.name for file in (tmp_path / "hub").rglob("*.safetensors")}
    assert found == {file.name for file in folder.glob("*.safetensors")}
    assert packed.fingerprint == open_model(folder, config).fingerprint


@pytest.mark.parametrize("text", ['{"weight_map": {"old": "gone.safetensors"}}', "["])
def test_a_whole_file_on_the_hub_wins_over_a_stale_index(
    hub: StandInHub, text: str, config: EngineConfig, tmp_path: Path
) -> None:
    whole = write(tmp_path / "whole")
    (whole / INDEX).write_text(text)
    hub.models[NAME] = folder_files(whole)
    packed = open_model(NAME, config)
    assert list(packed.sources) == ["model.safetensors"]
    assert packed.hub is not None and INDEX not in packed.hub["etags"]


def test_a_second_start_needs_neither_the_checkpoint_nor_the_hub(
    hub: StandInHub, config: EngineConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = open_model(NAME, config)
    shutil.rmtree(tmp_path / "hub")  # frees disk space
    tensors = hub.tensor_bytes
    hub.models[NAME]["README.md"] = HubFile.whole(b"another commit")
    assert open_model(NAME, config).path == first.path
    info = inspect_model(NAME, config)
    assert (info.is_packed, info.kind, info.download_bytes) == (True, "hub", 0)
    assert hub.tensor_bytes == tensors
    offline(monkeypatch)
    shutil.rmtree(tmp_path / "hub", ignore_errors=True)
    assert open_model(NAME, config).fingerprint == first.fingerprint
    assert inspect_model(NAME, config).is_packed


def test_weights_that_changed_on_the_hub_are_packed_again(
    hub: StandInHub, config: EngineConfig, tmp_path: Path
) -> None:
    first = open_model(NAME, config)
    tensors = hf_tensors(CASE)
    other = next(iter(tensors))
    tensors[other] = tensors[other] ^ 1 if tensors[other].dtype.kind == "u" else -tensors[other]
    hub.models[NAME] = folder_files(write(tmp_path / "new", tensors, shards=3))
    assert not inspect_model(NAME, config).is_packed
    again = open_model(NAME, config)
    assert again.path == first.path and again.fingerprint != first.fingerprint


def test_a_changed_template_costs_no_download_of_the_weights(
    hub: StandInHub,
    config: EngineConfig,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    open_model(NAME, config)
    hub.models[NAME]["chat_template.jinja"] = HubFile.whole(b"new")
    packed = open_model(NAME, config)  # packed again from the cached weights
    assert packed.file("chat_template.jinja") == b"new"
    shutil.rmtree(tmp_path / "hub")
    tensors = hub.tensor_bytes
    hub.models[NAME]["chat_template.jinja"] = HubFile.whole(b"newer")
    caplog.clear()
    assert open_model(NAME, config).file("chat_template.jinja") == b"new"
    assert hub.tensor_bytes == tensors
    assert "chat_template.jinja changed on the hub" in caplog.text


STOPPED = """
import sys
from huggingface_hub import constants
from osmium.config import EngineConfig
from osmium.weights import open_model
constants.DOWNLOAD_CHUNK_SIZE = 1 << 17
def progress(stage, done, total):
    if stage == "downloading" and done > 0:
        print("going", flush=True)
try:
    open_model(sys.argv[1], EngineConfig(cache_dir=sys.argv[2]), progress)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


def test_ctrl_c_stops_a_download_immediately(hub: StandInHub, tmp_path: Path) -> None:
    """Not at the end of a file: a shard of a large model takes minutes."""
    big = hf_tensors(CASE)
    head = folder_files(write(tmp_path / "big", big))["model.safetensors"]
    header = json.loads(head.head[8 : 8 + int.from_bytes(head.head[:8], "little")])
    del header["__metadata__"]
    end = head.nbytes - 8 - int.from_bytes(head.head[:8], "little")
    header["mtp.more"] = {
        "dtype": "U8",
        "shape": [16 << 20],
        "data_offsets": [end, end + (16 << 20)],
    }
    text = json.dumps(header).encode()
    data = head.head[-end:] + bytes(16 << 20)
    files = folder_files(tmp_path / "big")
    files["model.safetensors"] = HubFile.whole(len(text).to_bytes(8, "little") + text + data)
    hub.models[NAME], hub.delay_s = files, 0.02  # takes 20 s
    run = subprocess.Popen(
        [sys.executable, "-c", STOPPED, NAME, str(tmp_path / "cache")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={"PATH": "/usr/bin", "HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1",
             **hub.environment(tmp_path / "home")},
    )  # fmt: skip
    try:
        assert run.stdout is not None
        assert run.stdout.readline() == "going\n"
        run.send_signal(signal.SIGINT)
        start = time.monotonic()
        assert run.wait(30) == 0 and "stopped" in run.stdout.read()
        assert time.monotonic() - start < 10
        assert not list((tmp_path / "home").rglob("*.incomplete"))
    finally:
        run.kill()
        run.wait()
        assert run.stdout is not None
        run.stdout.close()


# -- names -----------------------------------------------------------------------------------------


def test_a_hub_id_is_two_names_and_not_an_existing_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("owner/name") == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for path in ("owner/name", "./owner", "/owner", "~/owner", "name", "a/b/c", None):
        assert hub_id(path) is None


def test_an_index_without_its_shards_is_refused(hub: StandInHub) -> None:
    del hub.models[NAME]["part2.safetensors"]
    with pytest.raises(CheckpointError, match=r"part2\.safetensors"):
        look_up(NAME)


def test_a_model_without_safetensors_is_refused_with_its_format(hub: StandInHub) -> None:
    files = hub.models[NAME]
    for other, log in (("model.gguf", "GGUF"), ("adapter_model.safetensors", "adapter")):
        hub.models[NAME] = {"README.md": HubFile.whole(b""), other: HubFile.whole(b"x")}
        with pytest.raises(ConfigError, match=log):
            look_up(NAME)
    hub.models[NAME] = {"config.json": files["config.json"]}
    with pytest.raises(CheckpointError, match=r"neither .* nor a \.safetensors file"):
        look_up(NAME)
    assert hub.tensor_bytes == 0
