"""The packed file: contents, when it is packed again, and detection of damage."""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osmium.config import EngineConfig
from osmium.errors import CheckpointError, ConfigError
from osmium.ops import LinearWeight
from osmium.weights import DEMO, PackedModel, cache_folder, locate, open_model, open_packed
from osmium.weights.packed import FILES
from tests.models.build import hf_tensors
from tests.weights.files import CASE, write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model", shards=2)


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def packed(model: Path, config: EngineConfig) -> PackedModel:
    return open_model(model, config)


def stamp(packed: PackedModel) -> tuple[int, int]:
    """Changes when a file is written again."""
    stat = packed.path.stat()
    return stat.st_ino, stat.st_mtime_ns


# -- a second start --------------------------------------------------------------------------------


def test_a_second_start_reads_no_shard(
    packed: PackedModel, model: Path, config: EngineConfig
) -> None:
    first, was = packed.all_packed_experts().copy(), stamp(packed)
    for shard in model.glob("*.safetensors"):
        stat = shard.stat()
        shard.write_bytes(b"\0" * stat.st_size)  # same size and time, but zeros
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = open_model(model, config)
    again.verify()
    assert stamp(again) == was
    assert np.array_equal(again.all_packed_experts(), first)


def test_a_packed_model_starts_without_its_shards(
    packed: PackedModel, model: Path, config: EngineConfig
) -> None:
    was = stamp(packed)
    for shard in model.glob("*.safetensors"):
        shard.unlink()
    assert stamp(open_model(model, config)) == was


def test_touched_shards_are_not_packed_again(
    packed: PackedModel, model: Path, config: EngineConfig
) -> None:
    was = stamp(packed)
    for shard in model.glob("*.safetensors"):
        os.utime(shard, ns=(1, 1))
    assert stamp(open_model(model, config)) == was


def test_the_packed_file_is_complete(packed: PackedModel, model: Path, tmp_path: Path) -> None:
    texts = {name: (model / name).read_bytes() for name in FILES if (model / name).is_file()}
    assert {"config.json", "generation_config.json"} == set(texts)
    moved = tmp_path / "elsewhere.osmium"
    shutil.copyfile(packed.path, moved)
    shutil.rmtree(model)
    alone = open_model(moved, EngineConfig())
    assert {name: alone.file(name) for name in texts} == texts
    assert alone.file("tokenizer.json") is None and alone.json("tokenizer_config.json") is None
    assert alone.config == packed.config and 3 in alone.config.eos_token_ids
    assert np.array_equal(alone.all_packed_experts(), packed.all_packed_experts())


@pytest.mark.parametrize("name", sorted(hf_tensors(CASE)))
def test_an_edited_tensor_of_any_name_is_packed_again(name: str, tmp_path: Path) -> None:
    config = EngineConfig(cache_dir=str(tmp_path / "cache"))
    tensors = hf_tensors(CASE)
    before = open_model(write(tmp_path / "model", tensors), config)
    old = before.path.read_bytes()
    tensors[name] = tensors[name][::-1].copy() if len(tensors[name]) > 1 else -tensors[name]
    after = open_model(write(tmp_path / "model", tensors), config)
    after.verify()
    assert after.path == before.path and after.path.read_bytes() != old


def test_an_edited_config_is_packed_again(
    packed: PackedModel, model: Path, config: EngineConfig
) -> None:
    text = (model / "generation_config.json").read_text()
    (model / "generation_config.json").write_text(text.replace("3", "5"))
    assert 5 in open_model(model, config).config.eos_token_ids


def test_each_choice_of_formats_has_its_own_file(packed: PackedModel, model: Path) -> None:
    cache = str(packed.path.parent)
    eight = open_model(model, EngineConfig(cache_dir=cache, gpu_expert_bits=8))
    wide = open_model(model, EngineConfig(cache_dir=cache, attention_quant="int8"))
    assert len({packed.path, eight.path, wide.path}) == 3
    assert eight.layout.bits == 8
    linear = wide.tensor("layers.1.qgkv")
    assert isinstance(linear, LinearWeight) and linear.format == "int8"


def test_folders_of_the_same_name_have_separate_files(tmp_path: Path, config: EngineConfig) -> None:
    one, two = (open_model(write(tmp_path / at / "model"), config) for at in "ab")
    assert one.path != two.path


@pytest.mark.parametrize(
    "flag", [{"gpu_expert_bits": 16}, {"attention_quant": "int4"},
             {"shared_expert_quant": "bf16"}, {"lm_head_quant": "int4"}],
)  # fmt: skip
def test_a_packed_file_refuses_flags_for_other_formats(
    flag: dict[str, Any], packed: PackedModel
) -> None:
    (name,) = flag
    with pytest.raises(ConfigError, match="--" + name.replace("_", "-")):
        open_model(packed.path, EngineConfig(**flag))


def test_a_packed_file_accepts_flags_for_its_own_formats(model: Path, tmp_path: Path) -> None:
    asked = EngineConfig(
        cache_dir=str(tmp_path), gpu_expert_bits=8, attention_quant="int8", lm_head_quant="bf16"
    )
    assert open_model(open_model(model, asked).path, asked).layout.bits == 8


# -- reading ---------------------------------------------------------------------------------------


def test_experts_are_read_into_the_callers_memory(packed: PackedModel) -> None:
    for layer in range(packed.config.num_layers):
        mapped = packed.packed_experts(layer)
        out = np.full(mapped.shape, 0xAA, np.uint8)
        packed.read_packed_experts(layer, out)
        assert np.array_equal(out, mapped)
    assert np.array_equal(packed.all_packed_experts()[1], packed.packed_experts(1))


def test_weights_start_at_page_boundaries(packed: PackedModel) -> None:
    raw = packed.path.read_bytes()
    header = json.loads(raw[24 : 24 + int.from_bytes(raw[16:24], "little")])
    ends = [0]
    for part in header["parts"]:
        assert part["offset"] % 4096 == 0 and part["offset"] >= ends[-1]
        ends.append(part["offset"] + part["nbytes"])
        assert zlib.crc32(raw[part["offset"] : ends[-1]]) == int(part["crc"], 16)
    assert ends[-1] <= header["size"] == len(raw)


# -- damage ----------------------------------------------------------------------------------------


def broken(packed: PackedModel, folder: Path, raw: bytes) -> Path:
    path = folder / "broken.osmium"
    path.write_bytes(raw)
    return path


def table(path: Path) -> list[dict[str, Any]]:
    raw = path.read_bytes()
    parts: list[dict[str, Any]] = json.loads(raw[24 : 24 + int.from_bytes(raw[16:24], "little")])[
        "parts"
    ]
    return parts


def test_a_truncated_file_is_refused(
    packed: PackedModel, tmp_path: Path, rng: np.random.Generator
) -> None:
    raw = packed.path.read_bytes()
    lengths = [0, 1, 23, 24, 100, 4096, len(raw) - 1, *rng.integers(0, len(raw), 20).tolist()]
    for length in lengths:
        path = broken(packed, tmp_path, raw[:length])
        with pytest.raises(CheckpointError, match=r"broken\.osmium"):
            open_packed(path)
    with pytest.raises(CheckpointError):
        open_packed(broken(packed, tmp_path, raw + b"\0"))


def test_an_edited_byte_of_the_header_is_detected_when_opening(
    packed: PackedModel, tmp_path: Path, rng: np.random.Generator
) -> None:
    raw = packed.path.read_bytes()
    length = 24 + int.from_bytes(raw[16:24], "little")
    for at in [*range(24), *rng.integers(24, length, 40).tolist()]:
        edited = bytearray(raw)
        edited[at] ^= int(rng.integers(1, 256))
        with pytest.raises(CheckpointError, match=r"broken\.osmium"):
            open_packed(broken(packed, tmp_path, bytes(edited)))


def test_an_edited_byte_of_any_weight_is_detected_when_reading(
    packed: PackedModel, tmp_path: Path, rng: np.random.Generator
) -> None:
    raw = packed.path.read_bytes()
    for part in table(packed.path):
        name, edited = part["name"], bytearray(raw)
        edited[part["offset"] + int(rng.integers(0, part["nbytes"]))] ^= 1 << int(rng.integers(8))
        path = broken(packed, tmp_path, bytes(edited))
        with pytest.raises(CheckpointError) as raised:
            damaged = open_packed(path)  # config.json is read here
            damaged.verify()
        assert name in str(raised.value)
        if not name.startswith("experts."):
            continue
        layer = int(name.removeprefix("experts."))
        out = np.empty(packed.packed_experts(layer).shape, np.uint8)
        with pytest.raises(CheckpointError, match=name):
            open_packed(path).packed_experts(layer)
        with pytest.raises(CheckpointError, match=name):
            open_packed(path).all_packed_experts()
        with pytest.raises(CheckpointError, match=name):
            open_packed(path).read_packed_experts(layer, out)


def test_a_table_of_another_model_with_valid_checksums_is_refused(
    packed: PackedModel, tmp_path: Path
) -> None:
    raw = packed.path.read_bytes()
    length = int.from_bytes(raw[16:24], "little")
    text = raw[24 : 24 + length]
    for old, new in (
        (b"layers.0.ab.data", b"layers.7.ab.data"),
        (b'"shape": [64]', b'"shape": [32]'),
    ):
        assert old in text
        other = text.replace(old, new, 1)
        head = raw[:12] + zlib.crc32(other).to_bytes(4, "little") + raw[16:24]
        path = broken(packed, tmp_path, head + other + raw[24 + length :])
        with pytest.raises(CheckpointError, match=r"layers\.0|norm\.data"):
            open_packed(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parts", None), ("parts", [7]), ("parts", []), ("formats", {"expert_bits": 3}),
        ("formats", None), ("sources", 5), ("size", "x"), ("fingerprint", 1),
        ("part.crc", 5), ("part.crc", "xyz"), ("part.dtype", "|O"), ("part.dtype", 1),
        ("part.shape", 4), ("part.shape", [-1]), ("part.shape", [1 << 40, 1 << 40]),
        ("part.offset", -4096), ("part.offset", 0), ("part.offset", 1 << 70),
        ("part.offset", 1.5), ("part.nbytes", 1), ("part.name", []), ("part.name", "experts.0"),
        ("part.name", None), ("part.nbytes", None), ("part", None), ("hub", 7), ("hub", {}),
        ("hub", {"id": "a/b", "revision": "c", "etags": [1]}), ("hub", [[[[]]]]),
        ("parts", {}), ("size", 1 << 60), ("size", -1), ("size", 10**400),
        ("part.shape", [1 << 60]), ("part.nbytes", 1 << 60), ("part.shape", [1] * 9),
        ("formats", {"expert_bits": True, "attention": "bf16", "shared": "int8", "head": "int8"}),
        ("formats", []), ("fingerprint", None), ("part.crc", "0xffffff"), ("part.dtype", "<f8"),
        ("part.dtype", "O" * 9999),
    ],
)  # fmt: skip
def test_an_inconsistent_header_with_a_valid_checksum_is_refused(
    packed: PackedModel, tmp_path: Path, key: str, value: object
) -> None:
    raw = packed.path.read_bytes()
    length = int.from_bytes(raw[16:24], "little")
    header = json.loads(raw[24 : 24 + length])
    whole, _, inside = key.partition(".")
    if whole == "part":
        if inside and value is not None:
            header["parts"][3][inside] = value
        elif inside:
            del header["parts"][3][inside]
        else:
            del header["parts"][3]
    elif value is None:
        del header[key]
    else:
        header[key] = value
    text = json.dumps(header).encode()
    head = raw[:12] + zlib.crc32(text).to_bytes(4, "little") + len(text).to_bytes(8, "little")
    path = broken(packed, tmp_path, (head + text).ljust(24 + length) + raw[24 + length :])
    with pytest.raises(CheckpointError, match=r"broken\.osmium"):
        open_packed(path)


@pytest.mark.parametrize(
    "text",
    [b"[]", b"null", b"7", b'"x"', b"{}", b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe",
     b'{"parts": [' + b"[" * 100_000, b'{"size": NaN}', b"1" * 100_000],
)  # fmt: skip
def test_a_header_that_is_no_header_is_refused(
    packed: PackedModel, tmp_path: Path, text: bytes
) -> None:
    raw = packed.path.read_bytes()
    head = raw[:12] + zlib.crc32(text).to_bytes(4, "little") + len(text).to_bytes(8, "little")
    with pytest.raises(CheckpointError, match=r"broken\.osmium"):
        open_packed(broken(packed, tmp_path, (head + text).ljust(len(raw))))


@pytest.mark.parametrize("length", [1 << 60, (1 << 64) - 1, (16 << 20) + 1])
def test_a_header_of_absurd_length_is_refused_without_memory_for_it(
    packed: PackedModel, tmp_path: Path, length: int
) -> None:
    raw = packed.path.read_bytes()
    path = broken(packed, tmp_path, raw[:16] + length.to_bytes(8, "little") + raw[24:])
    os.truncate(path, 1 << 36)  # sparse
    with pytest.raises(CheckpointError, match=str(length)):
        open_packed(path)


def rewritten(packed: PackedModel, folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """The file with another header of the same length, whose checksum is right."""
    raw = packed.path.read_bytes()
    length = int.from_bytes(raw[16:24], "little")
    header = json.loads(raw[24 : 24 + length])
    edit(header)
    text = json.dumps(header).encode().ljust(length)
    assert len(text) == length
    crc = zlib.crc32(text).to_bytes(4, "little")
    return broken(packed, folder, raw[:12] + crc + raw[16:24] + text + raw[24 + length :])


def test_parts_that_overlap_are_refused(packed: PackedModel, tmp_path: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        one, other = (p for p in header["parts"] if p["name"].startswith("experts."))
        other["offset"] = one["offset"]

    with pytest.raises(CheckpointError, match=r"experts\.1"):
        open_packed(rewritten(packed, tmp_path, overlap))


def test_layers_in_another_order_are_read_by_their_names(
    packed: PackedModel, tmp_path: Path
) -> None:
    wanted = packed.all_packed_experts()

    def swap(header: dict[str, Any]) -> None:
        one, other = (p for p in header["parts"] if p["name"].startswith("experts."))
        one["name"], other["name"] = other["name"], one["name"]

    found = open_packed(rewritten(packed, tmp_path, swap)).all_packed_experts()
    assert np.array_equal(found, wanted[::-1])


def test_a_small_file_of_absurd_size_is_refused_without_memory_for_it(
    packed: PackedModel, tmp_path: Path
) -> None:
    size = packed.path.stat().st_size

    def grow(header: dict[str, Any]) -> None:
        (part,) = (p for p in header["parts"] if p["name"] == "file.generation_config.json")
        part["offset"], part["nbytes"] = size, 1 << 34
        part["shape"] = [part["nbytes"]]
        header["size"] = size + part["nbytes"]
        header["fingerprint"] = header["fingerprint"][:20]  # room for the longer numbers

    path = rewritten(packed, tmp_path, grow)
    os.truncate(path, size + (1 << 34))
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        open_packed(path)


def test_a_file_that_is_cut_after_it_was_opened_is_an_error(
    packed: PackedModel, tmp_path: Path
) -> None:
    opened = open_packed(broken(packed, tmp_path, packed.path.read_bytes()))
    before = opened.all_packed_experts(), opened.packed_experts(0), opened.file("config.json")
    os.truncate(opened.path, 4096)
    assert np.array_equal(before[0][0], before[1]), "what has been read stays"
    for read in (opened.all_packed_experts, opened.verify, lambda: opened.tensor("norm"),
                 lambda: opened.file("config.json")):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"broken\.osmium ends at byte"):
            read()


@pytest.mark.parametrize("part", ["file.config.json", "file.generation_config.json", ""])
def test_a_damaged_file_in_the_cache_is_packed_again(
    part: str, packed: PackedModel, model: Path, config: EngineConfig
) -> None:
    whole = packed.path.read_bytes()
    at = next((p["offset"] for p in table(packed.path) if p["name"] == part), 12)
    edited = bytearray(whole)
    edited[at] ^= 1
    packed.path.write_bytes(edited)
    again = open_model(model, config)
    again.verify()
    assert again.path.read_bytes() == whole


def test_a_cut_file_in_the_cache_is_packed_again(
    packed: PackedModel, model: Path, config: EngineConfig
) -> None:
    whole = packed.path.read_bytes()
    packed.path.write_bytes(whole[:-4096])
    assert open_model(model, config).path.read_bytes() == whole


def test_another_format_version_is_refused_by_number_and_packed_again_from_a_folder(
    packed: PackedModel, model: Path, config: EngineConfig
) -> None:
    whole = packed.path.read_bytes()
    packed.path.write_bytes(whole[:8] + (999).to_bytes(4, "little") + whole[12:])
    with pytest.raises(CheckpointError, match="999"):
        open_packed(packed.path)
    assert open_model(model, config).path.read_bytes() == whole


def test_invalid_json_text_is_refused_by_name(model: Path, config: EngineConfig) -> None:
    for text in ("{", "[]", "[" * 100_000):
        (model / "tokenizer_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
            open_model(model, config).json("tokenizer_config.json")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
             "chat_template.jinja", "adapter_config.json", "notes.json", "README.md"],
)  # fmt: skip
@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_a_small_file_is_not_waited_for(
    name: str, model: Path, config: EngineConfig
) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with contextlib.suppress(CheckpointError, ConfigError):
        assert open_model(model, config).file(name) is None
        open_model(model, config)


# -- names of models -------------------------------------------------------------------------------


def test_without_a_model_the_bundled_demo_is_opened_and_intact() -> None:
    assert locate(None) == DEMO
    demo = open_model(None, EngineConfig())
    demo.verify()
    assert demo.layout.bits == 4
    for name in FILES[:5]:
        assert demo.file(name), name


def test_a_path_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.osmium").write_text("hello")
    with pytest.raises(ConfigError, match="nowhere"):
        locate(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="empty"):
        locate(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"text\.osmium"):
        open_model(tmp_path / "text.osmium", EngineConfig())


@pytest.mark.parametrize(
    "name", ["no-such-owner/no-such-model", "bad name/with spaces", "a--b/c..d"]
)
def test_a_hub_id_that_is_not_cached_is_refused_offline(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as raised:
        open_model(name, EngineConfig())
    assert name in str(raised.value)


def test_the_cache_folder_follows_the_flag_then_xdg_then_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder(EngineConfig(cache_dir="/flag")) == Path("/flag")
    assert cache_folder(EngineConfig()) == Path("/xdg/osmium")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(EngineConfig()) == tmp_path / ".cache" / "osmium"
