"""What a model's small files say, as it arrives in an engine: end tokens, defaults, templates."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import osmium
from osmium.config import MAX_EOS, ModelConfig
from osmium.errors import CheckpointError
from tests.models.build import hf_config
from tests.text.byte_level import byte_level_json
from tests.weights.files import CASE, write

IM_END = 263
"""The id of `<|im_end|>`."""


@contextlib.contextmanager
def loaded(
    folder: Path, generation: dict[str, Any] | None, **config: Any
) -> Iterator[osmium.Engine]:
    """An engine for a tiny checkpoint with these files."""
    write(folder)
    (folder / "tokenizer.json").write_bytes(byte_level_json())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    engine = osmium.load(folder, "cpu", cache_dir=str(folder / "cache"), context=16)
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize(
    "generation, eos_token, wanted",
    [
        (None, "<|im_end|>", (0, IM_END)),
        ({"eos_token_id": [5, 7]}, "<|im_end|>", (0, 5, 7, IM_END)),
        ({"eos_token_id": 5}, {"content": "<|im_end|>"}, (0, 5, IM_END)),
        ({}, None, (0,)),
        ({"eos_token_id": None}, "<nowhere>", (0, 266)),
    ],
)
def test_the_end_tokens_of_all_three_files_count(
    generation: dict[str, Any] | None, eos_token: Any, wanted: tuple[int, ...], tmp_path: Path
) -> None:
    with loaded(tmp_path, generation, eos_token=eos_token) as engine:
        assert engine.config.eos_token_ids == wanted


def test_an_endless_list_of_end_tokens_is_refused() -> None:
    config = hf_config(CASE)
    ModelConfig.from_hf(config, {"eos_token_id": list(range(MAX_EOS))})
    with pytest.raises(CheckpointError, match="eos_token_id"):
        ModelConfig.from_hf(config, {"eos_token_id": list(range(MAX_EOS + 1))})


def test_bad_defaults_are_named_once_at_load_and_reach_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generation = {"top_k": 20.0, "temperature": 1e9, "top_p": -1}
    with caplog.at_level(logging.WARNING), loaded(tmp_path, generation) as engine:
        assert engine.defaults == {"top_k": 20}
        list(engine.generate([1, 2], osmium.SamplingParams(**engine.defaults, max_tokens=1)))
    (line,) = [r.getMessage() for r in caplog.records if "generation_config" in r.getMessage()]
    for name in generation:
        assert name in line


def test_weights_that_are_left_out_are_named_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("._model.safetensors", "consolidated.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    with caplog.at_level(logging.WARNING), loaded(tmp_path, None):
        pass
    (line,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "model.safetensors; left out: ._model" in line and "consolidated" in line


def test_a_template_of_chat_template_json_renders_messages(tmp_path: Path) -> None:
    legacy = {"chat_template": "{{ messages[0].content }}{{ eos_token }}"}
    (tmp_path / "chat_template.json").write_text(json.dumps(legacy))
    with loaded(tmp_path, None, eos_token="<|im_end|>") as engine:
        assert engine.template is not None
        assert engine.template.render([{"role": "user", "content": "Hi"}]) == "Hi<|im_end|>"
