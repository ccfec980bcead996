#!/usr/bin/env python3
"""Regenerate the golden logits: seeded checkpoints in transformers, float32 on the CPU.

usage: tools/make_golden.py

Needs the `oracle` extra (torch, transformers).  Writes tests/golden/logits_{case}.npz with the
logits after some of the prompt's positions, and a fingerprint of the weights.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from checkout import ROOT, run_tool, use_environment

if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()  # before the environment, which takes gigabytes
use_environment("oracle", needs=("torch", "transformers"))

import numpy as np
import torch
import transformers

from tests.models.build import (
    CASES,
    Case,
    fingerprint,
    hf_tensors,
    prompt,
    write_checkpoint,
)


def main() -> int:
    """Write one file per case."""
    torch.set_num_threads(1)
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(case, Path(folder))
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
        for kind, names in report.items():
            assert not names, f"{case.name}: {kind} {names}"
        ids = prompt(case)
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()
        rows = positions(case)
        out = ROOT / "tests" / "golden" / f"logits_{case.name}.npz"
        np.savez_compressed(
            out,
            ids=ids,
            positions=rows,
            logits=logits[rows],
            weights=fingerprint(hf_tensors(case)),
            transformers=transformers.__version__,
        )
        print(
            f"{out.relative_to(ROOT)}  {out.stat().st_size} bytes  |logits| {abs(logits).max():.2f}"
        )
    return 0


def positions(case: Case) -> np.ndarray:
    """All positions of a prompt up to 64 tokens; else every third one and the last 16."""
    p = np.arange(case.prompt, dtype=np.int32)
    return p if case.prompt <= 64 else p[(p % 3 == 0) | (p >= case.prompt - 16)]


if __name__ == "__main__":
    run_tool(main)
