"""Bodies that are costly to parse or to tokenize."""

import json
import random
from collections.abc import Iterator

__all__ = ["bodies"]

WORDS = "the quick brown fox, jumps over a lazy dog and says hello to every planet.".split()


def bodies(size: int) -> Iterator[tuple[str, bytes]]:
    """Bodies of `size` bytes: prose, nested arrays, stop texts, token ids."""
    rng = random.Random(1)
    prose = " ".join(rng.choice(WORDS) for _ in range(size // 8)).ljust(size)[:size]
    chat, plain = "/v1/chat/completions", "/v1/completions"
    yield chat, json.dumps({"messages": [{"role": "user", "content": prose}]}).encode()
    arrays = b"[[],[]]," * (size // 8)
    yield chat, b'{"messages":[{"role":"user","content":[' + arrays + b"[]]}]}"
    stop = [f"stop text {i}" for i in range(size // 18)]
    yield chat, json.dumps({"messages": [{"role": "user", "content": "hi"}], "stop": stop}).encode()
    yield plain, b'{"prompt":[' + b"5," * (size // 2) + b"5]}"
