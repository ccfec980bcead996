#!/usr/bin/env python3
"""Create the bundled demo model, osmium/demo/demo.osmium, from a trained checkpoint.

INT4 experts, INT8 head and shared expert, the rest in BF16; tokenizer and chat template included.
osmium/demo/NOTICE.md has its licences.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from checkout import run_tool, use_environment

use_environment()

from osmium.config import EngineConfig
from osmium.weights import DEMO, open_model


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="the trained model's folder")
    parser.add_argument("--out", type=Path, default=DEMO, help="the file to write (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        packed = open_model(args.checkpoint, EngineConfig(cache_dir=folder))
        packed.verify()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(packed.path, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run_tool(main)
