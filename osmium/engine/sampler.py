"""From a row of logits to a token.

In this order: repetition, presence and frequency penalties; logit bias; then, unless the
temperature is 0 and the largest logit wins, temperature, top-k, top-p, min-p, and a draw.  The draw
is a function of the seed and of how many tokens came before, so that batches and restarts do not
change it.  Log-probabilities are of the logits as the model gave them.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.engine.request import Request
from osmium.errors import OsmiumError
from osmium.ops.sampling import sample_from_logits

__all__ = ["can_sample_on_device", "log_softmax", "non_finite_error", "sample", "uniform"]

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
        raise non_finite_error()
    scores = _adjusted(logits, request)
    lot = uniform(request, request.completion_tokens)
    token = sample_from_logits(
        scores, params.temperature, params.top_k, params.top_p, params.min_p, lot
    )
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


def non_finite_error() -> OsmiumError:
    """What to say where a row's largest logit is not finite."""
    return OsmiumError(
        "The largest logit is not finite, so no token can be chosen: the weights are damaged, or a "
        "kernel computes wrongly."
    )


def can_sample_on_device(request: Request) -> bool:
    """Whether Ops.sample draws this request's tokens: no penalty, no bias, no log-probabilities."""
    params = request.params
    return (
        params.repetition_penalty == 1
        and not params.presence_penalty
        and not params.frequency_penalty
        and not params.logit_bias
        and params.logprobs is None
    )


def uniform(request: Request, index: int) -> float:
    """What decides the draw of a reply's token `index`: a number in [0, 1) that depends on nothing
    but the seed and the index."""
    if request.params.temperature == 0:
        return 0.0
    key = np.array([request.seed & (1 << 64) - 1, index], np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())
