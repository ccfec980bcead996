"""A config.json may hold anything: each key with each absurd value is an own error, at once."""

import json
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from osmium.config import EngineConfig, ModelConfig
from osmium.errors import CheckpointError
from osmium.weights import inspect_model, open_model
from osmium.weights.shards import MAX_JSON, read_json
from osmium.weights.unsupported import refuse_config
from tests.models.variants import VARIANTS, Variant
from tests.weights.files import CASE, write


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


ABSURD: list[Any] = [
    None, True, False, 0, -1, 7, 10**12, 10**400, -(10**4000), 0.0, -1e-6, 1e308, float("inf"),
    float("nan"), 0.3, "4", "x" * 10**6, "\ud800", [], [1], [[]], {}, {"a": [1]}, nested(900),
    ["linear_attention"] * 10**5, {"rope_type": "yarn"}, {"type": "yarn", "factor": 1e300},
]  # fmt: skip


def keys(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from keys(value, (*path, key))


NAMES = ("qwen3_6", "yarn_with_mscale", "llama3_scaling", "yarn_in_rope_scaling", "text_only")


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name in NAMES], ids=lambda v: v.name)
def test_every_key_with_every_absurd_value_is_read_or_refused(variant: Variant) -> None:
    base = variant.config()
    unread = [("quantization_config",), ("_class_name",), ("rope_scaling",), ("rope_parameters",)]
    tracemalloc.start()
    start = time.monotonic()
    count = 0
    for path in [*keys(base), *unread]:
        for value in ABSURD:
            config = json.loads(json.dumps(base))
            section = config
            for key in path[:-1]:
                section = section[key]
            section[path[-1]] = value
            count += 1
            try:
                refuse_config(config, "here")
                ModelConfig.from_hf(config, {"eos_token_id": 1})
            except CheckpointError as error:
                assert len(str(error)) < 500, path
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (time.monotonic() - start) / count < 0.01
    assert peak < 32 << 20


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**12), ("num_hidden_layers", 10**400), ("num_hidden_layers", "2"),
        ("num_hidden_layers", 2.0), ("num_hidden_layers", True), ("num_hidden_layers", None),
        ("vocab_size", 1 << 40), ("hidden_size", 1 << 30), ("num_experts", 1 << 20),
        ("num_attention_heads", -1), ("max_position_embeddings", 10**30),
        ("max_position_embeddings", 1), ("head_dim", [256]),
        ("rms_norm_eps", -1e-6), ("rms_norm_eps", 0), ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", float("inf")), ("rms_norm_eps", 10**400), ("rms_norm_eps", "1e-6"),
        ("tie_word_embeddings", "false"), ("attention_bias", 1), ("attn_output_gate", "no"),
        ("layer_types", [["full_attention"]] * 2), ("layer_types", "full_attention"),
        ("layer_types", ["mamba", "full_attention"]), ("full_attention_interval", 0),
        ("hidden_act", "relu"), ("hidden_act", ["silu"]), ("output_gate_type", "sigmoid"),
        ("norm_topk_prob", False), ("per_layer_config", {"0": {"num_experts": 2}}),
        ("rope_parameters", [1]), ("rope_scaling", "yarn"), ("eos_token_id", True),
        ("eos_token_id", -1), ("eos_token_id", [[1]]), ("eos_token_id", 10**30),
    ],
)  # fmt: skip
def test_an_absurd_value_is_refused_on_disk_by_key_and_value(
    key: str, value: Any, tmp_path: Path
) -> None:
    folder = write(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    if key == "full_attention_interval":
        del config["text_config"]["layer_types"]
    config["text_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    options = EngineConfig(cache_dir=str(tmp_path / "cache"))
    for attempt in (open_model, inspect_model):
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=key):
            attempt(folder, options)
        assert time.monotonic() - start < 1


def test_a_count_of_layers_within_the_limits_is_refused_by_the_first_missing_tensor(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["layer_types"]
    config["text_config"] |= {"num_hidden_layers": 1024, "num_experts": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"layers\.0\."):
        open_model(folder, EngineConfig(cache_dir=str(tmp_path / "cache")))
    assert time.monotonic() - start < 1


def test_a_config_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    packed = open_model(folder, EngineConfig(gpu_expert_bits=16, cache_dir=str(tmp_path / "cache")))
    assert packed.config.vocab_size == CASE.vocab


def test_a_json_file_without_an_end_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.write(b'{"a": "')
        file.truncate(1 << 40)  # sparse
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"config.json has more than {MAX_JSON} bytes"):
        read_json(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * MAX_JSON


@pytest.mark.parametrize("text", ["1" * 5000, '{"a": ' + "1" * 5000 + "}", "[" * 10**6, "\ud800"])
def test_json_that_python_cannot_read_is_refused_by_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(path)
