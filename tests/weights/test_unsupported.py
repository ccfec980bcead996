"""Unsupported models are refused in one line: what they are, and what to use instead."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from osmium.cli import main
from osmium.config import EngineConfig
from osmium.errors import CheckpointError, ConfigError, OsmiumError
from osmium.weights import locate, open_model
from osmium.weights.synthetic import synthetic_name
from osmium.weights.unsupported import refuse_config, refuse_files, refuse_name
from tests.models.build import CASES, hf_config, write_checkpoint

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)

OURS = hf_config(CASES[0])

Files = Mapping[str, str | bytes | dict[str, Any]]


def write(folder: Path, files: Files) -> Path:
    """Write a folder with these files."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def refusal(model: str | Path, cache: Path) -> str:
    """The one-line error of opening a model; asserts that nothing is downloaded or packed."""
    with pytest.raises((ConfigError, CheckpointError)) as raised:
        open_model(model, EngineConfig(cache_dir=str(cache)))
    text = str(raised.value)
    assert "\n" not in text and len(text) < 420, text
    assert not list(cache.glob("*.osmium")), "nothing was packed"
    return text


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **named: Any) -> Any:
        raise AssertionError(f"downloads {args}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)


# -- folders ---------------------------------------------------------------------------------------

DENSE = {
    "model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"],
    "text_config": {"model_type": "qwen3_5_text", "num_hidden_layers": 32},
}  # fmt: skip


def moe(model_type: str, key: str, count: int = 64) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": ["XForCausalLM"], key: count}


FOLDERS: dict[str, tuple[Files, tuple[str, ...]]] = {
    "empty": ({}, ("empty folder", "hub id")),
    "hidden files only": ({".gitattributes": "x"}, ("empty folder",)),
    "gguf": ({"x-Q4_K_M.gguf": b"GGUF\3\0\0\0"}, ("GGUF", "not supported yet", "BF16")),
    "gguf with a config": (
        {"config.json": OURS, "tokenizer.json": "{}", "Q4/x-00001-of-2.gguf": b"GGUF"},
        ("GGUF", "not supported yet"),
    ),
    "mistral": (
        {"params.json": {}, "consolidated.safetensors": b"x", "tekken.json": "{}"},
        ("Mistral", "consolidated", "BF16"),
    ),
    "mistral with a config": (
        {"config.json": moe("mixtral", "num_local_experts", 8), "params.json": {},
         "consolidated-00001-of-2.safetensors": b"x"},
        ("Mistral", "consolidated"),
    ),
    "llama's own": ({"params.json": {}, "consolidated.00.pth": b"x"}, ("Llama", "consolidated")),
    "adapter": (
        {"adapter_config.json": {"base_model_name_or_path": "Qwen/Qwen3.5-35B-A3B"},
         "adapter_model.safetensors": b"x", "tokenizer.json": "{}"},
        ("adapter", "of Qwen/Qwen3.5-35B-A3B", "merge"),
    ),
    "adapter with a config": (
        {"config.json": OURS, "adapter_config.json": "broken", "adapter_model.bin": b"x"},
        ("adapter", "merge"),
    ),
    "diffusers": (
        {"model_index.json": {"_class_name": "FluxPipeline"}, "vae/config.json": {},
         "transformer/diffusion_pytorch_model.safetensors": b"x"},
        ("diffusers", "language models"),
    ),
    "part of diffusers": (
        {"config.json": {"_class_name": "UNet2DConditionModel"}, "x.safetensors": b"x"},
        ("UNet2DConditionModel", "language models"),
    ),
    "onnx": ({"config.json": DENSE, "onnx/model.onnx": b"x"}, ("ONNX", "BF16")),
    "pickles": (
        {"config.json": OURS, "pytorch_model-00001-of-00002.bin": b"x"},
        ("PyTorch", "pytorch_model-00001-of-00002.bin", "BF16"),
    ),
    "other frameworks": ({"config.json": OURS, "tf_model.h5": b"x"}, ("tf_model.h5", "BF16")),
    "tokenizer": ({"tokenizer.json": "{}", "tokenizer_config.json": "{}"}, ("tokenizer", "BF16")),
    "config alone": ({"config.json": OURS, "tokenizer.json": "{}"}, ("not complete", "weights")),
    "index without shards": (
        {"config.json": OURS, "model.safetensors.index.json": {"weight_map": {"a": "b"}}},
        ("not complete", "weights"),
    ),
    "no config": ({"model.safetensors": b"x"}, ("no config.json", "beside")),
    "packed files": ({"a.osmium": b"OSMIUM\0\1"}, ("packed", "a.osmium")),
    "archive": ({"model.tar.gz": b"x"}, ("archive", "unpack")),
    "one inside": (
        {"README.md": "x", "Qwen3.5/config.json": OURS, "Qwen3.5/model.safetensors": b"x"},
        ("in a subfolder", "/Qwen3.5"),
    ),
    "a hub cache": (
        {"refs/main": "abc", "snapshots/abc/config.json": OURS,
         "snapshots/abc/model.safetensors": b"x"},
        ("in a subfolder", "/snapshots/abc"),
    ),
    "several inside": (
        {"a/config.json": OURS, "b/config.json": OURS}, ("/a", "another of the 2"),
    ),
    "something else": ({"notes.txt": "x"}, ("no config.json", "BF16")),
    "weights are pointers": (
        {"config.json": OURS, "model.safetensors": POINTER},
        ("git-lfs", "model.safetensors", "git lfs pull"),
    ),
    "the tokenizer is a pointer": (
        {"config.json": OURS, "model.safetensors": b"x" * 5000, "tokenizer.json": POINTER},
        ("git-lfs", "tokenizer.json", "git lfs pull"),
    ),
    "dense": (
        {"config.json": DENSE, "model.safetensors": b"x"},
        ("dense", "qwen3_5)", "qwen3_5_moe", "Qwen/Qwen3.5-35B-A3B"),
    ),
    "llama": (
        {"config.json": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
         "model.safetensors": b"x"},
        ("dense", "llama", "Qwen/Qwen3.5-35B-A3B"),
    ),
    "qwen3_moe": (
        {"config.json": moe("qwen3_moe", "num_experts", 128), "model.safetensors": b"x"},
        ("another family", "qwen3_moe", "128 experts"),
    ),
    "mixtral": (
        {"config.json": moe("mixtral", "num_local_experts", 8), "model.safetensors": b"x"},
        ("another family", "mixtral", "8 experts"),
    ),
    "deepseek": (
        {"config.json": moe("deepseek_v3", "n_routed_experts", 256), "model.safetensors": b"x"},
        ("another family", "deepseek_v3", "256 experts"),
    ),
    "experts in text_config": (
        {"config.json": {"model_type": "llama4", "text_config": {"num_local_experts": 16}},
         "model.safetensors": b"x"},
        ("another family", "llama4", "16 experts"),
    ),
    "a classifier": (
        {"config.json": {"model_type": "bert", "architectures": ["BertForSequenceClassification"]},
         "model.safetensors": b"x"},
        ("no text-generation model", "BertForSequenceClassification"),
    ),
    "an encoder and a decoder": (
        {"config.json": {"model_type": "t5", "is_encoder_decoder": True}, "x.safetensors": b"x"},
        ("encoder-decoder", "t5"),
    ),
    "no model_type": ({"config.json": {"a": 1}, "x.safetensors": b"x"}, ("no model_type",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_another_kind_is_refused_by_kind(tmp_path: Path, kind: str) -> None:
    files, words = FOLDERS[kind]
    folder = write(tmp_path / "model", files)
    text = refusal(folder, tmp_path / "cache")
    assert str(folder) in text
    for word in words:
        assert word in text


QUANTISED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("gptq, 4 bits",)),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ("awq, 4 bits",)),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, ("(fp8)",)),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        ("bitsandbytes, 4 bits",),
    ),
    "compressed-tensors": (
        {"quantization_config": {"quant_method": "compressed-tensors"}}, ("compressed-tensors",),
    ),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, ("MLX, 4 bits",)),
    "unnamed": ({"quantization_config": {"bits": 8}}, ("unknown, 8 bits",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_checkpoint_is_refused_by_its_method(tmp_path: Path, kind: str) -> None:
    more, words = QUANTISED[kind]
    write(tmp_path / "model", {"config.json": {**OURS, **more}, "model.safetensors": b"x"})
    text = refusal(tmp_path / "model", tmp_path / "cache")
    for word in ("quantised", "not supported yet", "BF16", *words):
        assert word in text


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_a_quantised_checkpoint_is_recognised_by_a_file_next_to_its_config(
    tmp_path: Path, name: str
) -> None:
    write(tmp_path / "model", {"config.json": OURS, name: {}, "model.safetensors": b"x"})
    assert name in refusal(tmp_path / "model", tmp_path / "cache")


@pytest.mark.parametrize(
    "name", ["Qwen3.5-35B-A3B-FP8", "Qwen3.5-35B-A3B-GPTQ-Int4", "Qwen3.5-35B-A3B-4bit"]
)
def test_refusing_a_quantised_model_names_the_plain_one(name: str) -> None:
    config = {**OURS, "quantization_config": {"quant_method": "x"}}
    with pytest.raises(CheckpointError, match=r"use Qwen/Qwen3\.5-35B-A3B, which"):
        refuse_config(config, f"someone/{name}")


@pytest.mark.parametrize("empty", [None, {}, []])
def test_an_empty_quantisation_config_is_accepted(empty: Any) -> None:
    refuse_config({**OURS, "quantization_config": empty}, "x/y")


def test_a_supported_checkpoint_is_accepted(tmp_path: Path) -> None:
    """Also with files of other formats next to its own, as in published repositories."""
    write_checkpoint(CASES[0], tmp_path / "model")
    write(tmp_path / "model", {
        "consolidated.safetensors": b"x", "onnx/model.onnx": b"x", "original/params.json": "{}",
        "pytorch_model.bin": b"x", "adapter_config.json": "{}", "x.gguf": b"GGUF",
    })  # fmt: skip
    (tmp_path / "model" / "consolidated.safetensors").unlink()  # shards are all *.safetensors
    found = open_model(
        tmp_path / "model", EngineConfig(cache_dir=str(tmp_path), gpu_expert_bits=16)
    )
    found.verify()


def test_repositories_are_checked_by_their_file_names() -> None:
    refuse_files(["config.json", "model-00001-of-00002.safetensors", "x.gguf"], "owner/name")
    with pytest.raises(ConfigError, match="owner/name holds GGUF"):
        refuse_files(["README.md", "BF16/x-00001-of-00002.gguf"], "owner/name")


# -- files -----------------------------------------------------------------------------------------

FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "gguf": ("x.gguf", b"GGUF\3", ("GGUF", "BF16")),
    "gguf by its first bytes": ("model.dat", b"GGUF\3\0", ("GGUF",)),
    "a shard": ("model-00001-of-00009.safetensors", b"x", ("one file", "folder")),
    "an index": ("model.safetensors.index.json", b"{}", ("one file", "folder")),
    "config.json": ("config.json", b"{}", ("one file", "folder")),
    "tokenizer.json": ("tokenizer.json", b"{}", ("one file", "folder")),
    "an adapter": ("adapter_model.safetensors", b"x", ("adapter", "merge")),
    "mistral": ("consolidated.safetensors", b"x", ("Mistral",)),
    "a pickle": ("pytorch_model.bin", b"PK", ("PyTorch", "BF16")),
    "onnx": ("model.onnx", b"x", ("ONNX",)),
    "an archive": ("model.zip", b"PK", ("archive", "unpack")),
    "a pointer": ("model.safetensors", POINTER.encode(), ("git-lfs", "git lfs pull")),
    "a packed pointer": ("demo.osmium", POINTER.encode(), ("git-lfs", "git lfs pull")),
    "a web page": ("model.safetensors", b"<!DOCTYPE html><html>", ("web page", "again")),
    "a Modelfile": ("Modelfile", b"FROM qwen3:8b", ("Ollama", "BF16")),
    "anything": ("notes.txt", b"hello", ("not a packed file",)),
    "nothing": ("empty.osmium", b"", ("not a packed file",)),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind_is_refused_by_kind(tmp_path: Path, kind: str) -> None:
    name, content, words = FILES[kind]
    (tmp_path / name).write_bytes(content)
    text = refusal(tmp_path / name, tmp_path / "cache")
    for word in (str(tmp_path), *words):
        assert word in text


# -- names -----------------------------------------------------------------------------------------

NAMES: dict[str, tuple[str, ...]] = {
    "https://huggingface.co/Qwen/Qwen3.5-35B-A3B": ("web address", ": Qwen/Qwen3.5-35B-A3B"),
    "https://huggingface.co/Qwen/Qwen3.5-35B-A3B/tree/main": (": Qwen/Qwen3.5-35B-A3B",),
    "huggingface.co/Qwen/Qwen3.5-35B-A3B": (": Qwen/Qwen3.5-35B-A3B",),
    "hf.co/Qwen/Qwen3.5-35B-A3B?library=x": (": Qwen/Qwen3.5-35B-A3B",),
    "hf://Qwen/Qwen3.5-35B-A3B": (": Qwen/Qwen3.5-35B-A3B",),
    "https://huggingface.co/unsloth/Qwen3.5-35B-A3B-GGUF": ("GGUF", "BF16"),
    "https://huggingface.co/o/n/blob/main/x-Q4_K_M.gguf": ("GGUF", "BF16"),
    "hf.co/unsloth/Qwen3.5-35B-A3B-GGUF:Q4_K_M": ("GGUF", "BF16"),
    "https://example.org/model.safetensors": ("web address", "download"),
    "file:///srv/models/x": ("address", ": /srv/models/x"),
    "unsloth/Qwen3.5-35B-A3B-GGUF": ("GGUF", "not supported yet", "BF16"),
    "unsloth/Qwen3.5-35B-A3B-gguf:Q4_K_M": ("GGUF",),
    "turboderp/Qwen3.5-35B-A3B-exl3": ("EXL", "BF16"),
    "/no/such/place/x.gguf": ("GGUF",),
    "qwen3:8b": ("Ollama", "GGUF", "BF16"),
    "hf/qwen3:8b": ("tag '8b'", "hf/qwen3"),
    "owner/name@v2": ("revision 'v2'", "owner/name"),
    "syntetic:tiny": ("synthetic:tiny",),
    "Synthetc:tiny": ("synthetic:tiny",),
    "C:\\Users\\me\\model": ("Windows path", "/mnt/c/Users/me/model"),
    "d:/models/x": ("Windows path", "/mnt/d/models/x"),
    "\\\\wsl.localhost\\Ubuntu\\home\\me\\x": ("Windows path", "write /home/me/x"),
    "\\\\wsl$\\Ubuntu\\home\\me\\x": ("Windows path", "write /home/me/x"),
    "\\\\server\\share\\x": ("network", "copy"),
    "models\\x": ("backslashes", "models/x"),
    "qwen3.5-35b-a3b": ("owner", "Qwen/Qwen3.5-35B-A3B"),
    "no-such-model": ("neither a folder",),
    "./no/such/model": ("neither a folder",),
    "a/b/c": ("neither a folder",),
    "x" * 5000: ("cannot be opened",),
    "~no-such-user/model": ("cannot be opened",),
    "a\0b": ("neither", "folder"),
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:40])
def test_a_name_of_another_kind_is_refused_by_kind(tmp_path: Path, name: str) -> None:
    text = refusal(name, tmp_path)
    for word in NAMES[name]:
        assert word in text


@pytest.mark.parametrize(
    "name",
    ["Qwen/Qwen3.5-35B-A3B", "owner/gguffy-model", "a-b/c.d", "x/exl20", "./x", "/a/b/c",
     "Tell me: why?", "What is gguf", "Why: because", "A \\ B", "mail me @home", "hi", "a:"],
)  # fmt: skip
def test_hub_ids_paths_and_sentences_are_valid_names(name: str) -> None:
    refuse_name(name)


def test_an_existing_folder_takes_precedence_over_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("owner/model-GGUF", "./demo", "qwen3:8b"):
        write_checkpoint(CASES[0], tmp_path / name)
        assert locate(name) == Path(name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {"config.json": OURS})
    folder.chmod(0)
    try:
        assert "cannot be" in refusal(folder, tmp_path / "cache")
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("name", ["Synthetic:tiny", "SYNTHETIC:Qwen3.5-35B-A3B:2"])
def test_synthetic_names_are_case_insensitive(name: str) -> None:
    assert synthetic_name(name) == name.lower()
    assert synthetic_name("owner/name") is None and synthetic_name(None) is None


def test_a_refusal_is_one_line_and_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "model", {"x.gguf": b"GGUF"})
    for command in (["plan"], ["run", "--device", "cpu"], ["serve", "--device", "cpu"]):
        for model in (str(folder), "qwen3:8b", "unsloth/x-GGUF"):
            prompt = ["hi"] if command[0] == "run" else []
            assert main([*command, model, *prompt]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("osmium: ") and "GGUF" in line
    assert issubclass(ConfigError, OsmiumError)
