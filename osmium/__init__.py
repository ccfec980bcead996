"""Osmium: a Mixture-of-Experts inference engine for one consumer GPU.

    engine = osmium.load("path/to/model")
    for token in engine.generate(ids, osmium.SamplingParams(temperature=0)):
        ...

Names are loaded at first use, so that `import osmium` is fast.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from osmium.distribution import conflict as _conflict
from osmium.distribution import version as _version

if TYPE_CHECKING:
    from osmium.config import EngineConfig
    from osmium.engine.engine import Engine
    from osmium.engine.request import SamplingParams
    from osmium.errors import OsmiumError
    from osmium.loader import load

__all__ = ["Engine", "EngineConfig", "OsmiumError", "SamplingParams", "load"]

_MODULE_OF = {
    "Engine": "osmium.engine.engine",
    "EngineConfig": "osmium.config",
    "OsmiumError": "osmium.errors",
    "SamplingParams": "osmium.engine.request",
    "load": "osmium.loader",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version() or "0+unknown"
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'osmium' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


if _problem := _conflict():
    warnings.warn(_problem, stacklevel=2)
