"""How fast prompts are read and replies are written, end to end through the engine.

Method.  A prompt of random token ids (seeded; no text that repeats itself, which a cache of experts
would flatter) is given to an engine that runs nothing else.  Prefill is the time from submitting it
to its first token; decode is the time between the first token and the last.  Each figure is the
median over the repeats, after one run that does not count.  Every routed expert is computed: the
counters of the three kernels that route, look up and copy must add up, or the bench fails.
"""

import datetime
import platform
import statistics
import time
from typing import Any

import numpy as np

from osmium.engine.engine import Engine
from osmium.engine.request import SamplingParams
from osmium.errors import ConfigError

__all__ = ["measure"]


def measure(engine: Engine, prompt_tokens: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Medians of prefill and decode, as a document for JSON.

    Raises: ConfigError where prompt and reply do not fit the context, or a size is not positive.
    """
    for name, value, least in (
        ("--prompt-tokens", prompt_tokens, 1), ("--tokens", tokens, 2), ("--repeats", repeats, 1),
    ):  # fmt: skip
        if value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}.")
    if prompt_tokens + tokens > engine.context:
        raise ConfigError(
            f"{prompt_tokens} prompt tokens and {tokens} more do not fit the context of "
            f"{engine.context}; lower --prompt-tokens or raise --context."
        )
    rng = np.random.default_rng(1)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    runs = []
    for _ in range(repeats + 1):
        ids = [int(one) for one in rng.integers(0, engine.config.vocab, prompt_tokens)]
        start = time.perf_counter()
        stamps = [time.perf_counter() for _ in engine.generate(ids, params)]
        runs.append((stamps[0] - start, stamps[-1] - stamps[0], len(stamps)))
    prefill = statistics.median(run[0] for run in runs[1:])
    decode = statistics.median(run[1] / (run[2] - 1) for run in runs[1:])
    experts = engine.status()["experts"]
    if experts["routed"] != experts["hit"] + experts["fetched"]:
        raise AssertionError(f"the counters of routed experts do not add up: {experts}")
    return {
        "model": engine.name,
        "device": engine.device,
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
        "repeats": repeats,
        "rows": [
            {"what": "prefill", "tokens": prompt_tokens, "tokens_per_s": prompt_tokens / prefill},
            {"what": "decode", "tokens": tokens, "tokens_per_s": 1 / decode},
        ],
        "experts": experts,
    }
