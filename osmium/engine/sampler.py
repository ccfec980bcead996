"""Sampling on the host: from a row of logits to a token.

The order is: repetition, presence and frequency penalties; logit bias; min_tokens; temperature,
top-k, top-p, min-p; then a draw.  At temperature 0 the largest logit after the bias is taken.  The
draw depends only on the seed and the token's index in the response, so that batches and restarts do
not change it.  Log-probabilities are those of the model's unmodified logits.
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

    logits f32 [vocab], not modified.  Raises: OsmiumError where the largest is not finite.
    """
    params = request.params
    if not np.isfinite(logits.max()):
        raise non_finite_error()
    scores = _penalized_logits(logits, request)
    draw = uniform(request, request.completion_tokens)
    token = sample_from_logits(
        scores, params.temperature, params.top_k, params.top_p, params.min_p, draw
    )
    if params.logprobs is None:
        return token, None, ()
    logprobs = log_softmax(logits)
    order: npt.NDArray[np.intp] = np.argsort(-logprobs, kind="stable")[: params.logprobs]
    top = tuple((int(i), float(logprobs[i])) for i in order)
    return token, float(logprobs[token]), top


def log_softmax(logits: npt.NDArray[Any]) -> F64:
    """log(softmax(logits)) along the last axis, in f64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def _penalized_logits(logits: F32, request: Request) -> F64:
    """A copy of the logits with penalties and bias, in f64."""
    params = request.params
    scores = logits.astype(np.float64)
    if params.repetition_penalty != 1:
        seen, penalty = np.unique(request.tokens), params.repetition_penalty
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    if params.presence_penalty or params.frequency_penalty:
        generated, counts = np.unique(np.array(request.generated, np.int64), return_counts=True)
        scores[generated] -= params.presence_penalty + params.frequency_penalty * counts
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    if not request.may_end:
        scores[request.end_ids] = -np.inf
    return scores


def non_finite_error() -> OsmiumError:
    """The error for a row whose largest logit is not finite."""
    return OsmiumError(
        "The largest logit is not finite, so no token can be sampled: the weights are damaged, or "
        "a kernel computes wrong values."
    )


def can_sample_on_device(request: Request) -> bool:
    """Whether Ops.sample can draw this request's next token.

    It has no penalty, bias, log-probabilities, nor tokens left of min_tokens.
    """
    params = request.params
    return (
        request.may_end
        and params.repetition_penalty == 1
        and not params.presence_penalty
        and not params.frequency_penalty
        and not params.logit_bias
        and params.logprobs is None
    )


def uniform(request: Request, index: int) -> float:
    """The uniform number in [0, 1) for a response's token `index`, from the seed and the index."""
    if request.params.temperature == 0:
        return 0.0
    key = np.array([request.seed & (1 << 64) - 1, index], np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())
