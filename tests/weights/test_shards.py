"""Safetensors files: valid and malicious ones."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osmium.errors import CheckpointError
from osmium.weights.shards import INDEX, open_shards
from tests.models.build import hf_tensors
from tests.weights.files import CASE, raw_shard, shard, write

ONE = {"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
DATA = np.arange(4, dtype="<f4").tobytes()


def entry(dtype: str, shape: list[Any], offsets: list[int]) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


TWO = {
    "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
}
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "shorter_than_its_length": b"\x10\0\0",
    "huge_length": raw_shard(ONE, DATA, 1 << 62),
    "length_past_the_end": raw_shard(ONE, DATA, 4096),
    "negative_length": struct.pack("<q", -1) + b"{}",
    "length_zero": raw_shard(ONE, DATA, 0),
    "no_json": raw_shard(b"{x", DATA),
    "no_text": raw_shard(b"\xff\xfe{}", DATA),
    "json_but_no_object": raw_shard(b"[1, 2]", DATA),
    "deep_json": raw_shard(b"[" * 100_000, DATA),
    "truncated": raw_shard(ONE, DATA)[:-1],
    "trailing": raw_shard(ONE, DATA + b"\0"),
    "overlapping": raw_shard(TWO, b"\0" * 12),
    "out_of_range": raw_shard(entry("F32", [2, 2], [0, 1 << 40]), DATA),
    "starts_past_the_end": raw_shard(entry("F32", [2, 2], [1 << 40, (1 << 40) + 16]), DATA),
    "ends_before_it_starts": raw_shard(entry("F32", [2, 2], [16, 0]), DATA),
    "negative_offset": raw_shard(entry("F32", [2, 2], [-16, 0]), DATA),
    "negative_shape": raw_shard(entry("F32", [-2, -2], [0, 16]), DATA),
    "overflowing_shape": raw_shard(entry("F32", [1 << 62, 1 << 62], [0, 16]), DATA),
    "shape_of_other_size": raw_shard(entry("F32", [2, 3], [0, 16]), DATA),
    "unknown_dtype": raw_shard(entry("F33", [2, 2], [0, 16]), DATA),
    "no_dtype": raw_shard({"x": {"shape": [2, 2], "data_offsets": [0, 16]}}, DATA),
    "shape_of_strings": raw_shard(entry("F32", ["2", "2"], [0, 16]), DATA),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_file_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(HOSTILE[fault])
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        open_shards(tmp_path)


def test_the_unmodified_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "good.safetensors").write_bytes(raw_shard(ONE, DATA))
    assert open_shards(tmp_path).read("x").tolist() == [[0, 1], [2, 3]]


def test_a_flipped_byte_of_a_header_is_a_checkpoint_error_or_harmless(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    whole = shard({"a": np.zeros((3, 4), np.uint16), "b": np.ones(5, np.float32)})
    size = int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(300):
        raw = bytearray(whole)
        at = int(rng.integers(0, 8 + size))
        raw[at] ^= int(rng.integers(1, 256))
        (tmp_path / "m.safetensors").write_bytes(raw)
        try:
            shards = open_shards(tmp_path)
        except CheckpointError:
            refused += 1
            continue
        for name, tensor in shards.tensors.items():
            assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(raw)
            if tensor.dtype in ("BF16", "F32", "F16"):
                assert shards.read(name).nbytes == tensor.nbytes
    assert refused > 50


def test_tensors_are_views_with_their_written_values(tmp_path: Path) -> None:
    wanted = {**hf_tensors(CASE), "half": np.arange(6, dtype=np.float16).reshape(2, 3)}
    shards = open_shards(write(tmp_path, wanted, shards=3))
    assert set(shards.tensors) == set(wanted)
    for name, tensor in wanted.items():
        read = shards.read(name)
        assert read.dtype == tensor.dtype
        assert np.array_equal(read, tensor), name
        assert not read.flags.owndata and not read.flags.writeable


def test_a_tensor_at_an_odd_offset_is_read(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "BF16", "shape": [3], "data_offsets": [1, 7]},
    }
    (tmp_path / "m.safetensors").write_bytes(raw_shard(header, b"\7\1\0\2\0\3\0"))
    assert open_shards(tmp_path).read("x").tolist() == [1, 2, 3]


def test_a_dtype_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(raw_shard(entry("I64", [2], [0, 16]), DATA))
    with pytest.raises(CheckpointError, match="I64"):
        open_shards(tmp_path).read("x")


# -- the index -------------------------------------------------------------------------------------


def edit_index(folder: Path, **entries: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(entries)
    (folder / INDEX).write_text(json.dumps(index))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, shards=3)
    (tmp_path / "part1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"part1\.safetensors"):
        open_shards(tmp_path)


def test_a_tensor_missing_from_its_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, shards=2)
    edit_index(tmp_path, ghost="part0.safetensors")
    with pytest.raises(CheckpointError, match="ghost"):
        open_shards(tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(tmp_path: Path) -> None:
    write(tmp_path, shards=2)
    where = json.loads((tmp_path / INDEX).read_text())["weight_map"]["lm_head.weight"]
    other = {"part0.safetensors": "part1.safetensors", "part1.safetensors": "part0.safetensors"}
    edit_index(tmp_path, **{"lm_head.weight": other[where]})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        open_shards(tmp_path)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(shard({"twice": np.zeros(2, np.float32)}))
    (tmp_path / "b.safetensors").write_bytes(shard({"twice": np.zeros(2, np.float32)}))
    with pytest.raises(CheckpointError, match="twice"):
        open_shards(tmp_path)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "", ".", "..", "a\0b", 7, None, ["x"], {"a": 1}]
)
def test_an_index_may_not_name_files_outside_its_folder(name: Any, tmp_path: Path) -> None:
    inside = tmp_path / "model"
    write(inside, shards=2)
    (tmp_path / "other.safetensors").write_bytes(shard({"x": np.zeros(2, np.float32)}))
    edit_index(inside, x=name)
    with pytest.raises(CheckpointError):
        open_shards(inside)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000]
)
def test_a_malformed_index_is_refused_by_name(text: str, tmp_path: Path) -> None:
    write(tmp_path, shards=2)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_shards(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="safetensors"):
        open_shards(tmp_path)
