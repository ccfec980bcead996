"""The models: one file per model_type; the file's name is the registry.

A model file sets MODEL_CLASS, whose `forward` and `head` are written once against ops.Ops.  Files,
requests and CUDA are out of scope.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, cast

from osmium.errors import CheckpointError

if TYPE_CHECKING:
    from osmium.models.qwen3_5_moe import Qwen3_5MoeModel

__all__ = ["model_class"]


def model_class(model_type: str) -> "type[Qwen3_5MoeModel]":
    """The model class of `model_type`.  Raises: CheckpointError where there is none."""
    name = f"{__name__}.{model_type}"
    if model_type.isidentifier() and importlib.util.find_spec(name):
        cls = getattr(importlib.import_module(name), "MODEL_CLASS", None)
        if cls is not None:
            return cast("type[Qwen3_5MoeModel]", cls)
    raise CheckpointError(f"model_type is {model_type!r}; osmium/models has no file for it.")
