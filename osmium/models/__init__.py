"""The models: one file a model_type, and the file's name is the registry.

A model file defines `Model(ops, config, weights, store, rows)` with `forward` and `head`, written
once against ops.Ops.  Knows nothing of files, requests or CUDA.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, cast

from osmium.errors import CheckpointError

if TYPE_CHECKING:
    from osmium.models.qwen3_5_moe import Model

__all__ = ["model_class"]


def model_class(model_type: str) -> "type[Model]":
    """The class that computes `model_type`.  Raises: CheckpointError where there is none."""
    name = f"{__name__}.{model_type}"
    if model_type.isidentifier() and importlib.util.find_spec(name):
        found = getattr(importlib.import_module(name), "Model", None)
        if found is not None:
            return cast("type[Model]", found)
    raise CheckpointError(f"model_type is {model_type!r}; osmium/models has no file for it.")
