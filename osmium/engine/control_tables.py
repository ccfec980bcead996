"""The device's tables for penalties, logit bias, token masks and log-probabilities of requests.

`start` brings the tables to the state of a batch, once per decode session; then the device counts
tokens by itself.  Tables belong to state slots.  So nothing is written while the same requests
continue, whatever their rows.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from osmium.engine.request import Request
from osmium.engine.sampler import token_penalties
from osmium.ops import Ops
from osmium.ops.controls import (
    HAS_BIAS,
    HAS_MASK,
    HAS_PENALTIES,
    PROMPT_BIT,
    SamplingControls,
)

__all__ = ["ControlTables"]

MAPPED = ("token_mask", "logprobs", "logprob_tokens")
"""Arrays of SamplingControls that the host reads or writes while steps run."""

MAX_SINGLE_WRITES = 16
"""Most token counts that are written one by one; more replace the whole row."""


class ControlTables:
    """SamplingControls of a runner, and which request each state slot's tables are of."""

    def __init__(self, ops: Ops, rows: int, slots: int, vocab: int, ring_size: int) -> None:
        """Arrays for `rows` rows and `slots` state slots.  Raises: OutOfMemory."""
        self._ops, self._vocab, self._ring_size = ops, vocab, ring_size
        shapes = SamplingControls.shapes(rows, slots, vocab, ring_size)
        self.controls = SamplingControls(
            **{
                name: (ops.zeros_mapped if name in MAPPED else ops.empty)(shape, dtype)
                for name, (shape, dtype) in shapes.items()
            }
        )
        self._counted: dict[int, tuple[weakref.ref[Request], int]] = {}
        """By state slot: the request of its token counts, and how many of its tokens they have."""
        self._biased: dict[int, weakref.ref[Request]] = {}
        """By state slot: the request of its logit bias."""
        self._requests: Sequence[Request] = ()
        self._host_views: dict[str, npt.NDArray[Any]] = {}

    def start(self, requests: Sequence[Request]) -> None:
        """Write the rows of a batch of requests, each with one pending token."""
        flags = np.zeros((len(requests), 3), np.int32)
        penalties = np.ones((len(requests), 3), np.float32)
        for row, request in enumerate(requests):
            params = request.params
            flags[row, 1] = request.prompt_tokens
            flags[row, 2] = -1 if params.logprobs is None else min(params.logprobs, self._vocab)
            if params.has_penalties:
                flags[row, 0] |= HAS_PENALTIES
                penalties[row] = token_penalties(request)
                self._write_counts(request)
            if params.logit_bias:
                flags[row, 0] |= HAS_BIAS
                self._write_bias(request)
            if request.token_mask is not None:
                flags[row, 0] |= HAS_MASK
        controls = self.controls.first_rows(len(requests))
        self._ops.copy_h2d(controls.flags, flags)
        self._ops.copy_h2d(controls.penalties, penalties)
        self._requests = requests
        self._host_views = {
            name: self._ops.host_view(getattr(self.controls, name)) for name in MAPPED
        }
        for name in MAPPED[1:]:
            ring = self._host_views[name].reshape(-1)
            shape = (self._ring_size, len(requests), self.controls.logprobs.shape[2])
            self._host_views[name] = ring[: shape[0] * shape[1] * shape[2]].reshape(shape)

    def count_step(self, row: int) -> None:
        """A step has counted the token of a row that had not ended."""
        request = self._requests[row]
        if request.params.has_penalties and request.state_slot in self._counted:
            of, count = self._counted[request.state_slot]
            if of() is request:
                self._counted[request.state_slot] = of, count + 1

    def fill_masks(self) -> None:
        """Write the token masks of the next step; no step that reads masks may be in flight."""
        for row, request in enumerate(self._requests):
            if request.token_mask is None or request.done:
                continue
            try:
                request.token_mask.fill(self._host_views["token_mask"][row])
            except Exception as error:  # ends this request alone, when the step's token is there
                request.mask_error = error

    def logprobs(self, step: int, row: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        """Log-probability of the token of decode step `step`, and the likeliest alternatives."""
        count = self._requests[row].params.logprobs
        if count is None:
            return None, ()
        entry, end = step % self._ring_size, 1 + min(count, self._vocab)
        values = self._host_views["logprobs"][entry, row, :end].tolist()
        tokens = self._host_views["logprob_tokens"][entry, row, 1:end].tolist()
        return values[0], tuple(zip(tokens, values[1:], strict=True))

    def _write_counts(self, request: Request) -> None:
        """Bring the counts of the request's slot to its computed tokens."""
        slot, computed = request.state_slot, request.num_computed_tokens
        of, counted = self._counted.get(slot, (None, 0))
        known = of is not None and of() is request and counted <= computed
        row = self.controls.token_counts[slot : slot + 1]
        tokens, prompt = request.tokens[:computed], request.prompt_tokens
        if not known or computed - counted > MAX_SINGLE_WRITES:
            generated = np.array(tokens[prompt:], np.int64)
            counts = np.bincount(generated, minlength=self._vocab).astype(np.uint32)
            counts[tokens[:prompt]] |= np.uint32(PROMPT_BIT)
            self._ops.copy_h2d(row, counts.reshape(1, -1))
        else:
            for token in {*tokens[counted:]}:
                count = tokens[prompt:].count(token) | (
                    PROMPT_BIT if token in tokens[:prompt] else 0
                )
                one = row.reshape(-1)[token : token + 1]
                self._ops.copy_h2d(one, np.array([count], np.uint32))
        self._counted[slot] = weakref.ref(request), computed

    def _write_bias(self, request: Request) -> None:
        """Write the bias of the request to its slot, unless it is there."""
        slot = request.state_slot
        if slot in self._biased and self._biased[slot]() is request:
            return
        bias = np.zeros((1, self._vocab), np.float32)
        for token, value in request.params.logit_bias.items():
            bias[0, token] = value
        self._ops.copy_h2d(self.controls.logit_bias[slot : slot + 1], bias)
        self._biased[slot] = weakref.ref(request)
