"""Ragged cases of the operations on experts of many tokens.

Tokens around tiles and warps; one expert with all pairs, and experts without any; one expert per
token, and as many as a warp has lanes.  Rows of partial blocks and of partial warps.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from tests.ops.cases import TINY, Case, count_uses, expert_part, gather_add, group_by_expert
from tests.ptx.cases_linear import experts, fused

__all__ = ["CASES", "LARGE"]

Make = Callable[[np.random.Generator], Case]


def group(tokens: int, top_k: int, experts: int, *used: Any, **options: Any) -> Make:
    size = replace(TINY, lengths=(tokens,), top_k=top_k, experts=experts)
    return lambda rng: group_by_expert(rng, size, *used, **options)


def gather(tokens: int, top_k: int, hidden: int, *used: Any, **options: Any) -> Make:
    size = replace(TINY, lengths=(tokens,), top_k=top_k, experts=top_k + 5, hidden=hidden)
    return lambda rng: gather_add(rng, size, *used, **options)


def parts(
    bits: int, tokens: int, top_k: int, experts: int, hidden: int, inner: int, staged: int,
    used: Any = "all",
) -> Make:  # fmt: skip
    size = replace(
        TINY, lengths=(tokens,), top_k=top_k, experts=experts, hidden=hidden, inner=inner
    )
    return lambda rng: expert_part(rng, size, bits, staged, used)


def uses(tokens: int, top_k: int, experts: int, *used: Any) -> Make:
    slots = max(2, experts // 2)
    size = replace(TINY, lengths=(tokens,), top_k=top_k, experts=experts, slots=slots)
    return lambda rng: count_uses(rng, size, *used)


all_resident = partial(group, has_slots=False)

CASES: dict[str, Make] = {
    "group_by_expert of a pair": group(1, 1, 1),
    "group_by_expert of a token": group(1, 8, 9),
    "group_by_expert of 31 tokens": all_resident(31, 3, 17),
    "group_by_expert of 33 tokens, one expert": group(33, 2, 5, "one"),
    "group_by_expert of 65 tokens, one each": group(65, 1, 6),
    "group_by_expert of 65 tokens, all of one expert": all_resident(65, 1, 40, "one"),
    "group_by_expert of 200 tokens, empty experts": group(200, 4, 37, "some"),
    "expert_part of a token": parts(4, 1, 1, 3, 256, 128, 1),
    "expert_part of two tiles of an expert": parts(8, 65, 1, 2, 256, 128, 1, "one"),
    "expert_part of 33 tokens, wide": parts(4, 33, 2, 4, 256, 384, 3),
    "expert_part of 31 tokens, bf16": parts(16, 31, 2, 5, 96, 160, 2, "some"),
    "expert_part of 65 tokens of one expert, bf16": parts(16, 65, 1, 3, 32, 288, 1, "one"),
    "count_uses of a token": uses(1, 1, 2),
    "count_uses of 65 tokens": uses(65, 2, 7),
    "count_uses of 200 tokens, empty experts": uses(200, 4, 37, "some"),
    "count_uses of 130 tokens of one expert": uses(130, 1, 5, "one"),
    "gather_add of a token": gather(1, 1, 4),
    "gather_add of 31 tokens, a warp and more": gather(31, 3, 132),
    "gather_add of 33 tokens, one each": gather(33, 1, 64, has_shared=False),
    "gather_add of 65 tokens, equal experts": gather(65, 2, 32, "one"),
    "gather_add of two blocks and more": gather(3, 9, 2056),
    "gather_add of 32 experts": gather(2, 32, 8),
    "gather_add of three parts": gather(33, 8, 128, "some", parts=3),
    "gather_add of a pair in each part": gather(1, 2, 16, parts=2),
    "gather_add of 200 tokens": gather(200, 4, 36),
}

LARGE: dict[str, Make] = {
    "group_by_expert of 512 tokens": group(512, 8, 256),
    "group_by_expert of 513 tokens, empty experts": all_resident(513, 8, 256, "some"),
    "group_by_expert of 20,480 tokens": group(20_480, 8, 256),
    "group_by_expert of 20,001 tokens, one expert": group(20_001, 8, 256, "one"),
    "group_by_expert of 20,001 tokens, 512 experts": group(20_001, 10, 512),
    "group_by_expert of 32,768 tokens, 1,024 experts": group(32_768, 16, 1024),
    "expert_part of 300 tokens": parts(4, 300, 4, 40, 3072, 1024, 7),
    "expert_part of 300 tokens, int8": parts(8, 300, 4, 40, 1024, 512, 20),
    "count_uses of 2,048 tokens": uses(2048, 8, 256),
    "count_uses of 2,000 tokens, 1,000 experts": uses(2000, 10, 1000, "some"),
    "expert_part of 300 tokens, bf16": parts(16, 300, 4, 40, 1024, 512, 20),
    "bf16_gemm of 700 tokens": fused("bf16", 700, 2050, 3072),
    "bf16_gemm of 2,000 tokens": fused("bf16", 2000, 1024, 4096),
    "bf16_gemm of a router": fused("bf16", 512, 257, 3072),
    "bf16_gemm of 100 tokens": fused("bf16", 100, 128, 3072),
    "bf16_moe_gemm of 200 tokens": experts(16, 200, 4, 1024, 512, shared=512, form="bf16"),
    "int4_gemm of 700 tokens": fused("int4", 700, 2050, 2048),
    "int8_gemm of 700 tokens": fused("int8", 700, 2050, 3072),
    "int4_moe_gemm of 200 tokens": experts(4, 200, 4, 1024, 512, shared=512),
    "int8_moe_gemm of 200 tokens": experts(8, 200, 4, 1024, 512, shared=512),
    "gather_add of 2,000 tokens": gather(2_000, 8, 3072),
    "gather_add of 2,000 tokens in parts": gather(2_000, 8, 2048, parts=3),
}
"""Cases for a GPU."""
