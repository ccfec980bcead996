"""A model whose responses come from a script, in the real engine with the bundled tokenizer.

The engine, its scheduler and sampler, the tokenizer, the chat template and the parser are those of
the product.  The model alone is replaced: the logits of the next token favour the script's text.
A token mask still forbids what does not fit, so structured output is structured.  Where the mask
forbids the text before a call of a tool, the script continues with the call.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from osmium.engine.engine import Engine
from osmium.engine.kv_cache_manager import KVCacheManager
from osmium.engine.runner import ModelRunner
from osmium.experts.runner import ExpertCounters
from osmium.models.state import ModelState
from osmium.ops import StepInputs
from osmium.ops.reference import ReferenceOps
from osmium.text.files import read_text_files
from osmium.text.tokenizer import Tokenizer
from osmium.weights import DEMO
from osmium.weights.packed import open_packed

__all__ = ["Script", "ScriptedModel", "scripted_engine"]

Script = Callable[[str], str]
"""From a rendered prompt to the text of the response, reasoning and calls of tools included."""

FAVOURED, SECOND = 100.0, 50.0
"""Logits of the script's next token, and of the first token of a later call; others have 0."""

CALL = "<tool_call>"

MAX_TOKENS = 4096
"""Default limit of a response, for a mask that never permits the script's text."""

NAME = "scripted"

PAGE_SIZE, MAX_STEP_TOKENS = 256, 8192


class ScriptedModel:
    """Keeps the ids of each sequence by its state slot, and looks up the script's next token."""

    def __init__(self, script: Script, tokenizer: Tokenizer, config: Any, num_slots: int) -> None:
        self.config = config
        self.rows = self.piece_rows = self.pass_tokens = MAX_STEP_TOKENS
        self.prefill_pass = SimpleNamespace(invalidate=lambda: None)
        self.script, self.tokenizer = script, tokenizer
        self._ids: list[list[int]] = [[] for _ in range(num_slots)]
        self._prompt_tokens = [0] * num_slots
        """By slot: tokens of the prompt, 0 until the prompt has been read."""
        self._response: list[list[int]] = [[] for _ in range(num_slots)]
        self._call_at = [0] * num_slots
        """By slot: the index in the response of a call's first token; 0 without a call."""
        self._cursor = [0] * num_slots
        """By slot: the index in the response of the next token."""
        self._parts: list[tuple[int, int]] = []
        """(slot, context length) of each sequence of the last step."""
        self._starts: list[int] = []
        self._passes: dict[int, tuple[int, int]] = {}
        """The part of the last prefill pass, by its first row."""
        self.before_layer: Callable[[int], None] = lambda layer: None
        """Called before each layer of a prefill pass."""

    def forward(self, step: StepInputs, state: ModelState) -> None:
        self._starts = starts = step.query_start_loc.tolist()
        self._parts = []
        for s in range(step.sequences):
            slot, past = int(step.state_slots[s]), int(step.context_lens[s])
            self._parts.append((slot, past))
            if slot < 0:
                continue
            if past == 0:
                self._prompt_tokens[slot] = 0
            ids = self._ids[slot]
            assert past <= len(ids), "a sequence continues in its slot"
            ids[past:] = step.ids[starts[s] : starts[s + 1]].tolist()

    def prefill(
        self, steps: Sequence[StepInputs], state: ModelState, first_row: int, admits: bool
    ) -> Iterator[int]:
        (step,) = steps
        self.forward(step, state)
        (self._passes[first_row],) = self._parts
        for layer in range(self.config.num_layers):
            self.before_layer(layer)
            yield layer + 1

    def head(
        self,
        out: npt.NDArray[np.float32],
        rows: npt.NDArray[np.int32] | None = None,
        first_prefill_row: int | None = None,
    ) -> None:
        """out f32 [T, vocab]: the logits after each of these rows of the last step or a pass."""
        out[:] = 0
        if first_prefill_row is not None:
            assert rows is not None, "a pass has more rows than logits"
            slot, past = self._passes[first_prefill_row]
            for i, row in enumerate(rows.tolist()):
                self._favour(out[i], slot, past + row + 1)
            return
        for i, row in enumerate(range(len(out)) if rows is None else rows.tolist()):
            s = bisect_right(self._starts, row) - 1
            slot, past = self._parts[s]
            if slot >= 0:
                self._favour(out[i], slot, past + row - self._starts[s] + 1)

    def _favour(self, logits: npt.NDArray[np.float32], slot: int, length: int) -> None:
        """Write the logits after the first `length` ids of a sequence."""
        if not self._prompt_tokens[slot]:
            self._start(slot, length)
        response, call_at = self._response[slot], self._call_at[slot]
        if length > self._prompt_tokens[slot]:
            token, cursor = self._ids[slot][length - 1], self._cursor[slot]
            if cursor < len(response) and token == response[cursor]:
                self._cursor[slot] = cursor + 1
            elif cursor < call_at and token == response[call_at]:
                self._cursor[slot] = call_at + 1
        cursor = self._cursor[slot]
        if cursor < call_at:
            logits[response[call_at]] = SECOND
        following = response[cursor] if cursor < len(response) else self.config.eos_token_ids[0]
        logits[following] = FAVOURED

    def _start(self, slot: int, length: int) -> None:
        """Look up the response to a prompt."""
        text = self.script(self.tokenizer.decode(self._ids[slot][:length], specials=True))
        before, call, after = text.partition(CALL)
        response = self.tokenizer.encode(before, specials=False)
        self._call_at[slot] = len(response) if call else 0
        response += self.tokenizer.encode(call + after, specials=False)
        self._prompt_tokens[slot], self._response[slot], self._cursor[slot] = length, response, 0


class _NoExperts:
    """An expert runner without experts."""

    recorder = None
    cache = SimpleNamespace(layout=SimpleNamespace(nbytes=0))

    def counters(self) -> ExpertCounters:
        return ExpertCounters(0, 0, 0, 0)


def scripted_engine(script: Script, *, context: int = 131072, max_num_seqs: int = 8) -> Engine:
    """An engine over a ScriptedModel.  Responses start with reasoning, as the template says."""
    files = open_packed(DEMO)
    text = read_text_files(files)
    assert text.tokenizer is not None, "the bundled model has a tokenizer"
    ends = tuple(sorted({*files.config.eos_token_ids, *text.end_ids}))
    config = replace(files.config, eos_token_ids=ends)
    table = -(-context // PAGE_SIZE)
    pages = table * max_num_seqs
    model = ScriptedModel(script, text.tokenizer, config, max_num_seqs)
    state = ModelState(PAGE_SIZE, pages + 1, max_num_seqs, ())
    runner = ModelRunner(
        ReferenceOps(cache_bytes=0), cast(Any, model), cast(Any, _NoExperts()), state,
        max_num_seqs, table,
    )  # fmt: skip
    return Engine(
        runner, KVCacheManager(pages, PAGE_SIZE, max_num_seqs), name=NAME, context=context,
        tokenizer=text.tokenizer, template=text.template,
        defaults={"max_tokens": MAX_TOKENS, **text.defaults},
    )  # fmt: skip
