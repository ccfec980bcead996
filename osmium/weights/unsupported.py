"""Recognises models that Osmium does not run, by names and small files.

Each error is one line: the kind of model, that it is not supported, and the alternative.  These
functions read file names, config.json and first bytes, without weights and network.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from osmium.errors import CheckpointError, ConfigError, shown
from osmium.weights.choosing import is_weight_file
from osmium.weights.shards import read_json

__all__ = [
    "refuse_checkpoint", "refuse_config", "refuse_file", "refuse_files", "refuse_folder",
    "refuse_name",
]  # fmt: skip

SUPPORTED = (
    "Qwen/Qwen3.5-35B-A3B", "Qwen/Qwen3.5-122B-A10B", "Qwen/Qwen3.5-397B-A17B",
    "Qwen/Qwen3.6-35B-A3B",
)  # fmt: skip
"""Hub ids of the supported models."""

MODEL_TYPE = "qwen3_5_moe"

_USE = f"use a BF16 safetensors checkpoint such as {SUPPORTED[0]}"
_QUANTISES = f"{_USE}, which Osmium quantises itself (--gpu-expert-bits 4)"

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
SMALL = 4096
"""Bytes; larger files are no git-lfs pointers, which have 130."""

MAX_ENTRIES = 2000
"""Files of a folder that are examined, at most."""


# -- names ---------------------------------------------------------------------------------------

_HUB = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:models/)?([\w.-]+/[\w.-]+)(.*)|"
    r"hf://(?:models/)?([\w.-]+/[\w.-]+)(.*)"
)
_DRIVE = re.compile(r"([A-Za-z]):[\\/](.*)", re.S)
_WSL = re.compile(r"\\\\wsl(?:\.localhost|\$)\\[^\\]+\\(.*)", re.S)
_GGUF = re.compile(r"(?:^|[-_. ])gguf(?:$|[-_.:@ ])", re.I)
_EXL = re.compile(r"(?:^|[-_. ])exl[23](?:$|[-_.:@ ])", re.I)


def refuse_name(name: str) -> None:
    """Raise an error for a model argument that is no path on this machine and no hub id.

    Raises: ConfigError.  Returns for names that are not recognised.
    """
    _refuse_windows_path(name)
    if any(map(str.isspace, name)):
        return  # a sentence, or a path
    if found := _HUB.match(name):
        hub_id, rest = found[1] or found[3], found[2] or found[4]
        _refuse_format(name, f"{hub_id.partition('/')[2]} {rest}".replace("/", " "))
        raise ConfigError(f"{name} is a web address; give the hub id instead: {hub_id}")
    if found := re.match(r"file://(?:localhost)?(/.*)", name):
        raise ConfigError(f"{name} is an address; give the path instead: {found[1]}")
    if re.match(r"\w+://|www\.", name):
        raise ConfigError(
            f"{name} is a web address of no known hub; download the checkpoint and give its "
            f"folder, or give a hub id such as {SUPPORTED[0]}."
        )
    owner, slash, rest = name.rpartition("/")
    _refuse_format(name, rest)
    if name.startswith((".", "/", "~")) or "/" in owner:
        return  # a path that does not exist
    version = re.fullmatch(r"([\w.-]+)([:@])([\w.:-]+)", rest)
    base, mark, tag = version.groups() if version else (rest, "", "")
    if mark and slash:
        what = "tag" if mark == ":" else "revision"
        raise ConfigError(
            f"{name} has the {what} {tag!r}, which a hub id cannot have; give {owner}/{base}, or "
            "download that version and give its folder."
        )
    if mark == ":":
        if difflib.get_close_matches(base.lower(), ["synthetic"], cutoff=0.7):
            raise ConfigError(f"There is no {base}:; write synthetic:{tag}")
        raise ConfigError(
            f"{name} looks like a model of Ollama, whose GGUF files are not supported yet; {_USE}."
        )
    if not slash:
        for supported in SUPPORTED:
            if rest.lower() == supported.partition("/")[2].lower():
                raise ConfigError(
                    f"{name} is no path on this machine, and hub ids have an owner: {supported}"
                )


def _refuse_windows_path(name: str) -> None:
    drive, wsl = _DRIVE.fullmatch(name), _WSL.fullmatch(name)
    if drive:
        linux_path = f"/mnt/{drive[1].lower()}/{drive[2]}"
    elif wsl:
        linux_path = f"/{wsl[1]}"
    elif name.startswith("\\\\"):
        raise ConfigError(
            f"{name} is a Windows path on the network; copy the model to a local disk and give "
            "that path."
        )
    elif "\\" in name and not any(map(str.isspace, name)):
        raise ConfigError(f"{name} has backslashes; write {name.replace(chr(92), '/')}")
    else:
        return
    linux_path = linux_path.replace("\\", "/")
    raise ConfigError(f"{name} is a Windows path; under WSL write {linux_path}")


def _refuse_format(name: str, words: str) -> None:
    """Recognise a format by words of a repository's or file's name.  Raises: ConfigError."""
    if _GGUF.search(words):
        _refuse_gguf(name, "is a GGUF model")
    if _EXL.search(words):
        raise ConfigError(f"{name} is an EXL model, which is not supported; {_QUANTISES}.")


def _refuse_gguf(where: object, what: str) -> NoReturn:
    raise ConfigError(
        f"{where} {what} (llama.cpp's format), which is not supported yet; {_QUANTISES}."
    )


# -- files ---------------------------------------------------------------------------------------

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pdparams")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_OTHER_FRAMEWORKS = (".h5", ".msgpack", ".tflite", ".mlmodel", ".mlpackage", ".npz", ".pb")
_OF_A_CHECKPOINT = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
)  # fmt: skip


def refuse_file(path: Path) -> None:
    """Raise an error for a file that is recognised and no packed file.  Raises: ConfigError."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    if head.startswith(b"OSMIUM"):
        return
    name, folder = path.name, path.parent
    lower = name.lower()
    if head.startswith(LFS_POINTER):
        _refuse_pointers(path, "is a pointer of git-lfs", folder)
    if head.startswith(b"GGUF") or lower.endswith(".gguf"):
        _refuse_gguf(path, "is a GGUF file")
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise ConfigError(f"{path} is a web page, saved in place of a file; download it again.")
    if lower == "modelfile":
        raise ConfigError(f"{path} is a Modelfile of Ollama, which is not supported; {_USE}.")
    if lower.endswith(".safetensors") and not is_weight_file(lower):
        refuse_files([name], str(folder))
    if lower.endswith((".safetensors", ".safetensors.index.json")) or lower in _OF_A_CHECKPOINT:
        raise ConfigError(
            f"{path} is one file of a checkpoint; give the folder that holds it and its "
            f"config.json: {folder}"
        )
    if lower.endswith(_ARCHIVES):
        raise ConfigError(f"{path} is an archive; unpack it and give the checkpoint's folder.")
    if not lower.endswith(".osmium"):
        refuse_files([name], str(path))


def refuse_files(names: Collection[str], where: str, base: str | None = None) -> None:
    """Raise an error for a folder or repository whose files are no safetensors checkpoint.

    `names` are relative to it.  `base` is the base model of an adapter.  Raises: ConfigError.
    """
    lower = [name.lower() for name in names]
    top = {name for name in lower if "/" not in name}
    shards = any(is_weight_file(name) for name in top)

    def first(*suffixes: str) -> str | None:
        return next((name for name in sorted(lower) if name.endswith(suffixes)), None)

    if "model_index.json" in top:
        raise ConfigError(
            f"{where} is an image or video pipeline of diffusers, which is not supported; Osmium "
            f"runs language models: {_USE}."
        )
    if not shards and any(name.startswith("adapter_") for name in top):
        of = f" of {base}" if base else ""
        raise ConfigError(
            f"{where} is an adapter (LoRA){of}, which is not supported yet; merge it into its base "
            "model (PEFT's merge_and_unload) and give the merged folder."
        )
    if shards and "config.json" in top:
        return
    if first(".gguf"):
        _refuse_gguf(where, "holds GGUF files")
    if "params.json" in top or any(name.startswith("consolidated") for name in top):
        raise ConfigError(
            f"{where} has the original layout of Mistral or Llama (params.json, consolidated "
            f"weights), which is not supported; {_USE}."
        )
    if first(".onnx"):
        raise ConfigError(f"{where} is an ONNX model, which is not supported; {_USE}.")
    if not shards and first(*_PICKLES):
        raise ConfigError(
            f"{where} has PyTorch weights ({first(*_PICKLES)}), which are not supported, as "
            f"reading them can run code; {_USE}."
        )
    if not shards and first(*_OTHER_FRAMEWORKS):
        raise ConfigError(
            f"{where} has weights of another framework ({first(*_OTHER_FRAMEWORKS)}), which are "
            f"not supported; {_USE}."
        )


# -- folders -------------------------------------------------------------------------------------


def refuse_folder(path: Path) -> NoReturn:
    """Raise an error that names the kind of a folder without config.json.  Raises: ConfigError."""
    names = _names(path)
    if not names:
        raise ConfigError(
            f"{path} is an empty folder; give a checkpoint's folder, a packed file or a hub id."
        )
    refuse_files(names, str(path), _adapter_base(path))
    packed = sorted(name for name in names if name.endswith(".osmium") and "/" not in name)
    if packed:
        raise ConfigError(f"{path} is a folder of packed files; give one: {path / packed[0]}")
    inside = sorted({str(PurePosixPath(n).parent) for n in names if n.endswith("/config.json")})
    if inside:
        others = f" (or another of the {len(inside)} in it)" if len(inside) > 1 else ""
        raise ConfigError(
            f"{path} has a checkpoint in a subfolder; give {path / inside[0]}{others}"
        )
    if any(name.endswith(".safetensors") for name in names):
        raise ConfigError(
            f"{path} has .safetensors files and no config.json; put the model's config.json and "
            "tokenizer files beside them."
        )
    if any(name.startswith("tokenizer") for name in names):
        raise ConfigError(f"{path} holds a tokenizer and no model; {_USE}.")
    if any(name.lower().endswith(_ARCHIVES) for name in names):
        raise ConfigError(f"{path} holds an archive; unpack it and give the checkpoint's folder.")
    raise ConfigError(f"{path} has no config.json, so it is no checkpoint; {_USE}.")


def refuse_checkpoint(path: Path) -> None:
    """Raise an error for a folder that is no supported checkpoint.

    Raises: ConfigError, CheckpointError.
    """
    if not (path / "config.json").is_file():
        refuse_folder(path)
    names = _names(path)
    refuse_files(names, str(path), _adapter_base(path))
    pointers = [
        name
        for name in names
        if "/" not in name
        and (is_weight_file(name) or name.endswith(".json"))
        and _is_pointer(path / name)
    ]
    if pointers:
        _refuse_pointers(path, f"has a pointer of git-lfs in place of {sorted(pointers)[0]}", path)
    config = _json(path / "config.json")
    if config is not None:
        refuse_config(config, str(path), names)
    if not any(is_weight_file(name) for name in names):
        raise CheckpointError(
            f"{path} has a config.json and no .safetensors file; the download is not complete: "
            "download the weights too."
        )


def _refuse_pointers(where: object, what: str, folder: Path) -> NoReturn:
    raise CheckpointError(f"{where} {what}, not the file itself; run `git lfs pull` in {folder}.")


def _names(path: Path) -> list[str]:
    """Relative paths of the readable files of a folder and of its subfolders, two levels deep."""
    names: list[str] = []
    folders = [(path, 0)]
    while folders and len(names) < MAX_ENTRIES:
        folder, depth = folders.pop(0)
        try:
            entries = sorted(folder.iterdir())[:MAX_ENTRIES]
        except OSError as error:
            if folder == path:
                raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if depth < 2:
                    folders.append((entry, depth + 1))
            else:
                names.append(entry.relative_to(path).as_posix())
    return names


def _is_pointer(path: Path) -> bool:
    try:
        if not path.is_file() or path.stat().st_size > SMALL:
            return False  # opening a pipe would wait for a writer
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def _json(path: Path) -> dict[str, Any] | None:
    """A small JSON object; None if it is missing or invalid, which other functions report."""
    try:
        return read_json(path)
    except CheckpointError:
        return None


def _adapter_base(path: Path) -> str | None:
    base = (_json(path / "adapter_config.json") or {}).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


# -- config.json ---------------------------------------------------------------------------------

_EXPERT_COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts",
    "num_routed_experts",
)  # fmt: skip

_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")

_QUANTISED = re.compile(
    r"[-_](?:FP8(?:[-_]\w+)?|NVFP4|MXFP[48]|(?:GPTQ|AWQ)(?:[-_]\w+)*|Int[48]|[348]bit|"
    r"bnb[-_]\w+|w[48]a(?:16|8))$",
    re.I,
)


def refuse_config(config: Mapping[str, Any], where: str, names: Collection[str] = ()) -> None:
    """Raise an error for a config.json of another model family or a quantised checkpoint.

    `names` are the files beside it.  Raises: CheckpointError.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        if "_class_name" in config:
            name = shown(config["_class_name"])
            raise CheckpointError(
                f"{where} is a part of a diffusers pipeline ({name}), which is not "
                f"supported; Osmium runs language models: {_USE}."
            )
        raise CheckpointError(
            f"config.json of {where} has no model_type, so Osmium cannot run it; {_USE}."
        )
    if model_type.removesuffix("_text") != MODEL_TYPE:
        raise CheckpointError(
            f"{where} is {_family(config)} (model_type {shown(model_type)[1:-1]}), which is not "
            f"supported yet; this version runs {MODEL_TYPE}: {', '.join(SUPPORTED)}."
        )
    method = _quantisation(config, names)
    if method:
        plain = _QUANTISED.sub("", where.rstrip("/").rpartition("/")[2])
        matches = [name for name in SUPPORTED if name.endswith("/" + plain)]
        fix = f"use {matches[0]}, which Osmium quantises itself" if matches else _QUANTISES
        raise CheckpointError(
            f"{where} is quantised ({method}), which is not supported yet; {fix}."
        )


def _family(config: Mapping[str, Any]) -> str:
    """The kind of model in words, for the error."""
    text = config.get("text_config")
    configs = [config, text] if isinstance(text, Mapping) else [config]
    ffn = config.get("ffn_config")
    configs += [ffn] if isinstance(ffn, Mapping) else []
    if config.get("is_encoder_decoder") is True:
        return "an encoder-decoder model"
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if name and not name.endswith(_GENERATES):
        return f"no text-generation model but {shown(name)[1:-1]}"
    for section in configs:
        for key in _EXPERT_COUNTS:
            count = section.get(key)
            if isinstance(count, int) and count > 1:
                return f"a Mixture-of-Experts model of another family, of {shown(count)} experts"
    return "a dense model"


def _quantisation(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """The quantisation method of a checkpoint; None for one in full precision."""
    for key in ("quantization_config", "quantization"):  # of transformers, and of MLX
        value = config.get(key)
        if not isinstance(value, Mapping) or not value:
            continue
        method = value.get("quant_method") or ("MLX" if key == "quantization" else "unknown")
        method = method if isinstance(method, str) and len(method) < 60 else shown(method)
        bits = value.get("bits") or (4 if value.get("load_in_4bit") else None)
        return f"{method}, {shown(bits)} bits" if bits else method
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
        if name in names:
            return name
    return None
