"""A packed file that is cut while a CPU serves it does not end the process."""

import shutil
import subprocess
import sys
from pathlib import Path

from osmium.weights import DEMO

ROOT = Path(__file__).resolve().parents[2]

SERVES = """
import os, sys
import osmium
path = sys.argv[1]
engine = osmium.load(path, "cpu", context=128)
params = osmium.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
def ids():
    return [event.id for event in engine.generate([1, 2, 3], params) if hasattr(event, "id")]
before = ids()
os.truncate(path, 0)
print(before == ids(), len(before))
engine.close()
"""


def test_a_file_that_is_cut_while_it_is_served_changes_no_response(tmp_path: Path) -> None:
    """Of a mapped file the next access would raise SIGBUS."""
    path = tmp_path / "model.osmium"
    shutil.copyfile(DEMO, path)
    done = subprocess.run(
        [sys.executable, "-c", SERVES, str(path)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "True 8\n"), done
