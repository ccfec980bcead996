"""Safetensors files: valid and malicious ones."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osmium.errors import CheckpointError
from osmium.weights.choosing import INDEX
from osmium.weights.shards import open_shards
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


def test_tensors_have_their_written_values(tmp_path: Path) -> None:
    wanted = {**hf_tensors(CASE), "half": np.arange(6, dtype=np.float16).reshape(2, 3)}
    shards = open_shards(write(tmp_path, wanted, shards=3))
    assert set(shards.tensors) == set(wanted)
    for name, tensor in wanted.items():
        read = shards.read(name)
        assert read.dtype == tensor.dtype
        assert np.array_equal(read, tensor), name
        assert np.array_equal(shards.read(name, len(tensor) - 1), tensor[-1]), name


def test_a_file_that_is_cut_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    shards = open_shards(write(tmp_path, shards=2))
    file = tmp_path / "part0.safetensors"
    name = next(n for n, tensor in reversed(shards.tensors.items()) if tensor.file == file)
    os.truncate(file, 4096)
    with pytest.raises(CheckpointError, match=rf"part0\.safetensors ends inside {name}"):
        shards.read(name)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"part0\.safetensors cannot be read"):
        shards.read(name)


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


def test_a_tensor_in_another_shard_than_the_index_says_is_read(tmp_path: Path) -> None:
    write(tmp_path, shards=2)
    where = json.loads((tmp_path / INDEX).read_text())["weight_map"]["lm_head.weight"]
    other = {"part0.safetensors": "part1.safetensors", "part1.safetensors": "part0.safetensors"}
    edit_index(tmp_path, **{"lm_head.weight": other[where]})
    assert np.array_equal(
        open_shards(tmp_path).read("lm_head.weight"), hf_tensors(CASE)["lm_head.weight"]
    )


def test_a_tensor_that_no_shard_has_is_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path, shards=2)
    ghosts = {f"mtp.layers.0.{i}": "part0.safetensors" for i in range(9)}
    edit_index(tmp_path, **ghosts)
    (left_out,) = open_shards(tmp_path).left_out
    assert "mtp.layers.0.0" in left_out and "5 more" in left_out


def test_a_shard_may_be_absent_if_it_would_have_only_unused_tensors(tmp_path: Path) -> None:
    write(tmp_path, shards=2)
    edit_index(tmp_path, **{"mtp.fc.weight": "part2.safetensors"})
    with pytest.raises(CheckpointError, match=r"part2\.safetensors"):
        open_shards(tmp_path)
    shards = open_shards(tmp_path, unused=("mtp.",))
    assert [file.name for file in shards.files] == ["part0.safetensors", "part1.safetensors"]
    assert "mtp.fc.weight" in shards.left_out[0] and "part2.safetensors" in shards.left_out[0]
    edit_index(tmp_path, **{"model.norm": "part2.safetensors"})
    with pytest.raises(CheckpointError, match=r"part2\.safetensors"):
        open_shards(tmp_path, unused=("mtp.",))


def test_of_a_tensor_in_two_listed_shards_the_last_one_counts(tmp_path: Path) -> None:
    """As in transformers, which reads the files in the order of their names."""
    write(tmp_path, shards=2)
    first, second = (tmp_path / f"part{i}.safetensors" for i in range(2))
    first.write_bytes(shard({"x": np.zeros(2, np.float32), "twice": np.zeros(2, np.float32)}))
    second.write_bytes(shard({"twice": np.ones(2, np.float32)}))
    weight_map = {"twice": first.name, "x": first.name, "y": second.name}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    shards = open_shards(tmp_path)
    assert shards.read("twice").tolist() == [1, 1]
    assert "twice of part0.safetensors" in shards.left_out[0]


def test_a_tensor_in_two_shards_without_an_index_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(shard({"twice": np.zeros(2, np.float32)}))
    (tmp_path / "b.safetensors").write_bytes(shard({"twice": np.zeros(2, np.float32)}))
    with pytest.raises(CheckpointError, match=r"twice is in a\.safetensors and b\.safetensors"):
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


# -- files beside the model ------------------------------------------------------------------------

LEFTOVERS = (
    "._model.safetensors", "._model-00001-of-00002.safetensors", "adapter_model.safetensors",
    "consolidated.safetensors", "consolidated.00.safetensors", "optimizer.safetensors",
    "scheduler.safetensors", "rng_state_0.safetensors", "training_args.safetensors",
    "ema.safetensors", ".cache.safetensors",
)  # fmt: skip


def arrange(folder: Path, kind: str) -> set[str]:
    """Put the model into `folder` in one of the ways that checkpoints have; returns its files."""
    write(folder, shards=2)
    if kind == "index":
        return {"part0.safetensors", "part1.safetensors"}
    (folder / INDEX).unlink()
    names = {
        "numbered": ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        "published": ("model.safetensors-00001-of-00002.safetensors",
                      "model.safetensors-00002-of-00002.safetensors"),
        "other": ("part0.safetensors", "part1.safetensors"),
    }  # fmt: skip
    if kind == "whole":
        for i in range(2):
            (folder / f"part{i}.safetensors").unlink()
        write(folder)
        return {"model.safetensors"}
    for i, name in enumerate(names[kind]):
        (folder / f"part{i}.safetensors").rename(folder / name)
    return set(names[kind])


@pytest.mark.parametrize("kind", ["whole", "index", "numbered", "published", "other"])
def test_files_beside_the_model_are_left_out_and_named(kind: str, tmp_path: Path) -> None:
    mine = arrange(tmp_path, kind)
    for name in LEFTOVERS:
        (tmp_path / name).write_bytes(b"no safetensors file")
    shards = open_shards(tmp_path)
    assert {file.name for file in shards.files} == mine
    assert set(shards.tensors) == set(hf_tensors(CASE))
    assert set(shards.left_out) == set(LEFTOVERS)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00009.safetensors", "model (1).safetensors", "model.fp16.safetensors"]
)
@pytest.mark.parametrize("kind", ["whole", "index"])
def test_shards_that_transformers_does_not_read_are_left_out(
    kind: str, name: str, tmp_path: Path
) -> None:
    mine = arrange(tmp_path, kind)
    (tmp_path / name).write_bytes(b"")
    shards = open_shards(tmp_path)
    assert {file.name for file in shards.files} == mine
    assert shards.left_out == (name,)


def test_a_whole_file_wins_over_an_index_and_its_shards(tmp_path: Path) -> None:
    write(tmp_path, {"old": np.zeros(1, np.float32)}, shards=1)
    (tmp_path / "model.safetensors").rename(tmp_path / "part0.safetensors")
    weight_map = {"old": "part0.safetensors", "gone": "part1.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    write(tmp_path)
    shards = open_shards(tmp_path)
    assert [file.name for file in shards.files] == ["model.safetensors"]
    assert set(shards.tensors) == set(hf_tensors(CASE))
    assert set(shards.left_out) == {INDEX, "part0.safetensors"}


def test_a_stale_index_is_not_even_read_beside_a_whole_file(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / INDEX).write_text("[")
    assert open_shards(tmp_path).left_out == (INDEX,)


def test_an_incomplete_set_of_numbered_shards_is_refused(tmp_path: Path) -> None:
    arrange(tmp_path, "numbered")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of the 2 shards"):
        open_shards(tmp_path)


def test_two_sets_of_numbered_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    arrange(tmp_path, "numbered")
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="two sets of shards"):
        open_shards(tmp_path)


@pytest.mark.parametrize("name", LEFTOVERS)
def test_a_folder_with_only_such_files_has_no_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(shard({"x": np.zeros(2, np.float32)}))
    with pytest.raises(CheckpointError, match="neither"):
        open_shards(tmp_path)


def test_a_pipe_or_a_folder_of_a_shards_name_is_no_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "model-00001-of-00001.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="neither"):
        open_shards(tmp_path)
