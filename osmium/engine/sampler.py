"""From a row of logits to a token.

In this order: repetition, presence and frequency penalties; logit bias; then, unless the
temperature is 0 and the largest logit wins, temperature, top-k, top-p, min-p, and a draw.  The draw
is a function of the seed and of how many tokens came before, so that batches and restarts do not
change it.  Log-probabilities are of the logits as the model gave them.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.engine.request import Request, SamplingParams
from osmium.errors import OsmiumError

__all__ = ["log_softmax", "sample"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def sample(
    logits: F32, request: Request
) -> tuple[int, float | None, tuple[tuple[int, float], ...]]:
    """The next token of a request, its log-probability and the likeliest alternatives.

    logits f32 [vocab], left as they are.  Raises: OsmiumError where the largest is no number.
    """
    params = request.params
    if not np.isfinite(logits.max()):
        raise OsmiumError(
            f"The largest logit is {logits.max()}, so no token can be chosen: the weights are "
            "damaged, or a kernel computes wrongly."
        )
    scores = _adjusted(logits, request)
    if params.temperature == 0:
        token = int(scores.argmax())
    else:
        ids, p = _filtered(scores, params)
        draw = _uniform(request.seed, request.completion_tokens)
        at = int(np.searchsorted(np.cumsum(p), draw, side="right"))
        token = int(ids[min(at, len(ids) - 1)])
    if params.logprobs is None:
        return token, None, ()
    logprobs = log_softmax(logits)
    order: npt.NDArray[np.intp] = np.argsort(-logprobs, kind="stable")[: params.logprobs]
    top = tuple((int(i), float(logprobs[i])) for i in order)
    return token, float(logprobs[token]), top


def log_softmax(logits: npt.NDArray[Any]) -> F64:
    """Along the last axis, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def _adjusted(logits: F32, request: Request) -> F64:
    """A copy with penalties and bias, in float64."""
    params = request.params
    scores = logits.astype(np.float64)
    if params.repetition_penalty != 1:
        seen = np.unique(request.tokens)
        mine = scores[seen]
        weaker = np.where(
            mine > 0, mine / params.repetition_penalty, mine * params.repetition_penalty
        )
        scores[seen] = weaker
    if params.presence_penalty or params.frequency_penalty:
        said, times = np.unique(np.array(request.generated, np.int64), return_counts=True)
        scores[said] -= params.presence_penalty + params.frequency_penalty * times
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    return scores


def _filtered(scores: F64, params: SamplingParams) -> tuple[npt.NDArray[np.intp], F64]:
    """The tokens that may be drawn, likeliest first, and their probabilities."""
    count = len(scores)
    if 0 < params.top_k < count:
        kept = np.argpartition(-scores, params.top_k - 1)[: params.top_k]
    else:
        kept = np.arange(count)
    ids = kept[np.lexsort((kept, -scores[kept]))]
    with np.errstate(over="ignore"):  # far below the best at next to no temperature: exp(-inf) = 0
        p = np.exp((scores[ids] - scores[ids[0]]) / params.temperature)
    p /= p.sum()
    if params.top_p < 1:  # the token that crosses the mark is kept
        p = p[: int(np.searchsorted(np.cumsum(p), params.top_p)) + 1]
    if params.min_p > 0:
        p = p[p >= params.min_p * p[0]]
    return ids[: len(p)], p / p.sum()


def _uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on nothing but these two."""
    key = np.array([seed & (1 << 64) - 1, index], np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())
