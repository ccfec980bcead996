#!/usr/bin/env python3
"""Make the bundled demo model out of the lab model's checkpoint: osmium/demo/demo.osmium.

INT4 experts, INT8 head and shared expert, the rest in BF16; tokenizer and chat template inside.
The notices that have to go along are in osmium/demo/NOTICE.md.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from osmium.config import EngineConfig  # noqa: E402
from osmium.weights import DEMO, open_model  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="the lab model's folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        packed = open_model(args.checkpoint, EngineConfig(cache_dir=folder))
        packed.verify()
        DEMO.parent.mkdir(exist_ok=True)
        shutil.copyfile(packed.path, DEMO)
    print(f"{DEMO.relative_to(ROOT)}: {DEMO.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
