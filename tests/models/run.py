"""A small driver of a model: sequences, their pages and slots, one step at a time."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.config import ModelConfig
from osmium.experts.arena import share_arena
from osmium.experts.cache import make_cache, resident_cache
from osmium.experts.store import Store
from osmium.models import model_class
from osmium.models.state import make_state
from osmium.ops import Linear, Ops, Step
from osmium.ops.reference import ReferenceOps
from osmium.quant.record import Record
from tests.models.build import Case, hf_config, hf_tensors, our_records, our_weights

Logits = npt.NDArray[np.float32]


@dataclass
class Runner:
    """A model with room for a few sequences.  Memory that nobody wrote is NaN or nonsense."""

    config: ModelConfig
    weights: dict[str, Linear | npt.NDArray[Any]]
    record: Record
    records: npt.NDArray[np.uint8]
    ops: Ops = field(default_factory=ReferenceOps)
    capacity: int | None = None
    """Expert slots a layer; None for all experts."""
    rows: int = 256
    page: int = 16
    kv_dtype: str = "f32"
    sequences: int = 3
    context: int = 256

    def __post_init__(self) -> None:
        ops, config = self.ops, self.config
        arena = share_arena(self.record, self.records)
        if self.capacity is None or self.capacity == config.experts:
            cache = resident_cache(ops, self.record, arena.records)
        else:
            cache = make_cache(ops, arena, self.capacity, config.top_k)
        self.store = Store(ops, arena, cache, self.rows, config.top_k)
        self.model = model_class(config.model_type)(
            ops, config, self.weights, self.store, self.rows
        )
        each = -(-self.context // self.page)
        pages = each * self.sequences
        self.state = make_state(ops, config, pages, self.page, self.sequences, self.kv_dtype)
        for layer in self.state.layers:
            for array in vars(layer).values():
                array[...] = np.nan if array.dtype == np.float32 else 0x7FC0
        # Pages lie scattered, as they do after a while.
        shuffled = np.random.default_rng(each).permutation(pages).astype(np.int32)
        self.tables = shuffled.reshape(self.sequences, each)
        self.past = [0] * self.sequences

    def step(self, parts: dict[int, npt.ArrayLike]) -> dict[int, Logits]:
        """Feed ids to some sequences, in one step; the logits of every row, by sequence."""
        owners = list(parts)
        ids = [np.asarray(parts[s], np.int32) for s in owners]
        counts = [len(x) for x in ids]
        past = np.array([self.past[s] for s in owners], np.int32)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        step = Step(
            tokens=int(starts[-1]),
            sequences=len(owners),
            page=self.page,
            ids=np.concatenate(ids),
            positions=np.concatenate(
                [np.arange(p, p + n, dtype=np.int32) for p, n in zip(past, counts, strict=True)]
            ),
            sequence=np.repeat(np.arange(len(owners), dtype=np.int32), counts),
            starts=starts,
            past=past,
            slots=np.array(owners, np.int32),
            pages=self.tables[owners],
        )
        self.model.forward(step, self.state)
        logits = np.full((step.tokens, self.config.vocab), np.nan, np.float32)
        self.model.head(logits, np.arange(step.tokens, dtype=np.int32))
        for s, n in zip(owners, counts, strict=True):
            self.past[s] += n
        return {s: logits[starts[i] : starts[i + 1]] for i, s in enumerate(owners)}

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
    """A seeded model on the CPU backend, with experts of `bits` bits."""
    config = ModelConfig.from_hf(hf_config(case))
    tensors = hf_tensors(case)
    record, records = our_records(config, tensors, bits)
    return Runner(config, our_weights(config, tensors), record, records, **options)
