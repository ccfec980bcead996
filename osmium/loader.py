"""From a path to an engine: open, plan, allocate, fill, start.

The one place where the floors meet; what each step does is in its own module.
"""

import contextlib
import gc
import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from osmium.config import EngineConfig, Progress
from osmium.cuda.select import open_gpu
from osmium.cuda.stream import CudaRuntime as Gpu
from osmium.cuda.stream import spilled_bytes
from osmium.engine.engine import Engine
from osmium.engine.kv_cache_manager import KVCacheManager
from osmium.engine.plan import MemoryPlan, available_ram, kv_capacity_tokens
from osmium.engine.runner import ModelRunner
from osmium.engine.slot_rebalancer import SlotRebalancer
from osmium.engine.watchdog import Watchdog, default_floor
from osmium.errors import ConfigError, DeviceError, OutOfMemory
from osmium.experts.cache import make_cache, resident_cache
from osmium.experts.host_experts import load_host_experts, load_resident_experts, wrap_host_experts
from osmium.experts.prefetch import make_prefetch_state
from osmium.experts.routing import RoutingTrace, read_trace
from osmium.experts.runner import ExpertRunner
from osmium.experts.usage import (
    UsageSnapshot,
    read_heat,
    slots_per_layer,
    try_save_usage,
    warm_cache,
)
from osmium.models import model_class
from osmium.models.state import make_state
from osmium.models.weights import upload
from osmium.ops import Array, ExpertCache, HostExperts, Ops
from osmium.ops.gpu import GpuOps
from osmium.ops.reference import ReferenceOps
from osmium.planning import config_of, hardware_of, memory_plan, plan_for
from osmium.text.files import Need, read_text_files
from osmium.weights import (
    DEMO,
    CheckpointFiles,
    HubFiles,
    ModelInfo,
    ModelSource,
    PackedModel,
    PackedReader,
    cache_folder,
    open_model,
    open_weights,
)
from osmium.weights.info import packed_info, synthetic_info
from osmium.weights.lazy import LazyTensors
from osmium.weights.local import display_name, mark_used, usage_file
from osmium.weights.synthetic import PREFIX, Synthetic
from osmium.weights.uploading import upload_packed

LOG = logging.getLogger("osmium.loader")

__all__ = ["Loader", "load", "pack", "plan_for"]

STAGING_BYTES = 256 << 20
"""Bytes of host memory through which weights are uploaded, and a layer's experts at most: half of
them is more than a disk reads while the other half is uploaded."""

SPILL_TRIES = 3
"""How often memory is allocated with fewer and fewer slots before it is given up."""


def load(
    path: str | Path | None = None,
    device: str = "auto",
    *,
    progress: Progress | None = None,
    needs: Collection[Need] = (),
    **options: Any,
) -> Engine:
    """An engine for a checkpoint folder, a packed file, a hub id, or (None) the bundled demo.

    `options` are EngineConfig's fields.  A checkpoint is packed first if it has not been.  A model
    that lacks one of `needs` is refused before weights are packed or loaded.
    Raises: ConfigError, CheckpointError, DeviceError.
    """
    loader = Loader(path, device, progress=progress, final=True, needs=needs, **options)
    try:
        return loader.engine(owns_loader=True)
    except BaseException:
        loader.close()
        raise


def pack(
    path: str | Path | None = None,
    device: str = "auto",
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """The packed file of what `load` would load, written if it is not there; `synthetic:NAME` too.

    Raises: ConfigError, CheckpointError, DeviceError.
    """
    config = config_of(device, options)
    gpu = open_gpu(config)
    try:
        return open_model(path, config, progress, _quantizer_ops(gpu)).path
    finally:
        if gpu is not None:
            gpu.close()


def _quantizer_ops(gpu: Gpu | None) -> Ops | None:
    """What quantises a checkpoint, where there is more to it than NumPy."""
    return None if gpu is None else GpuOps(gpu)


class Loader:
    """A model, and engines on it, one at a time.  Its weights and its experts in host memory are
    loaded once, for all of them."""

    def __init__(
        self,
        path: str | Path | None = None,
        device: str = "auto",
        *,
        progress: Progress | None = None,
        final: bool = False,
        needs: Collection[Need] = (),
        **options: Any,
    ) -> None:
        """As `load`.  A model that cannot fit is refused before it is downloaded or packed: by its
        options where these are `final`, else where it would not fit with any context.

        Raises: ConfigError, CheckpointError, DeviceError.
        """
        self.options = config_of(device, options)
        self.progress = progress
        self.gpu = open_gpu(self.options)
        try:
            self.packed = open_weights(
                path,
                self.options,
                progress,
                _quantizer_ops(self.gpu),
                lambda info, files: self._check(info, files, final, needs),
            )
            self.text = read_text_files(
                self.packed, needs, demo=self.packed.path == DEMO,
                synthetic=_is_synthetic(self.packed),
            )  # fmt: skip
        except BaseException:
            self.close()
            raise
        self._info = _info(path, self.packed)
        self.ops: Ops = ReferenceOps() if self.gpu is None else GpuOps(self.gpu)
        self._weights: dict[str, Any] | None = None
        self._arena: HostExperts | None = None

    def _check(
        self,
        info: ModelInfo,
        files: CheckpointFiles | HubFiles,
        final: bool,
        needs: Collection[Need],
    ) -> None:
        """Of a model that is not packed yet.  Raises: ConfigError where memory does not suffice,
        CheckpointError where it lacks one of `needs`."""
        read_text_files(files, needs)
        options = self.options
        if not final:  # engines may be made with less
            options = replace(options, context=2, kv_cache_mb=None, max_num_seqs=1)
        memory_plan(info, options, hardware_of(self.gpu))

    def memory_rate(self) -> float:
        """GB/s of VRAM, read and written, as measured at start; 0 without a GPU."""
        return 0.0 if self.gpu is None else self.gpu.memory_gb_s

    @property
    def _arena_bytes(self) -> int:
        """Host memory that the experts take already, and that is planned for again."""
        return 0 if self.gpu is None or self._arena is None else int(self._arena.packed.nbytes)

    def kv_tokens(self, kv_cache_mb: int) -> int:
        """Tokens of context that so many MiB of KV hold, up to the model's."""
        options = replace(self.options, kv_cache_mb=kv_cache_mb)
        return kv_capacity_tokens(self.packed.config, options, self.gpu is not None)

    def engine(self, *, owns_loader: bool = False, **changes: Any) -> Engine:
        """An engine with some options changed.  Whoever was made before must be closed and gone.

        With `owns_loader` closing the engine closes the loader.  Raises: ConfigError, DeviceError.
        """
        options, gpu = replace(self.options, **changes), self.gpu
        if gpu is not None:
            gpu.pool.frozen = False
        held = 0 if gpu is None else gpu.pool.used
        plan = memory_plan(self._info, options, hardware_of(gpu, held, self._arena_bytes))
        heat = self._heat(options) if owns_loader else None  # who measures starts cold
        plan, runner = self._allocate(plan, options, heat)
        if gpu is not None:
            gpu.pool.freeze()  # nothing is allocated while serving
        watchdogs: list[Watchdog] = []
        engines: list[Engine] = []
        keep = self._warm_start(runner, options, heat) if owns_loader else None

        def on_close() -> None:
            for watchdog in watchdogs:
                watchdog.close()
            if keep is not None and any(_stopped_cleanly(engine) for engine in engines):
                keep()
            if owns_loader:
                self.close()

        packed = self.packed
        if owns_loader:
            mark_used(packed.path, cache_folder(options))
        engine = Engine(
            runner,
            KVCacheManager(plan.num_pages, plan.page_size, plan.max_num_seqs),
            name=_name(packed.path),
            context=plan.context,
            device="cpu" if gpu is None else gpu.device.name,
            tokenizer=self.text.tokenizer,
            template=self.text.template,
            defaults=self.text.defaults,
            on_thread=None if gpu is None else gpu.device.make_current,
            on_close=on_close,
            plan=plan,
            host_memory="pageable" if gpu is None else gpu.host_kind,
        )
        engines.append(engine)
        if keep is not None:
            engine.on_idle = SlotRebalancer(runner, engine.meter).idle
        if gpu is not None:
            engine.meter.vram_of = gpu.device.memory
        floor = options.min_free_ram or default_floor(available_ram()[1])
        watchdogs.append(Watchdog(engine.stop, floor, lambda: available_ram()[0]))
        return engine

    def _allocate(
        self, plan: MemoryPlan, options: EngineConfig, heat: UsageSnapshot | None
    ) -> tuple[MemoryPlan, ModelRunner]:
        """By the plan; again with fewer slots, and another plan, while the driver keeps some of
        it in host memory.  Raises: OutOfMemory where it does whatever is tried."""
        for _ in range(SPILL_TRIES):
            runner = self._runner(plan, options, heat)
            self.ops.synchronize()
            if self.gpu is None:
                return plan, runner
            there = spilled_bytes(self.gpu)
            if not there:
                return plan, runner
            slots = plan.fewer_slots(there)
            LOG.warning(
                "The driver keeps %.2f GiB of the VRAM allocation in host memory: copies there run "
                "at less than a quarter of %.0f GB/s. Using %d expert slots per layer, not %d. "
                "Close other programs that use the GPU, or lower --vram.",
                there / (1 << 30), self.gpu.memory_gb_s, slots, plan.expert_slots,
            )  # fmt: skip
            del runner
            gc.collect()  # its VRAM, before some is asked for again
            held = self.gpu.pool.used
            fewer = replace(options, expert_slots=slots)
            plan = memory_plan(self._info, fewer, hardware_of(self.gpu, held, self._arena_bytes))
        raise OutOfMemory(
            f"The driver keeps a part of VRAM in host memory even with {plan.expert_slots} expert "
            "slots per layer. Close other programs that use the GPU, or lower --vram."
        )

    def _runner(
        self, plan: MemoryPlan, options: EngineConfig, heat: UsageSnapshot | None
    ) -> ModelRunner:
        """Allocate by the plan, in its order, and fill."""
        ops, packed, config = self.ops, self.packed, self.packed.config
        if self._weights is None:
            self._weights = self._upload()
        routing = (
            None if options.replay_routing is None else _routing(options.replay_routing, packed)
        )
        guess = None
        if plan.prefetch:
            guess = make_prefetch_state(ops, config.num_layers, config.num_experts, config.top_k)
        store = ExpertRunner(
            ops, *self._experts(plan, heat), plan.prefill_chunk, config.top_k, guess
        )
        if routing is not None:
            ids, likely = routing.ids, routing.predicted
            told = None if likely is None else ops.to_device(np.ascontiguousarray(likely))
            store.replay(ops.to_device(np.ascontiguousarray(ids)), told)
        model = model_class(config.model_type)(
            ops, config, self._weights, store, plan.prefill_chunk
        )
        # One page and one slot are nobody's: rows that have ended write there.
        pages, slots = plan.num_pages + 1, plan.max_num_seqs + 1
        state = make_state(ops, config, pages, plan.page_size, slots, plan.kv_dtype)
        ahead = 0 if self.gpu is None else 1
        runner = ModelRunner(ops, model, store, state, plan.max_num_seqs, plan.table_pages, ahead)
        if self.gpu is not None:
            runner.capture_graphs()
        return runner

    def _heat_file(self, options: EngineConfig) -> Path | None:
        """Where this model's heat is kept; None where none is: of made-up models and of the demo,
        where every expert is resident, and with --no-hcs."""
        packed = self.packed
        if _is_synthetic(packed):
            return None
        if not options.enable_expert_cache or packed.path == DEMO:
            return None
        return usage_file(cache_folder(options), packed.fingerprint)

    def _heat(self, options: EngineConfig) -> UsageSnapshot | None:
        """What was hot when this model was last closed."""
        path, packed = self._heat_file(options), self.packed
        if path is None:
            return None
        return read_heat(
            path, packed.fingerprint, packed.config.num_layers, packed.config.num_experts
        )

    def _warm_start(
        self, runner: ModelRunner, options: EngineConfig, heat: UsageSnapshot | None
    ) -> Callable[[], None] | None:
        """Fill the slots with what was hot; what comes back keeps what is hot then.  None where
        nothing is kept."""
        path, store = self._heat_file(options), runner.store
        if path is None or store.host_experts is None:
            return None
        if heat is not None:
            count = warm_cache(self.ops, store.cache, store.host_experts, heat)
            LOG.info("%d frequently used experts are in the cache", count)
        fingerprint = self.packed.fingerprint
        # The store's cache as of then: slots may have been shared out anew.
        return lambda: try_save_usage(path, fingerprint, self.ops, store.cache)

    def _upload(self) -> dict[str, Any]:
        """Everything but the experts, to where kernels reach it fast."""
        ops, packed = self.ops, self.packed
        if self.gpu is None:
            tensors = LazyTensors(packed, self.progress)
            return upload(ops, tensors, embed_on_host=False)
        if isinstance(packed, Synthetic):
            return packed.upload(ops)
        layer = packed.config.num_experts * packed.record.nbytes
        room = ops.empty_mapped((min(layer, STAGING_BYTES),), np.uint8)
        try:
            with self._reading() as reading:
                return upload_packed(ops, packed, reading, room, self.progress)
        finally:
            with contextlib.suppress(DeviceError):
                ops.synchronize()
            ops.release(room)

    def _experts(
        self, plan: MemoryPlan, heat: UsageSnapshot | None
    ) -> tuple[HostExperts | None, ExpertCache]:
        """The experts in host memory, unless VRAM holds them all, and the cache of them: with as
        many slots a layer as its heat asks for, where some was kept."""
        ops, packed, config, record = self.ops, self.packed, self.packed.config, self.packed.record
        layers, experts = config.num_layers, config.num_experts
        progress = self.progress
        if self.gpu is None:
            if self._arena is None:
                self._arena = wrap_host_experts(record, packed.all_records(progress))
            if plan.expert_slots == experts:
                return self._arena, resident_cache(ops, record, self._arena.packed)
        elif plan.expert_slots == experts and self._arena is None:
            if isinstance(packed, Synthetic):
                slots = self._generate_experts(packed, ops.empty)
            else:
                with self._reading() as reading:
                    slots = load_resident_experts(
                        ops, record, layers, experts, reading.records, progress
                    )
            return None, resident_cache(ops, record, slots)
        elif self._arena is None and isinstance(packed, Synthetic):
            self._arena = HostExperts(record, self._generate_experts(packed, ops.empty_mapped))
        elif self._arena is None:
            with self._reading() as reading:
                self._arena = load_host_experts(
                    ops, record, layers, experts, reading.records, progress
                )
        each = None
        if heat is not None and plan.expert_slots < experts:
            each = slots_per_layer(heat, plan.expert_slots, config.top_k)
        if each is not None:
            LOG.info("%d to %d expert slots per layer, by recorded usage", min(each), max(each))
        return self._arena, make_cache(ops, self._arena, plan.expert_slots, config.top_k, each)

    def _generate_experts(self, made_up: Synthetic, room: Callable[..., Array]) -> Array:
        """Every expert, made by kernels where it is to lie.  Raises: OutOfMemory."""
        layers, experts = made_up.config.num_layers, made_up.config.num_experts
        records = room((layers, experts, made_up.record.nbytes), np.uint8)
        for layer in range(layers):
            made_up.generate_experts(self.ops, layer, records[layer])
            self.ops.synchronize()
            if self.progress:
                self.progress("experts", layer + 1, layers)
        return records

    def _reading(self) -> PackedReader:
        """How parts of a packed file get into host memory.  Raises: CheckpointError."""
        assert isinstance(self.packed, PackedModel), "what is made up is not read"
        slow = self.gpu is not None and self.gpu.host_kind == "write-combined"
        return self.packed.reading(write_only=slow)

    def close(self) -> None:
        """Give everything back.  More than once is harmless."""
        if self.gpu is not None:
            self.gpu.close()


def _info(path: str | Path | None, packed: ModelSource) -> ModelInfo:
    """What a plan is made from.  A packed file that was named itself keeps its formats."""
    if isinstance(packed, Synthetic):
        return synthetic_info(packed)
    named = path is None or Path(path).expanduser().is_file()
    return packed_info(str(path), packed, "packed" if named else "folder")


def _stopped_cleanly(engine: Engine) -> bool:
    """Whether it was closed, or stopped with a reason, and did not fail."""
    return engine.failure is None or engine.failure.__cause__ is None


def _is_synthetic(packed: ModelSource) -> bool:
    """Whether its weights are random: made up, or packed."""
    return packed.fingerprint.startswith(PREFIX)


def _routing(path: str, packed: ModelSource) -> RoutingTrace:
    """The trace to replay, of the model's layers.  Raises: ConfigError where it has others."""
    config = packed.config
    found = read_trace(path, config.num_experts)
    ids, predicted = found.ids, found.predicted
    if _is_synthetic(packed):  # it may have the first layers only
        ids = ids[:, : config.num_layers]
        predicted = None if predicted is None else predicted[:, : config.num_layers]
    if ids.shape[1:] != (config.num_layers, config.top_k):
        raise ConfigError(
            f"{path} has {ids.shape[1]} layers of {ids.shape[2]} experts per token; the model "
            f"has {config.num_layers} of {config.top_k}."
        )
    return RoutingTrace(ids, found.starts, found.experts, predicted)


def _name(path: Path) -> str:
    """What the model is called: `demo`, or the checkpoint's folder."""
    if path == DEMO:
        return "demo"
    if str(path).startswith(PREFIX):
        return str(path)
    return display_name(path)
