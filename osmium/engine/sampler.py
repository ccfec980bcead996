"""Sampling on the host: from a row of logits to a token, where a step has no captured graph.

The order is: repetition, presence and frequency penalties; logit bias; token mask; temperature,
top-k, top-p, min-p; then a draw.  At temperature 0 the largest logit after the mask is taken.  The
draw depends only on the seed and the token's index in the response, so that batches and restarts do
not change it.  Log-probabilities are those of the model's unmodified logits.
"""

import numpy as np
import numpy.typing as npt

from osmium.engine.request import Request, step_error
from osmium.errors import OsmiumError
from osmium.ops.controls import mask_words
from osmium.ops.sampling import (
    adjust_tokens,
    allowed_tokens,
    largest_tokens,
    log_softmax,
    sample_from_logits,
)

__all__ = [
    "Sampled", "log_softmax", "sample", "sample_or_error", "sampling_error", "token_penalties",
    "uniform",
]  # fmt: skip

F32 = npt.NDArray[np.float32]

Sampled = tuple[int, float | None, tuple[tuple[int, float], ...]]
"""A token, its log-probability, and the likeliest alternatives with theirs."""


def sample(logits: F32, request: Request) -> Sampled:
    """The next token of a request, its log-probability and the likeliest alternatives.

    logits f32 [vocab], not modified.  Raises: OsmiumError where the largest is not finite, before
    or after penalties, bias and mask.
    """
    params = request.params
    scores = _adjusted_logits(logits, request)
    if not np.isfinite(logits.max()) or not np.isfinite(scores.max()):
        raise sampling_error(request)
    draw = uniform(request, request.completion_tokens)
    token = sample_from_logits(
        scores.astype(np.float64),
        params.temperature, params.top_k, params.top_p, params.min_p, draw,
    )  # fmt: skip
    if params.logprobs is None:
        return token, None, ()
    logprobs = log_softmax(logits)
    top = largest_tokens(logits, params.logprobs)
    return token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in top)


def sample_or_error(logits: F32, request: Request) -> Sampled | OsmiumError:
    """`sample`, or the error that ends this request alone."""
    try:
        return sample(logits, request)
    except Exception as error:
        return step_error(error)


def token_penalties(request: Request) -> F32:
    """The repetition, presence and frequency penalty of a request, f32 [3]."""
    params = request.params
    return np.array(
        (params.repetition_penalty, params.presence_penalty, params.frequency_penalty), np.float32
    )


def _adjusted_logits(logits: F32, request: Request) -> F32:
    """The logits with penalties, bias and mask; a copy if any of them applies."""
    params, prompt = request.params, request.tokens[: request.prompt_tokens]
    if params.has_penalties or params.logit_bias:
        bias = params.logit_bias
        tokens = np.array(sorted({*request.tokens, *bias}), np.int64)
        counts = np.bincount(np.array(request.generated, np.int64), minlength=len(logits))[tokens]
        seen = (counts > 0) | np.isin(tokens, np.array(prompt, np.int64))
        biases = np.array([bias.get(token, 0.0) for token in tokens.tolist()], np.float32)
        adjusted = logits.copy()
        adjusted[tokens] = adjust_tokens(
            logits[tokens], seen, counts, token_penalties(request), biases
        )
        logits = adjusted
    if request.token_mask is not None:
        words = np.zeros(mask_words(len(logits)), np.int32)
        request.token_mask.fill(words)
        logits = np.where(allowed_tokens(words, len(logits)), logits, np.float32(-np.inf))
    return logits


def sampling_error(request: Request) -> OsmiumError:
    """The error for a row in which no token can be sampled."""
    if request.mask_error is not None:
        return step_error(request.mask_error)
    if request.token_mask is not None:
        return OsmiumError(
            "No token can be sampled: the mask of the structured output allows none, or the "
            "largest logit is not finite (damaged weights, or a kernel that computes wrong values)."
        )
    return OsmiumError(
        "The largest logit is not finite, so no token can be sampled: the weights are damaged, or "
        "a kernel computes wrong values."
    )


def uniform(request: Request, index: int) -> float:
    """The uniform number in [0, 1) for a response's token `index`, from the seed and the index."""
    if request.params.temperature == 0:
        return 0.0
    key = np.array([request.seed & (1 << 64) - 1, index], np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())
