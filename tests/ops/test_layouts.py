"""Documented layouts against the arrays that the product allocates, reads and writes."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osmium.engine.runner import ModelRunner
from osmium.experts.prefetch import make_prefetch_state
from osmium.models.state import DeltaState, make_state
from osmium.models.workspace import Workspace, make_workspace
from osmium.ops import Ops
from osmium.ops.controls import SamplingControls
from osmium.ops.gpu import GpuOps
from osmium.ops.grouped import ExpertGroups, GroupedOps
from osmium.ops.reference import ReferenceOps
from osmium.ops.types import (
    AttentionWeights,
    AttentionWorkspace,
    DecodeState,
    DeltaNetWorkspace,
    DeltaWeights,
    ExpertCache,
    HostExperts,
    PagedKV,
    PrefetchState,
    SharedExpert,
    SlotAssignment,
    StepInputs,
)
from tests.models.build import CASES as MODELS
from tests.models.build import prompt
from tests.models.run import make_driver
from tests.ops import layouts
from tests.ops.cases import CASES, TINY, run, sized
from tests.ops.layouts import (
    Compared,
    Comparison,
    arguments_of,
    documented,
    layouts_of,
    parse,
)
from tests.ptx import cases_weights
from tests.ptx.interpreter import InterpretedRuntime

KINDS: list[type] = [
    AttentionWeights, AttentionWorkspace, DecodeState, DeltaNetWorkspace, DeltaWeights, ExpertCache,
    ExpertGroups, HostExperts, PagedKV, PrefetchState, SamplingControls, SharedExpert,
    SlotAssignment, StepInputs,
]  # fmt: skip

F32 = npt.NDArray[np.float32]


UNLIKE = replace(TINY, hidden=96, key_heads=2, value_heads=4, value_dim=64, inner=160, slots=6)
"""No two sizes of an operation are equal, so that no two letters can be confused."""


class ComparedReference(Compared, ReferenceOps):
    pass


class ComparedGpu(Compared, GpuOps):
    pass


# -- how layouts are read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("f32 [T, K / 8]", (3, 5), np.float32),
        ("f32 [T, K]", (3, 40), np.float16),
        ("f32 [T, K]", (3, 40, 1), np.float32),
        ("f32 [T, T]", (3, 4), np.float32),
        ("bf16 [T, K / 2, 4]: hi, lo", (3, 20, 4), np.uint16),
        ("f32 [T, >= 2H * d]", (3, 15), np.float32),
        ("f32 [T, K / 7]", (3, 6), np.float32),
    ],
)
def test_an_array_that_is_not_as_documented_fails(
    text: str, shape: tuple[int, ...], dtype: Any
) -> None:
    layout = parse(text)
    assert layout is not None
    comparison = Comparison({"H": 2, "d": 4, "T": 3})
    with pytest.raises(AssertionError):
        comparison.add("an array", layout, shape, np.dtype(dtype), {"K": 48})
        comparison.finish()


def test_an_array_that_is_as_documented_passes() -> None:
    comparison = Comparison({"H": 2, "d": 4})
    for text, shape in (
        ("bf16 [T, K / 2, 4]: hi, hi, lo, lo.", (3, 20, 4)),
        ("bf16 [T, >= 2H * d], wide", (3, 17)),
        ("bf16 [1 + T * R, (2H + 2) d]", (7, 24)),
    ):
        layout = parse(text)
        assert layout is not None
        comparison.add(text, layout, shape, np.dtype(np.uint16), {})
    comparison.finish()
    assert comparison.sizes["T"] == 3 and comparison.sizes["R"] == 2


# -- shapes and dtypes -----------------------------------------------------------------------------


def test_operations_get_the_arrays_that_their_docstrings_state(rng: np.random.Generator) -> None:
    """Every documented field and argument, in the reference's arrays, over all operations."""
    ops = ComparedReference()
    for make in (*(sized(name, UNLIKE) for name in CASES), *cases_weights.CASES.values()):
        run(make(rng), ops)
    model = make_driver(MODELS[0], ops=ops, capacity=6, page=8)
    model.expert_runner._prefetch_state = model.expert_runner._router_prefetch = (
        make_prefetch_state(ops, 4, 8, 2)
    )
    model.step({0: prompt(MODELS[0])[:2]})
    model.step({0: [5]})
    assert set(documented(KINDS)) <= ops.compared
    for method in (*vars(Ops), *vars(GroupedOps)):
        if not method.startswith("_"):
            assert {f"{method}.{name}" for name in arguments_of(method)} <= ops.compared


def test_model_arrays_have_the_shapes_that_their_docstrings_state() -> None:
    """The workspace, the KV pages of each dtype and the recurrent state, on both backends."""
    for backend in (ReferenceOps(), GpuOps(InterpretedRuntime())):
        for case in MODELS:
            config, rows, seen = make_driver(case).config, 3, set[str]()
            sizes = {
                "T": rows, "D": config.hidden_size, "H": config.num_heads, "G": config.num_kv_heads,
                "d": config.head_dim, "V": config.value_heads, "dk": config.key_dim,
                "dv": config.value_dim, "C": config.channels, "E": config.num_experts,
                "A": config.top_k, "Is": config.shared_intermediate_size,
            }  # fmt: skip
            work = Comparison(dict(sizes))
            work.fields(make_workspace(backend, config, rows), "Workspace")
            work.finish()
            seen |= work.compared
            for kv_dtype, stored in (("f32", "f32"), ("bf16", "bf16"), ("fp8_e4m3", "e4m3")):
                state = make_state(backend, config, 5, 4, 2, kv_dtype)
                for layer in state.layers:
                    comparison = Comparison(sizes | {"page_size": 4})
                    comparison.fields(layer, type(layer).__name__)
                    comparison.finish()
                    seen |= comparison.compared
                    if isinstance(layer, PagedKV):
                        assert layer.k.dtype == layer.v.dtype == layouts.DTYPES[stored]
                        assert (layer.k_scales is not None) == (stored == "e4m3")
            wanted = {f"Workspace.{name}" for name in layouts_of(Workspace)}
            if "d" in case.kinds:
                wanted |= {f"DeltaState.{name}" for name in layouts_of(DeltaState)}
            if isinstance(backend, GpuOps):
                wanted |= {"MatmulInput.hi_lo", "MatmulInput.square_sums"}
            assert wanted <= seen


def test_the_engine_gives_operations_the_arrays_that_their_docstrings_state() -> None:
    """The engine's own step, decode state and rings, in steps of one to three sequences."""
    ops = ComparedReference()
    model = make_driver(MODELS[0], ops=ops, rows=16, page=8, sequences=4)
    pages = model.tables.shape[1]
    ModelRunner(ops, model.model, model.expert_runner, model.state, 3, pages).capture_graphs()
    assert {f"DecodeState.{name}" for name in layouts_of(DecodeState)} <= ops.compared
    assert {f"StepInputs.{name}" for name in layouts_of(StepInputs)} <= ops.compared
    assert {f"SamplingControls.{name}" for name in layouts_of(SamplingControls)} <= ops.compared
