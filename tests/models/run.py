"""A small driver of a model: sequences, their pages and slots, one step at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.config import ModelConfig
from osmium.experts.cache import make_cache, resident_cache
from osmium.experts.host_experts import load_host_experts, load_resident_experts, wrap_host_experts
from osmium.experts.runner import ExpertRunner
from osmium.models import model_class
from osmium.models.state import make_state
from osmium.models.weights import upload
from osmium.ops import LinearWeight, MatmulInput, Ops, StepInputs
from osmium.ops.reference import ReferenceOps
from osmium.quant.expert_layout import ExpertLayout
from tests.models.build import Case, hf_config, hf_tensors, our_records, our_weights

Logits = npt.NDArray[np.float32]

POISON = 0xFF
"""A byte that makes NaN of f32 and bf16 alike."""


@dataclass
class Runner:
    """A model on any backend, with room for a few sequences.  Memory that nobody wrote is NaN."""

    config: ModelConfig
    weights: Mapping[str, LinearWeight | npt.NDArray[Any]]
    """In the host's memory."""
    record: ExpertLayout
    records: npt.NDArray[np.uint8]
    ops: Ops = field(default_factory=ReferenceOps)
    capacity: int | None = None
    """Expert slots a layer; None for all experts."""
    rows: int = 256
    page: int = 16
    kv_dtype: str = "f32"
    sequences: int = 3
    context: int = 256
    store_type: type[ExpertRunner] = ExpertRunner

    def __post_init__(self) -> None:
        ops, config = self.ops, self.config
        host = isinstance(ops, ReferenceOps)
        shape = (config.num_layers, config.num_experts)
        if self.capacity is None or self.capacity == config.num_experts:
            arena = None
            slots = (
                self.records
                if host
                else load_resident_experts(ops, self.record, *shape, self.begin, None)
            )
            cache = resident_cache(ops, self.record, slots)
        else:
            arena = (
                wrap_host_experts(self.record, self.records)
                if host
                else load_host_experts(ops, self.record, *shape, self.begin, None)
            )
            cache = make_cache(ops, arena, self.capacity, config.top_k)
        self.expert_runner = self.store_type(ops, arena, cache, self.rows, config.top_k)
        weights = upload(ops, self.weights, embed_on_host=not host)
        self.model = model_class(config.model_type)(
            ops, config, weights, self.expert_runner, self.rows
        )
        each = -(-self.context // self.page)
        pages = each * self.sequences
        self.state = make_state(ops, config, pages, self.page, self.sequences, self.kv_dtype)
        for owner in (*self.state.layers, self.model.work):
            for name, value in vars(owner).items():
                arrays = vars(value).values() if isinstance(value, MatmulInput) else [value]
                for array in arrays:
                    if name not in ("arrived", "parts") and hasattr(array, "dtype"):
                        ops.memset(array, POISON)
        self.out = ops.empty((self.rows, config.vocab_size), np.float32)
        # Pages lie scattered, as they do after a while.
        shuffled = np.random.default_rng(each).permutation(pages).astype(np.int32)
        self.tables = shuffled.reshape(self.sequences, each)
        self.past = [0] * self.sequences

    def begin(self, layer: int, first: int, out: npt.NDArray[np.uint8]) -> Callable[[], None]:
        """Records of a layer, there at once."""
        out[...] = self.records[layer, first : first + len(out)]
        return lambda: None

    def step(self, parts: Mapping[int, npt.ArrayLike]) -> dict[int, Logits]:
        """Feed ids to some sequences, in one step; the logits of every row, by sequence."""
        put, owners = self.ops.to_device, list(parts)
        ids = [np.asarray(parts[s], np.int32) for s in owners]
        counts = [len(x) for x in ids]
        past = np.array([self.past[s] for s in owners], np.int32)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        step = StepInputs(
            tokens=int(starts[-1]),
            sequences=len(owners),
            page=self.page,
            ids=put(np.concatenate(ids)),
            positions=put(
                np.concatenate(
                    [np.arange(p, p + n, dtype=np.int32) for p, n in zip(past, counts, strict=True)]
                )
            ),
            sequence_ids=put(np.repeat(np.arange(len(owners), dtype=np.int32), counts)),
            query_start_loc=put(starts),
            context_lens=put(past),
            state_slots=put(np.array(owners, np.int32)),
            page_table=put(self.tables[owners]),
        )
        self.model.forward(step, self.state)
        logits = self.head(np.arange(step.tokens))
        for s, n in zip(owners, counts, strict=True):
            self.past[s] += n
        return {s: logits[starts[i] : starts[i + 1]] for i, s in enumerate(owners)}

    def head(self, rows: npt.ArrayLike) -> Logits:
        """The logits of some rows of the last step."""
        wanted = self.ops.to_device(np.asarray(rows, np.int32))
        out = self.out[: wanted.shape[0]]
        self.ops.memset(out, POISON)
        self.model.head(out, wanted)
        return np.asarray(self.ops.copy_d2h(out), np.float32)

    def logits(self, ids: npt.ArrayLike, chunk: int, sequence: int = 0) -> Logits:
        """The logits after every id of a new sequence, fed `chunk` at a time.  [T, vocab]"""
        all_ids = np.asarray(ids, np.int32)
        self.past[sequence] = 0
        parts = [
            self.step({sequence: all_ids[at : at + chunk]})[sequence]
            for at in range(0, len(all_ids), chunk)
        ]
        return np.concatenate(parts)


def runner(case: Case, bits: int = 16, **options: Any) -> Runner:
    """A seeded model with experts of `bits` bits, on the CPU unless `ops` says otherwise."""
    config = ModelConfig.from_hf(hf_config(case))
    tensors = hf_tensors(case)
    record, records = our_records(config, tensors, bits)
    return Runner(config, our_weights(config, tensors), record, records, **options)
