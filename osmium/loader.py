"""From a path to an engine: open, plan, allocate, fill, start.

The one place where the floors meet; what each step does is in its own module.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.config import EngineConfig, Progress
from osmium.cuda.driver import Device
from osmium.cuda.stream import Machine as Gpu
from osmium.engine.engine import Engine
from osmium.engine.plan import Machine, Plan, available_ram, make_plan
from osmium.engine.runner import Runner
from osmium.engine.state import Seats
from osmium.engine.watchdog import Watchdog, default_floor
from osmium.errors import ConfigError, NoDevice
from osmium.experts.arena import fill_arena, fill_slots, share_arena
from osmium.experts.cache import make_cache, resident_cache
from osmium.experts.routing import read_trace
from osmium.experts.store import Store
from osmium.models import model_class
from osmium.models.state import make_state
from osmium.models.weights import upload
from osmium.ops import Ops
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from osmium.text.chat import ChatTemplate
from osmium.text.defaults import sampling_defaults
from osmium.text.tokenizer import Tokenizer
from osmium.weights import DEMO, Model, open_weights
from osmium.weights.synthetic import PREFIX

__all__ = ["load", "plan_for"]


def load(
    path: str | Path | None = None,
    device: str = "auto",
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Engine:
    """An engine for a checkpoint folder, a packed file, a hub id, or (None) the bundled demo.

    `options` are EngineConfig's fields.  A checkpoint is packed first if it has not been.
    Raises: ConfigError, CheckpointError, DeviceError.
    """
    config = _config(device, options)
    gpu = _gpu(config)
    try:
        packed = open_weights(path, config, progress)
        plan = _plan(packed, config, gpu)
        return _build(packed, plan, config, gpu, progress)
    except BaseException:
        if gpu is not None:
            gpu.close()
        raise


def plan_for(path: str | Path | None = None, device: str = "auto", **options: Any) -> Plan:
    """The memory plan of what `load` would do, without loading.  Packs a checkpoint if need be.

    Raises: ConfigError, CheckpointError, DeviceError.
    """
    config = _config(device, options)
    gpu = _gpu(config)
    try:
        return _plan(open_weights(path, config), config, gpu)
    finally:
        if gpu is not None:
            gpu.close()


def _config(device: str, options: dict[str, Any]) -> EngineConfig:
    known = {field.name for field in fields(EngineConfig)}
    for name in options:
        if name not in known:
            raise ConfigError(f"There is no option {name!r}; known are {', '.join(sorted(known))}.")
    return EngineConfig(**{"device": device, **options})


def _gpu(config: EngineConfig) -> Gpu | None:
    """The GPU, or None where there is none and none was asked for."""
    if config.device == "cpu":
        return None
    try:
        return Gpu(Device(), "pinned" if config.wc_alloc is False else "write-combined")
    except NoDevice:
        if config.device == "gpu":
            raise
        return None


def _plan(packed: Model, config: EngineConfig, gpu: Gpu | None) -> Plan:
    free, total = gpu.device.memory() if gpu is not None else (0, 0)
    available, ram = available_ram()
    machine = Machine(gpu is not None, free, total, available, ram)
    weights = [(name, part.nbytes) for name, part in packed.parts.items()]
    return make_plan(packed.config, packed.record, weights, config, machine)


def _build(
    packed: Model, plan: Plan, options: EngineConfig, gpu: Gpu | None, progress: Progress | None
) -> Engine:
    """Allocate by the plan, in its order, and fill."""
    config, record = packed.config, packed.record
    layers, experts = config.layers, config.experts
    ops: Ops = ReferenceOps() if gpu is None else GpuOps(gpu)

    weights = upload(ops, _Tensors(packed), embed_on_host=gpu is not None)
    if gpu is None:
        arena = share_arena(record, packed.all_records())
        if plan.slots == experts:
            cache = resident_cache(ops, record, arena.records)
        else:
            cache = make_cache(ops, arena, plan.slots, config.top_k)
    elif plan.slots == experts:
        arena = None
        slots = fill_slots(ops, record, layers, experts, packed.read_records, progress)
        cache = resident_cache(ops, record, slots)
    else:
        arena = fill_arena(ops, record, layers, experts, packed.read_records, progress)
        cache = make_cache(ops, arena, plan.slots, config.top_k)

    store = Store(ops, arena, cache, plan.chunk, config.top_k)
    if options.routing is not None:
        store.trace = ops.put(_routing(options.routing, packed))
    model = model_class(config.model_type)(ops, config, weights, store, plan.chunk)
    # One page and one slot are nobody's: rows that have ended write there.
    state = make_state(ops, config, plan.pages + 1, plan.page, plan.sequences + 1, plan.kv_dtype)
    ahead = 0 if gpu is None else 1
    runner = Runner(ops, model, store, state, plan.sequences, plan.table_pages, ahead)
    if gpu is not None:
        runner.prepare()
    ops.synchronize()
    if gpu is not None:
        gpu.pool.freeze()  # nothing is allocated while serving
    watchdogs: list[Watchdog] = []

    def on_close() -> None:
        for watchdog in watchdogs:
            watchdog.close()
        if gpu is not None:
            gpu.close()

    engine = Engine(
        runner,
        Seats(plan.pages, plan.page, plan.sequences),
        name=_name(packed.path),
        context=plan.context,
        device="cpu" if gpu is None else gpu.device.name,
        tokenizer=_tokenizer(packed),
        template=_template(packed),
        defaults=sampling_defaults(packed.json("generation_config.json")),
        on_thread=None if gpu is None else gpu.device.make_current,
        on_close=on_close,
        plan=plan,
    )
    floor = options.ram_floor or default_floor(available_ram()[1])
    watchdogs.append(Watchdog(engine.stop, floor, lambda: available_ram()[0]))
    return engine


class _Tensors(Mapping[str, Any]):
    """A model's tensors by name, each made or mapped when it is asked for."""

    def __init__(self, packed: Model) -> None:
        self._packed = packed

    def __getitem__(self, name: str) -> Any:
        if name not in self._packed.parts:
            raise KeyError(name)
        return self._packed.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed.names())

    def __len__(self) -> int:
        return len(self._packed.names())


def _routing(path: str, packed: Model) -> npt.NDArray[np.uint16]:
    """The trace to replay, u16 [N, L, A].  Raises: ConfigError where it is of another shape."""
    config = packed.config
    found = read_trace(path, config.experts).ids
    if found.shape[1:] != (config.layers, config.top_k):
        raise ConfigError(
            f"{path} has {found.shape[1]} layers of {found.shape[2]} experts a token; the model "
            f"has {config.layers} of {config.top_k}."
        )
    return found


def _name(path: Path) -> str:
    """What the model is called: `demo`, or the checkpoint's folder."""
    if path == DEMO:
        return "demo"
    if str(path).startswith(PREFIX):
        return str(path)
    parts = path.stem.split("-")
    folder = [i for i, part in enumerate(parts) if part.startswith("experts")]
    return "-".join(parts[: folder[-1] - 1]) if folder and folder[-1] > 1 else path.stem


def _tokenizer(packed: Model) -> Tokenizer | None:
    raw = packed.file("tokenizer.json")
    return None if raw is None else Tokenizer(raw)


def _template(packed: Model) -> ChatTemplate | None:
    return ChatTemplate.find(
        packed.file("chat_template.jinja"), packed.json("tokenizer_config.json")
    )
