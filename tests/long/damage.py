"""Damage copies of the bundled packed file and load them.

`python -m tests.long.damage KIND SEED` prints the outcome as JSON; a separate process, because
loading may crash it.
"""

import itertools
import json
import random
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import osmium
from osmium.errors import CheckpointError
from osmium.weights import DEMO

CASES = {"cut": 60, "header": 120, "parts": 80, "padding": 40, "table": 200}

IDS = list(range(100, 116))

HOME = 24
"""Bytes before the header's JSON."""

NASTY: list[Any] = [
    None, True, 0, -1, 1, 4096, 2**31, 2**63, 2**70, 1.5, "", "x", "|u1", "<f4", "|O", [], [0],
    [-1, 2], [2**40, 2**40], {}, {"a": 1},
]  # fmt: skip


def header_end(raw: bytes | bytearray) -> int:
    return HOME + int.from_bytes(raw[16:24], "little")


def parts(raw: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(raw[HOME : header_end(raw)])["parts"]
    return found


def cut(rng: random.Random, raw: bytes) -> bytes:
    """Truncated, or with extra bytes."""
    if rng.random() < 0.1:
        return raw + rng.randbytes(rng.randrange(1, 9000))
    return raw[: rng.choice((rng.randrange(len(raw)), rng.randrange(header_end(raw) + 1)))]


def flip(raw: bytes, at: int, bit: int) -> bytes:
    made = bytearray(raw)
    made[at] ^= 1 << bit
    return bytes(made)


def header(rng: random.Random, raw: bytes) -> bytes:
    return flip(raw, rng.randrange(header_end(raw)), rng.randrange(8))


def in_parts(rng: random.Random, raw: bytes) -> bytes:
    part = rng.choice(parts(raw))
    return flip(raw, part["offset"] + rng.randrange(part["nbytes"]), rng.randrange(8))


def padding(rng: random.Random, raw: bytes) -> bytes:
    """Damage in the unused bytes between weights."""
    ends = sorted((one["offset"], one["offset"] + one["nbytes"]) for one in parts(raw))
    gaps = [(header_end(raw), ends[0][0])]
    gaps += [(end, start) for (_, end), (start, _) in itertools.pairwise(ends)]
    low, high = rng.choice([(low, high) for low, high in gaps if high > low])
    return flip(raw, rng.randrange(low, high), rng.randrange(8))


def table(rng: random.Random, raw: bytes) -> bytes:
    """A header with a wrong value and a valid checksum."""
    made: Any = json.loads(raw[HOME : header_end(raw)])
    for _ in range(rng.choice((1, 1, 2))):
        target = rng.choice(
            (made, made["formats"] if isinstance(made.get("formats"), dict) else made)
        )
        if rng.random() < 0.8 and isinstance(made.get("parts"), list) and made["parts"]:
            target = rng.choice(made["parts"])
        if not isinstance(target, dict) or not target:
            continue
        key = rng.choice(list(target))
        if rng.random() < 0.2:
            del target[key]
        elif isinstance(target[key], int) and rng.random() < 0.5:
            target[key] += rng.choice((-4096, -1, 1, 4096, 1 << 20))
        else:
            target[key] = rng.choice(NASTY)
    text = json.dumps(made).encode()
    room = parts(raw)[0]["offset"] - HOME
    text = text[:room].ljust(min(len(text), room))
    fixed = raw[:12] + zlib.crc32(text).to_bytes(4, "little") + len(text).to_bytes(8, "little")
    whole = fixed + text
    return whole + raw[len(whole) :]


KINDS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "cut": cut, "header": header, "parts": in_parts, "padding": padding, "table": table,
}  # fmt: skip


def logits(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    engine = osmium.load(path, "cpu", context=64)
    try:
        return engine.logits(IDS)
    finally:
        engine.close()


def main(kind: str, seed: int) -> None:
    rng, raw, start = random.Random(seed), DEMO.read_bytes(), time.monotonic()
    wanted, refused = logits(DEMO), 0
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.osmium"
        for case in range(CASES[kind]):
            made = KINDS[kind](rng, raw)
            path.write_bytes(made)
            try:
                if not np.array_equal(logits(path), wanted):
                    wrong.append(f"case {case}: another model")
            except CheckpointError:
                refused += 1
            except Exception as error:
                wrong.append(f"case {case}: {error!r}")
            path.unlink()  # the mapping stays valid
    seconds = time.monotonic() - start
    print(
        json.dumps({"cases": CASES[kind], "refused": refused, "wrong": wrong, "seconds": seconds})
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
