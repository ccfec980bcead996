"""The hand-written kernels' files."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "ptx"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ptx"))
