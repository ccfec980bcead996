"""tools/kernel_timeline adds timestamps to every kernel's text, and the result assembles."""

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

from osmium.kernels.ptx import kernel
from tests.ptx.kernels import NAMES
from tests.ptx.test_contracts import assemble

TOOL = Path(__file__).parents[2] / "tools" / "kernel_timeline"


@pytest.fixture(scope="module")
def tool() -> Any:
    loader = SourceFileLoader("kernel_timeline", str(TOOL))
    spec = spec_from_loader("kernel_timeline", loader)
    assert spec is not None
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOL.parent)  # like for a tool that runs
        loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_with_timestamps_assembles(name: str, tool: Any, tmp_path: Path) -> None:
    contract = kernel(name).contract
    second = contract.targets[min(1, len(contract.targets) - 1)]
    newest = second if second == "sm_90a" else "sm_90"
    for text, target in ((contract.pdl_text, newest), (contract.text, second)):
        made = tool.stamped(text)
        ends = made.count("ret;")
        # one at the start, and one at each end
        assert made.count("%globaltimer") >= 1 + ends and ends == text.count("ret;")
        path = tmp_path / f"{name}.ptx"
        path.write_text(made)
        assemble(path, target)


def test_timestamps_follow_the_kernels_wait(tool: Any) -> None:
    made = tool.stamped(kernel("int4_matvec_f32").contract.pdl_text)
    before, after = made.split("griddepcontrol.wait;")
    assert before.count("%globaltimer") == 1, "one timestamp at the start"
    assert after.split("}", 1)[0].count("%globaltimer") == 1, "one timestamp after the wait"
    assert ", 2;" in after.split("// -- tile by tile")[0].rsplit("{", 1)[1], (
        "the index of the timestamp where tiles begin"
    )
