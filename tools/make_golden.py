#!/usr/bin/env python3
"""Regenerate golden logits: seeded checkpoints in transformers, float32 on the CPU.

usage: tools/make_golden.py [NAME...]

Without names: all cases of tests/models/build.py and all variants of tests/models/variants.py.
Needs the `oracle` extra (torch, transformers).  Writes tests/golden/logits_{case}.npz and
tests/golden/variants/{variant}.npz with the logits after some of the prompt's positions, and a
fingerprint of config and weights; for the name rope tests/golden/variants/rope.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from checkout import ROOT, run_tool, use_environment

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*")
    parser.parse_args()  # before the environment, which takes gigabytes
use_environment("oracle", needs=("torch", "transformers"))

import numpy as np
import torch
import transformers
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding

from tests.models.build import (
    CASES,
    Case,
    fingerprint,
    hf_tensors,
    prompt,
    write_checkpoint,
)
from tests.models.variants import ROPE, VARIANTS, rope_config, variant_positions


def main() -> int:
    """Write one file per case and variant."""
    torch.set_num_threads(1)
    names = sys.argv[1:]
    known = [*(one.name for one in (*CASES, *VARIANTS)), "rope"]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"{unknown[0]} is none of {', '.join(known)}.")
    golden = ROOT / "tests" / "golden"
    for case in CASES:
        if not names or case.name in names:
            made_of = fingerprint(hf_tensors(case))
            out = golden / f"logits_{case.name}.npz"
            save(
                out, case, positions(case), made_of, lambda f, case=case: write_checkpoint(case, f)
            )
    for variant in VARIANTS:
        if not names or variant.name in names:
            out = golden / "variants" / f"{variant.name}.npz"
            rows = variant_positions(variant)
            save(out, variant.case, rows, variant.fingerprint(), variant.write)
    if not names or "rope" in names:
        save_rope(golden / "variants" / "rope.json")
    return 0


def save_rope(out: Path) -> None:
    """Write the frequencies and attention factors of transformers for ROPE."""
    found = []
    for parameters in ROPE:
        config = transformers.Qwen3_5MoeTextConfig(**rope_config(parameters))
        rope = Qwen3_5MoeTextRotaryEmbedding(config)
        found.append([parameters, rope.attention_scaling, rope.inv_freq.tolist()])
    out.write_text("\n".join(json.dumps(one) for one in found) + "\n")
    print(f"{out.relative_to(ROOT)}  {out.stat().st_size} bytes")


def save(
    out: Path,
    case: Case,
    rows: np.ndarray,
    made_of: str,
    write: Callable[[Path], object],
) -> None:
    """Write the logits of the checkpoint that `write` puts into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    for kind, names in report.items():
        assert not names, f"{out.stem}: {kind} {names}"
    ids = prompt(case)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()
    out.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        out,
        ids=ids,
        positions=rows,
        logits=logits[rows],
        weights=made_of,
        transformers=transformers.__version__,
    )
    size, most = out.stat().st_size, abs(logits).max()
    print(f"{out.relative_to(ROOT)}  {size} bytes  |logits| {most:.2f}")


def positions(case: Case) -> np.ndarray:
    """All positions of a prompt up to 64 tokens; else every third one and the last 16."""
    p = np.arange(case.prompt, dtype=np.int32)
    return p if case.prompt <= 64 else p[(p % 3 == 0) | (p >= case.prompt - 16)]


if __name__ == "__main__":
    run_tool(main)
