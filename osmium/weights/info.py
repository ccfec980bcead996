"""What is known of a model without its weights: shapes, files, and where they are or will be."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from osmium.config import ModelConfig
from osmium.quant.expert_layout import ExpertLayout
from osmium.weights.checkpoint import Formats, TensorSpec, tensor_specs
from osmium.weights.disk import DiskNeed
from osmium.weights.hub import HubModel
from osmium.weights.packed import FILES, PackedModel
from osmium.weights.packing import packed_size
from osmium.weights.shards import Shards
from osmium.weights.synthetic import Synthetic

__all__ = [
    "ModelInfo", "folder_info", "hub_info", "packed_info", "shapes_info", "synthetic_info",
]  # fmt: skip


Kind = Literal["packed", "folder", "hub", "synthetic"]


@dataclass(frozen=True)
class ModelInfo:
    """A model before it is loaded.  `config`, `formats`, `record` and `parts` are as Packed's."""

    name: str
    """As it was named: a path, a hub id, synthetic:NAME."""
    kind: Kind
    config: ModelConfig
    formats: Formats
    record: ExpertLayout
    parts: dict[str, TensorSpec]
    """Everything but the routed experts, by our names."""
    packed_path: Path | None = None
    """Where the packed file is or will be; None for what needs none."""
    packed_bytes: int = 0
    """Its size, which is what a start reads."""
    is_packed: bool = True
    """Whether it is there."""
    checkpoint_bytes: int | None = 0
    """Of the .safetensors files; 0 where there are none, None where that is not known."""
    download_bytes: int | None = 0
    """Of what is not on this machine yet; None where that is not known."""
    download_to: Path | None = None
    """The hub's cache, where something is downloaded."""

    @property
    def disk_needs(self) -> list[DiskNeed]:
        """What loading it writes to disk, beyond what a stopped packing has left to go on from."""
        if self.is_packed or self.packed_path is None:
            return []
        partial = self.packed_path.with_name(self.packed_path.name + ".partial")
        begun = partial.stat().st_blocks * 512 if partial.is_file() else 0
        pack = max(0, self.packed_bytes - begun)
        found = [DiskNeed("the packed file", self.packed_path.parent, pack, "--cache-dir")]
        if self.download_to is not None and self.download_bytes:
            fetch = self.download_bytes
            found.insert(0, DiskNeed("the checkpoint", self.download_to, fetch, "HF_HOME"))
        return found


def shapes_info(
    name: str,
    config: ModelConfig,
    formats: Formats,
    kind: Kind = "synthetic",
) -> ModelInfo:
    """A model of these shapes.  Raises: CheckpointError, ConfigError where formats do not suit."""
    record = ExpertLayout(formats.expert_bits, config.hidden_size, config.moe_intermediate_size)
    parts = {part.name: part for part in tensor_specs(config, formats)}
    return ModelInfo(name, kind, config, formats, record, parts)


def synthetic_info(made_up: Synthetic) -> ModelInfo:
    """Of a made-up model, which needs no file."""
    return shapes_info(str(made_up.path), made_up.config, made_up.formats)


def packed_info(name: str, packed: PackedModel, kind: Kind = "packed") -> ModelInfo:
    """Of a packed file, or of a model whose packed file is there."""
    return ModelInfo(
        name, kind, packed.config, packed.formats, packed.record, packed.parts,
        packed.path, packed.path.stat().st_size,
    )  # fmt: skip


def folder_info(
    folder: Path, name: str, config: ModelConfig, formats: Formats, shards: Shards, target: Path
) -> ModelInfo:
    """Of a checkpoint folder that is not packed yet."""
    sizes = {file: (folder / file).stat().st_size for file in FILES if (folder / file).is_file()}
    checkpoint = sum(file.stat().st_size for file in shards.files)
    return _unpacked(name, "folder", config, formats, target, sizes, checkpoint)


def hub_info(model: HubModel, config: ModelConfig, formats: Formats, target: Path) -> ModelInfo:
    """Of a model on the hub that is not packed yet."""
    sizes = {file: model.files[file].nbytes or 0 for file in FILES if file in model.files}
    made = _unpacked(model.name, "hub", config, formats, target, sizes, model.checkpoint_bytes)
    return replace(made, download_bytes=model.download_bytes, download_to=model.cache)


def _unpacked(
    name: str,
    kind: Kind,
    config: ModelConfig,
    formats: Formats,
    target: Path,
    files: Mapping[str, int],
    checkpoint_bytes: int | None,
) -> ModelInfo:
    made = shapes_info(name, config, formats, kind)
    return replace(
        made,
        packed_path=target,
        packed_bytes=packed_size(made, files),
        is_packed=False,
        checkpoint_bytes=checkpoint_bytes,
    )
