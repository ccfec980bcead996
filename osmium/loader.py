"""From a path to an engine: open, plan, allocate, fill, start.

Each step is in its own module; the loader connects them.
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
from osmium.cuda.rates import spilled_bytes
from osmium.cuda.select import open_gpu
from osmium.cuda.stream import CudaRuntime as Gpu
from osmium.engine.engine import Engine
from osmium.engine.host_memory import available_ram
from osmium.engine.kv_cache_manager import KVCacheManager
from osmium.engine.plan import MemoryPlan, kv_capacity_tokens
from osmium.engine.prefill_plan import block_rows, step_rows
from osmium.engine.runner import ModelRunner
from osmium.engine.slot_rebalancer import SlotRebalancer
from osmium.engine.watchdog import Watchdog, default_min_free_ram
from osmium.errors import DeviceError, OutOfMemory
from osmium.experts.cache import make_cache, resident_cache
from osmium.experts.host_experts import load_host_experts, load_resident_experts, wrap_host_experts
from osmium.experts.prefetch import make_prefetch_state
from osmium.experts.routing import read_model_trace
from osmium.experts.runner import ExpertRunner
from osmium.experts.usage import (
    UsageSnapshot,
    read_usage,
    slots_per_layer,
    try_save_usage,
    warm_cache,
)
from osmium.models import model_class
from osmium.models.state import make_state
from osmium.models.weights import upload
from osmium.ops import Array, ExpertCache, HostExperts, Ops
from osmium.ops.gpu import GpuOps
from osmium.ops.grouped import STAGING_GROUPS
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
"""Most bytes of the host buffer for uploading weights; it never exceeds a layer's experts.

Half of it is more than a disk reads while the other half is uploaded."""

SPILL_TRIES = 3
"""Allocations with fewer and fewer slots before the loader raises OutOfMemory."""


def load(
    path: str | Path | None = None,
    device: str = "auto",
    *,
    progress: Progress | None = None,
    needs: Collection[Need] = (),
    **options: Any,
) -> Engine:
    """An engine for a checkpoint folder, a packed file, a hub id, or (None) the bundled demo.

    `options` are EngineConfig's fields.  A checkpoint without a packed file is packed first.  A
    model that lacks one of `needs` fails before weights are packed or loaded.
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
    """Write the packed file that `load` would use, unless it exists; `synthetic:NAME` works, too.

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
    """The operations that quantise a checkpoint; None: NumPy."""
    return None if gpu is None else GpuOps(gpu)


class Loader:
    """A model, and engines on it, one at a time.

    Weights and host experts are loaded once, for all engines.
    """

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
        """Arguments as for `load`.

        A model that does not fit fails before it is downloaded or packed.  With `final` the options
        decide; without it, only a model that fits with no context fails.
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
            for note in self.text.notes:
                LOG.warning("%s", note)
            ends = {*self.packed.config.eos_token_ids, *self.text.end_ids}
            self.packed.config = replace(self.packed.config, eos_token_ids=tuple(sorted(ends)))
        except BaseException:
            self.close()
            raise
        self._model_info = _model_info(path, self.packed)
        self.ops: Ops = ReferenceOps() if self.gpu is None else GpuOps(self.gpu)
        self._weights: dict[str, Any] | None = None
        self._host_experts: HostExperts | None = None

    def _check(
        self,
        info: ModelInfo,
        files: CheckpointFiles | HubFiles,
        final: bool,
        needs: Collection[Need],
    ) -> None:
        """Check a model that is not packed yet.

        Raises: ConfigError where memory does not suffice, CheckpointError where it lacks one of
        `needs`.
        """
        read_text_files(files, needs)
        options = self.options
        if not final:  # `engine` may get smaller options
            options = replace(options, context=2, kv_cache_mb=None, max_num_seqs=1)
        memory_plan(info, options, hardware_of(self.gpu))

    def memory_rate(self) -> float:
        """Measured rate of a copy in VRAM, GB/s read plus written; 0 without a GPU."""
        return 0.0 if self.gpu is None else self.gpu.memory_gb_s

    @property
    def _host_experts_bytes(self) -> int:
        """Bytes of host memory that the loaded experts use; the next plan counts them again."""
        return (
            0
            if self.gpu is None or self._host_experts is None
            else int(self._host_experts.packed.nbytes)
        )

    def kv_tokens(self, kv_cache_mb: int) -> int:
        """Tokens of context in `kv_cache_mb` MiB of KV pages, up to the model's maximum."""
        options = replace(self.options, kv_cache_mb=kv_cache_mb)
        return kv_capacity_tokens(self.packed.config, options, self.gpu is not None)

    def engine(self, *, owns_loader: bool = False, **changes: Any) -> Engine:
        """An engine with some options changed.  The previous engine must be closed and deleted.

        With `owns_loader` closing the engine closes the loader.  Raises: ConfigError, DeviceError.
        """
        options, gpu = replace(self.options, **changes), self.gpu
        if gpu is not None:
            gpu.pool.frozen = False
        plan = self._plan(options)
        usage = self._read_usage(options) if owns_loader else None  # benchmarks start cold
        plan, runner = self._allocate(plan, options, usage)
        if gpu is not None:
            gpu.pool.freeze()  # nothing is allocated while serving
        watchdogs: list[Watchdog] = []
        engines: list[Engine] = []
        save_usage = self._warm_start(runner, options, usage) if owns_loader else None

        def on_close() -> None:
            for watchdog in watchdogs:
                watchdog.close()
            if save_usage is not None and any(_stopped_cleanly(engine) for engine in engines):
                save_usage()
            if owns_loader:
                self.close()

        packed = self.packed
        if owns_loader:
            mark_used(packed.path, cache_folder(options))
        engine = Engine(
            runner,
            KVCacheManager(plan.num_pages, plan.page_size, plan.max_num_seqs),
            name=_model_name(packed.path),
            context=plan.context,
            device="cpu" if gpu is None else gpu.device.name,
            tokenizer=self.text.tokenizer,
            template=self.text.template,
            defaults=self.text.defaults,
            on_thread=None if gpu is None else gpu.device.make_current,
            on_close=on_close,
            plan=plan,
            host_memory="pageable" if gpu is None else gpu.host_kind,
            decode_gap_s=options.decode_gap_ms / 1e3,
        )
        engines.append(engine)
        if save_usage is not None:
            engine.on_idle = SlotRebalancer(runner, engine.stats).idle
        if gpu is not None:
            engine.stats.read_vram = gpu.device.memory
        min_free = options.min_free_ram or default_min_free_ram(available_ram()[1])
        watchdogs.append(Watchdog(engine.stop, min_free, lambda: available_ram()[0]))
        return engine

    def _allocate(
        self, plan: MemoryPlan, options: EngineConfig, usage: UsageSnapshot | None
    ) -> tuple[MemoryPlan, ModelRunner]:
        """Allocate by the plan; while the driver spills VRAM to host memory, plan fewer slots.

        Raises: OutOfMemory where the driver still spills after SPILL_TRIES.
        """
        for _ in range(SPILL_TRIES):
            runner = self._runner(plan, options, usage)
            self.ops.synchronize()
            if self.gpu is None:
                return plan, runner
            spilled = spilled_bytes(self.gpu)
            if not spilled:
                return plan, runner
            slots = plan.fewer_slots(spilled)
            LOG.warning(
                "The driver keeps %.2f GiB of the VRAM allocation in host memory: copies there run "
                "at less than a quarter of %.0f GB/s. Using %d expert slots per layer, not %d. "
                "Close other programs that use the GPU, or lower --vram.",
                spilled / (1 << 30), self.gpu.memory_gb_s, slots, plan.expert_slots,
            )  # fmt: skip
            del runner
            gc.collect()  # free its VRAM before the next allocation
            plan = self._plan(replace(options, expert_slots=slots))
        raise OutOfMemory(
            "The driver keeps a part of the VRAM allocation in host memory even with "
            f"{plan.expert_slots} expert slots per layer. Close other programs that use the GPU, "
            "or lower --vram."
        )

    def _plan(self, options: EngineConfig) -> MemoryPlan:
        """The memory plan; memory that this loader already uses counts as free."""
        used = 0 if self.gpu is None else self.gpu.pool.used
        hardware = hardware_of(self.gpu, used, self._host_experts_bytes)
        return memory_plan(self._model_info, options, hardware)

    def _runner(
        self, plan: MemoryPlan, options: EngineConfig, usage: UsageSnapshot | None
    ) -> ModelRunner:
        """Allocate by the plan, in its order, and load."""
        ops, packed, config = self.ops, self.packed, self.packed.config
        if self._weights is None:
            self._weights = self._upload()
        trace = None
        if options.replay_routing is not None:
            trace = read_model_trace(
                options.replay_routing, config.num_layers, config.num_experts, config.top_k,
                may_have_more_layers=_is_synthetic(packed),
            )  # fmt: skip
        prefetch_state = None
        if plan.prefetch:
            prefetch_state = make_prefetch_state(
                ops, config.num_layers, config.num_experts, config.top_k
            )
        rows, pieces = step_rows(plan.max_num_seqs), plan.piece_rows
        expert_runner = ExpertRunner(
            ops, *self._experts(plan, usage),
            block_rows(config, packed.layout, rows, pieces, self.gpu is not None), config.top_k,
            prefetch_state,
        )  # fmt: skip
        if trace is not None:
            predicted = None
            if trace.predicted is not None:
                predicted = ops.to_device(np.ascontiguousarray(trace.predicted))
            expert_runner.replay(ops.to_device(np.ascontiguousarray(trace.ids)), predicted)
        model = model_class(config.model_type)(
            ops, config, self._weights, expert_runner, rows, pieces, plan.prefill_chunk,
            plan.link_gb_s,
        )  # fmt: skip
        # One more page: the null page, where rows that have ended write.
        pages, slots = plan.num_pages + 1, plan.max_num_seqs
        state = make_state(ops, config, pages, plan.page_size, slots, plan.kv_dtype)
        lookahead = 0 if self.gpu is None else 1
        runner = ModelRunner(
            ops, model, expert_runner, state, plan.max_num_seqs, plan.max_pages_per_seq, lookahead
        )
        if self.gpu is not None:
            runner.capture_graphs()
        return runner

    def _usage_file(self, options: EngineConfig) -> Path | None:
        """This model's usage file; None with --no-hcs, and for models without one.

        Those are synthetic models, and the demo, where every expert is resident.
        """
        packed = self.packed
        if _is_synthetic(packed):
            return None
        if not options.enable_expert_cache or packed.path == DEMO:
            return None
        return usage_file(cache_folder(options), packed.fingerprint)

    def _read_usage(self, options: EngineConfig) -> UsageSnapshot | None:
        """The expert usage saved when an engine of this model was last closed."""
        path, packed = self._usage_file(options), self.packed
        if path is None:
            return None
        return read_usage(
            path, packed.fingerprint, packed.config.num_layers, packed.config.num_experts
        )

    def _warm_start(
        self, runner: ModelRunner, options: EngineConfig, usage: UsageSnapshot | None
    ) -> Callable[[], None] | None:
        """Fill the expert cache with the most used experts of `usage`.

        Returns a function that saves the usage at the time of its call; None without a usage file.
        """
        path, expert_runner = self._usage_file(options), runner.expert_runner
        if path is None or expert_runner.host_experts is None:
            return None
        if usage is not None:
            copied = warm_cache(self.ops, expert_runner.cache, expert_runner.host_experts, usage)
            LOG.info("%d frequently used experts are in the cache", copied)
        fingerprint = self.packed.fingerprint
        # Read expert_runner.cache at the time of saving: rebalancing replaces it.
        return lambda: try_save_usage(path, fingerprint, self.ops, expert_runner.cache)

    def _upload(self) -> dict[str, Any]:
        """Upload all weights but the routed experts; on the CPU, map them."""
        ops, packed = self.ops, self.packed
        if self.gpu is None:
            tensors = LazyTensors(packed, self.progress)
            return upload(ops, tensors, embed_on_host=False)
        if isinstance(packed, Synthetic):
            return packed.upload(ops)
        layer_bytes = packed.config.num_experts * packed.layout.nbytes
        staging = ops.empty_mapped((min(layer_bytes, STAGING_BYTES),), np.uint8)
        try:
            with self._reader() as reader:
                return upload_packed(ops, packed, reader, staging, self.progress)
        finally:
            with contextlib.suppress(DeviceError):
                ops.synchronize()
            ops.release(staging)

    def _experts(
        self, plan: MemoryPlan, usage: UsageSnapshot | None
    ) -> tuple[HostExperts | None, ExpertCache]:
        """The host experts, None where VRAM holds them all, and the expert cache.

        With saved usage, layers get slots by usage (usage.slots_per_layer).
        """
        ops, packed, config, layout = self.ops, self.packed, self.packed.config, self.packed.layout
        layers, experts = config.num_layers, config.num_experts
        progress = self.progress
        if self.gpu is None:
            if self._host_experts is None:
                self._host_experts = wrap_host_experts(layout, packed.all_packed_experts(progress))
            if plan.expert_slots == experts:
                return self._host_experts, resident_cache(ops, layout, self._host_experts.packed)
        elif plan.expert_slots == experts and self._host_experts is None:
            if isinstance(packed, Synthetic):
                slots = self._generate_experts(packed, ops.empty)
            else:
                with self._reader() as reader:
                    slots = load_resident_experts(
                        ops, layout, layers, experts, reader.packed_experts, progress
                    )
            return None, resident_cache(ops, layout, slots)
        elif self._host_experts is None and isinstance(packed, Synthetic):
            self._host_experts = HostExperts(
                layout, self._generate_experts(packed, ops.empty_mapped)
            )
        elif self._host_experts is None:
            with self._reader() as reader:
                self._host_experts = load_host_experts(
                    ops, layout, layers, experts, reader.packed_experts, progress
                )
        slots = None
        if usage is not None and plan.expert_slots < experts:
            slots = slots_per_layer(usage, plan.expert_slots, config.top_k)
        if slots is not None:
            LOG.info("%d to %d expert slots per layer, by recorded usage", min(slots), max(slots))
        cache = make_cache(
            ops,
            self._host_experts,
            plan.expert_slots,
            config.top_k,
            slots,
            STAGING_GROUPS * plan.staging_experts,
        )
        return self._host_experts, cache

    def _generate_experts(self, synthetic: Synthetic, allocate: Callable[..., Array]) -> Array:
        """Generate every expert by kernels, in memory of `allocate`.  Raises: OutOfMemory."""
        layers, experts = synthetic.config.num_layers, synthetic.config.num_experts
        packed_experts = allocate((layers, experts, synthetic.layout.nbytes), np.uint8)
        for layer in range(layers):
            synthetic.generate_experts(self.ops, layer, packed_experts[layer])
            self.ops.synchronize()
            if self.progress:
                self.progress("experts", layer + 1, layers)
        return packed_experts

    def _reader(self) -> PackedReader:
        """The reader of the packed file.  Raises: CheckpointError."""
        assert isinstance(self.packed, PackedModel), "a synthetic model has no file"
        slow_to_read = self.gpu is not None and self.gpu.host_kind == "write-combined"
        return self.packed.reading(write_only=slow_to_read)

    def close(self) -> None:
        """Free all memory of the GPU; repeated calls do nothing."""
        if self.gpu is not None:
            self.gpu.close()


def _model_info(path: str | Path | None, packed: ModelSource) -> ModelInfo:
    """The input of a memory plan.  A packed file given by its own path keeps its formats."""
    if isinstance(packed, Synthetic):
        return synthetic_info(packed)
    is_packed_file = path is None or Path(path).expanduser().is_file()
    return packed_info(str(path), packed, "packed" if is_packed_file else "folder")


def _stopped_cleanly(engine: Engine) -> bool:
    """Whether an engine was closed, or stopped with a reason, without an exception."""
    return engine.failure is None or engine.failure.__cause__ is None


def _is_synthetic(packed: ModelSource) -> bool:
    """Whether the model's weights are random, generated or packed."""
    return packed.fingerprint.startswith(PREFIX)


def _model_name(path: Path) -> str:
    """The model's display name: `demo`, `synthetic:NAME`, or the checkpoint's name."""
    if path == DEMO:
        return "demo"
    if str(path).startswith(PREFIX):
        return str(path)
    return display_name(path)
