"""Drives a model step by step: sequences with their pages and state slots."""

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
from tests.models.build import Case, hf_config, hf_tensors, packed_experts_of, weights_of

Logits = npt.NDArray[np.float32]

POISON = 0xFF
"""A byte that makes NaN in both f32 and bf16."""


@dataclass
class SequenceDriver:
    """A model on any backend, for a few sequences. Memory that is not written is NaN."""

    config: ModelConfig
    weights: Mapping[str, LinearWeight | npt.NDArray[Any]]
    """In host memory."""
    layout: ExpertLayout
    experts: npt.NDArray[np.uint8]
    ops: Ops = field(default_factory=ReferenceOps)
    capacity: int | None = None
    """Expert slots per layer; None for all experts."""
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
            host_experts = None
            slots = (
                self.experts
                if host
                else load_resident_experts(ops, self.layout, *shape, self.begin, None)
            )
            cache = resident_cache(ops, self.layout, slots)
        else:
            host_experts = (
                wrap_host_experts(self.layout, self.experts)
                if host
                else load_host_experts(ops, self.layout, *shape, self.begin, None)
            )
            cache = make_cache(ops, host_experts, self.capacity, config.top_k, staging=4)
        self.expert_runner = self.store_type(ops, host_experts, cache, self.rows, config.top_k)
        weights = upload(ops, self.weights, embed_on_host=not host)
        self.model = model_class(config.model_type)(
            ops, config, weights, self.expert_runner, self.rows
        )
        pages_per_sequence = -(-self.context // self.page)
        pages = pages_per_sequence * self.sequences
        self.state = make_state(ops, config, pages, self.page, self.sequences, self.kv_dtype)
        zero = ("router_barrier", "split_counters", "context_turns")  # between kernels
        for buffers in (*self.state.layers, self.model.work):
            for name, value in vars(buffers).items():
                arrays = vars(value).values() if isinstance(value, MatmulInput) else [value]
                for array in arrays:
                    if name not in zero and hasattr(array, "dtype"):
                        ops.memset(array, POISON)
        self.out = ops.empty((self.rows, config.vocab_size), np.float32)
        # Pages are shuffled, as after some use.
        shuffled = np.random.default_rng(pages_per_sequence).permutation(pages).astype(np.int32)
        self.tables = shuffled.reshape(self.sequences, pages_per_sequence)
        self.past = [0] * self.sequences

    def begin(self, layer: int, first: int, out: npt.NDArray[np.uint8]) -> Callable[[], None]:
        """Copy packed experts of a layer immediately."""
        out[...] = self.experts[layer, first : first + len(out)]
        return lambda: None

    def step(self, parts: Mapping[int, npt.ArrayLike]) -> dict[int, Logits]:
        """Run one step with these ids per sequence; returns the logits of every row, by
        sequence."""
        upload_array, sequences = self.ops.to_device, list(parts)
        ids = [np.asarray(parts[s], np.int32) for s in sequences]
        counts = [len(x) for x in ids]
        past = np.array([self.past[s] for s in sequences], np.int32)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        step = StepInputs(
            tokens=int(starts[-1]),
            sequences=len(sequences),
            page_size=self.page,
            ids=upload_array(np.concatenate(ids)),
            positions=upload_array(
                np.concatenate(
                    [np.arange(p, p + n, dtype=np.int32) for p, n in zip(past, counts, strict=True)]
                )
            ),
            sequence_ids=upload_array(np.repeat(np.arange(len(sequences), dtype=np.int32), counts)),
            query_start_loc=upload_array(starts),
            context_lens=upload_array(past),
            state_slots=upload_array(np.array(sequences, np.int32)),
            page_table=upload_array(self.tables[sequences]),
            max_context=int((past + counts).max()),
        )
        self.model.forward(step, self.state)
        logits = self.head(np.arange(step.tokens))
        for s, n in zip(sequences, counts, strict=True):
            self.past[s] += n
        return {s: logits[starts[i] : starts[i + 1]] for i, s in enumerate(sequences)}

    def head(self, rows: npt.ArrayLike) -> Logits:
        """The logits of some rows of the last step."""
        wanted = self.ops.to_device(np.asarray(rows, np.int32))
        out = self.out[: wanted.shape[0]]
        self.ops.memset(out, POISON)
        self.model.head(out, wanted)
        return np.asarray(self.ops.copy_d2h(out), np.float32)

    def logits(self, ids: npt.ArrayLike, chunk: int, sequence: int = 0) -> Logits:
        """The logits [T, vocab] after every id of a new sequence, computed in chunks."""
        all_ids = np.asarray(ids, np.int32)
        self.past[sequence] = 0
        parts = [
            self.step({sequence: all_ids[at : at + chunk]})[sequence]
            for at in range(0, len(all_ids), chunk)
        ]
        return np.concatenate(parts)


def make_driver(case: Case, bits: int = 16, **options: Any) -> SequenceDriver:
    """A seeded model with experts of `bits` bits, on the CPU unless `ops` is given."""
    config = ModelConfig.from_hf(hf_config(case))
    tensors = hf_tensors(case)
    layout, experts = packed_experts_of(config, tensors, bits)
    return SequenceDriver(config, weights_of(config, tensors), layout, experts, **options)
