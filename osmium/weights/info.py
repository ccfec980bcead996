"""A model without its weights: shapes, file sizes, and paths of files that exist or will exist."""

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
    """A model before it is loaded; `config`, `formats`, `layout`, `parts` as in PackedModel."""

    name: str
    """The model argument: a path, a hub id, or synthetic:NAME."""
    kind: Kind
    config: ModelConfig
    formats: Formats
    layout: ExpertLayout
    parts: dict[str, TensorSpec]
    """All tensors but the routed experts', by Osmium's names."""
    packed_path: Path | None = None
    """Path of the packed file, existing or not; None for a synthetic model."""
    packed_bytes: int = 0
    """Size of the packed file, which a start reads."""
    is_packed: bool = True
    """Whether the packed file exists."""
    checkpoint_bytes: int | None = 0
    """Size of the .safetensors files; 0 without such files, None if unknown."""
    download_bytes: int | None = 0
    """Size of the files that are not on this machine yet; None if unknown."""
    download_to: Path | None = None
    """The hub's cache, if something is downloaded."""

    @property
    def disk_needs(self) -> list[DiskNeed]:
        """What loading writes to disk, less what an interrupted packing has already written."""
        if self.is_packed or self.packed_path is None:
            return []
        partial = self.packed_path.with_name(self.packed_path.name + ".partial")
        written = partial.stat().st_blocks * 512 if partial.is_file() else 0
        pack = max(0, self.packed_bytes - written)
        needs = [DiskNeed("the packed file", self.packed_path.parent, pack, "--cache-dir")]
        if self.download_to is not None and self.download_bytes:
            download = self.download_bytes
            needs.insert(0, DiskNeed("the checkpoint", self.download_to, download, "HF_HOME"))
        return needs


def shapes_info(
    name: str,
    config: ModelConfig,
    formats: Formats,
    kind: Kind = "synthetic",
) -> ModelInfo:
    """A model of these shapes.

    Raises: CheckpointError, ConfigError if a shape does not fit its format.
    """
    layout = ExpertLayout(formats.expert_bits, config.hidden_size, config.moe_intermediate_size)
    parts = {part.name: part for part in tensor_specs(config, formats)}
    return ModelInfo(name, kind, config, formats, layout, parts)


def synthetic_info(synthetic: Synthetic) -> ModelInfo:
    """The info of a synthetic model, which has no file."""
    return shapes_info(str(synthetic.path), synthetic.config, synthetic.formats)


def packed_info(name: str, packed: PackedModel, kind: Kind = "packed") -> ModelInfo:
    """The info of a packed file, or of a model whose packed file exists."""
    return ModelInfo(
        name, kind, packed.config, packed.formats, packed.layout, packed.parts,
        packed.path, packed.path.stat().st_size,
    )  # fmt: skip


def folder_info(
    folder: Path, name: str, config: ModelConfig, formats: Formats, shards: Shards, target: Path
) -> ModelInfo:
    """The info of a checkpoint folder that is not packed yet."""
    sizes = {file: (folder / file).stat().st_size for file in FILES if (folder / file).is_file()}
    checkpoint = sum(file.stat().st_size for file in shards.files)
    return _unpacked(name, "folder", config, formats, target, sizes, checkpoint)


def hub_info(model: HubModel, config: ModelConfig, formats: Formats, target: Path) -> ModelInfo:
    """The info of a hub model that is not packed yet."""
    sizes = {file: model.files[file].nbytes or 0 for file in FILES if file in model.files}
    info = _unpacked(model.name, "hub", config, formats, target, sizes, model.checkpoint_bytes)
    return replace(info, download_bytes=model.download_bytes, download_to=model.cache)


def _unpacked(
    name: str,
    kind: Kind,
    config: ModelConfig,
    formats: Formats,
    target: Path,
    files: Mapping[str, int],
    checkpoint_bytes: int | None,
) -> ModelInfo:
    info = shapes_info(name, config, formats, kind)
    return replace(
        info,
        packed_path=target,
        packed_bytes=packed_size(info, files),
        is_packed=False,
        checkpoint_bytes=checkpoint_bytes,
    )
