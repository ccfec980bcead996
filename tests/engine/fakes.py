"""A model that detects any cache mistake, a byte tokenizer, and engines made of them.

`HistoryModel` stores every id in the pages and state slots that the engine names.

Its logits depend on the ids that it reads back: a wrong page, slot, position or length gives other
logits or an assertion.
"""

import codecs
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from osmium.config import ModelConfig
from osmium.engine.engine import Engine
from osmium.engine.kv_cache_manager import KVCacheManager
from osmium.engine.request import Event, Finish, SamplingParams, Token
from osmium.engine.runner import ModelRunner
from osmium.experts.runner import ExpertCounters
from osmium.models.state import ModelState
from osmium.ops import StepInputs
from osmium.ops.reference import ReferenceOps
from tests.models.build import CASES, hf_config

Logits = npt.NDArray[np.float32]
Rule = Callable[[list[int]], Logits]
"""Logits of the next token, from a sequence's ids so far."""

EOS, SPECIAL, OTHER_EOS = 256, 257, 258
VOCAB = 260
"""256 bytes, and a few ids without text."""

CONFIG = replace(
    ModelConfig.from_hf(hf_config(CASES[0])), vocab_size=VOCAB, eos_token_ids=(EOS, OTHER_EOS)
)

GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)

PATIENCE_S = 30.0
"""Waiting longer than this means that a request was lost."""


# -- rules: the logits of a history ----------------------------------------------------------------


def scrambled(history: list[int]) -> Logits:
    """Pseudo-random logits that depend on every id of the history and on their order."""
    code = 0
    for one in history:
        code = (code * 6364136223846793005 + one + 1442695040888963407) % 2**64
    return np.random.default_rng(code).normal(0, 3, VOCAB).astype(np.float32)


def uniform(history: list[int]) -> Logits:
    return np.zeros(VOCAB, np.float32)


def always(*ids: int, prompt: int = 1) -> Rule:
    """Generate these ids in turn, after a prompt of `prompt` tokens."""

    def rule(history: list[int]) -> Logits:
        logits = np.zeros(VOCAB, np.float32)
        logits[ids[(len(history) - prompt) % len(ids)]] = 50
        return logits

    return rule


def follow(rule: Rule, prompt: list[int], count: int) -> list[int]:
    """The greedy response, computed without an engine."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(rule(ids).argmax()))
    return ids[len(prompt) :]


# -- the model -------------------------------------------------------------------------------------


class HistoryModel:
    """Stores ids in pages and a checksum of the sequence in state slots, like a real model."""

    def __init__(self, rule: Rule, pages: int, page: int, slots: int, rows: int) -> None:
        self.config, self.rows, self.rule = CONFIG, rows, rule
        self.pass_tokens = self.piece_rows = rows
        self.invalidations = 0
        """Calls of prefill_pass.invalidate."""
        self.prefill_pass = SimpleNamespace(invalidate=self._invalidate)
        self.parts_per_layer = 1
        self.before_part: Callable[[int, int], None] = lambda first_row, part: None
        """Called before each part of a prefill pass, with its first row and the part's number."""
        self.prefill_rows: dict[int, list[tuple[list[int], int]]] = {}
        """rows_seen of the last prefill pass, by its first row."""
        self.pages = np.full((pages, page), -1, np.int64)
        self.slots: list[tuple[int, int]] = [(-1, -1)] * slots
        """Per slot: (tokens, checksum) of the last sequence in it."""
        self.rows_seen: list[tuple[list[int], int]] = []
        """For every row of the last step: its sequence's ids, and how many of them count."""
        self.before: Callable[[StepInputs], None] = lambda step: None
        self.steps: list[list[tuple[int, int, int]]] = []
        """(slot, past, tokens) of every sequence of every step."""

    def forward(self, step: StepInputs, state: ModelState) -> None:
        self.before(step)
        self.rows_seen, parts = [], []
        for s in range(step.sequences):
            first, end = int(step.query_start_loc[s]), int(step.query_start_loc[s + 1])
            past, slot, table = (
                int(step.context_lens[s]),
                int(step.state_slots[s]),
                step.page_table[s],
            )
            assert end > first, "a sequence of a step has at least one row"
            assert (step.sequence_ids[first:end] == s).all()
            assert (step.positions[first:end] == np.arange(past, past + end - first)).all()
            for row, position in enumerate(range(past, past + end - first), first):
                self.pages[table[position // step.page_size], position % step.page_size] = step.ids[
                    row
                ]
            at = np.arange(past + end - first)
            ids = self.pages[table[at // step.page_size], at % step.page_size].tolist()
            if past:
                assert slot >= 0, "a row that has ended is at position 0"
                assert self.slots[slot] == (past, hash(tuple(ids[:past]))), (
                    "the slot of another sequence"
                )
            if slot >= 0:
                self.slots[slot] = (len(ids), hash(tuple(ids)))
            self.rows_seen += [(ids, past + 1 + i) for i in range(end - first)]
            parts.append((slot, past, end - first))
        owned_slots = [slot for slot, _, _ in parts if slot >= 0]
        assert len(set(owned_slots)) == len(owned_slots), "two sequences in one slot"
        assert len(self.rows_seen) == step.tokens
        self.steps.append(parts)

    @property
    def num_parts(self) -> int:
        """Parts of a prefill pass."""
        return self.config.num_layers * self.parts_per_layer

    def _invalidate(self) -> None:
        self.invalidations += 1

    def prefill(
        self, steps: Sequence[StepInputs], state: ModelState, first_row: int, admits: bool
    ) -> Iterator[int]:
        seen: list[tuple[list[int], int]] = []
        for step in steps:
            self.forward(step, state)
            seen += self.rows_seen
        self.prefill_rows[first_row] = seen
        for part in range(1, self.num_parts + 1):
            self.before_part(first_row, part - 1)
            yield part // self.parts_per_layer

    def head(
        self,
        out: Logits,
        rows: npt.NDArray[np.int32] | None = None,
        first_prefill_row: int | None = None,
    ) -> None:
        seen_rows = self.rows_seen
        if first_prefill_row is not None:
            seen_rows = self.prefill_rows[first_prefill_row]
        for i, row in enumerate(range(len(out)) if rows is None else rows):
            ids, seen = seen_rows[row]
            out[i] = self.rule(ids[:seen])


class Gate:
    """Blocks the model before each step until a test releases it."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[list[tuple[int, int]]] = queue.SimpleQueue()
        self._go = threading.Semaphore(0)
        self._open = False

    def __call__(self, step: StepInputs) -> None:
        counts = np.diff(step.query_start_loc).tolist()
        self._wait(list(zip(step.context_lens.tolist(), counts, strict=True)))

    def _wait(self, arrived: list[tuple[int, int]]) -> None:
        self._arrived.put(arrived)
        if not self._open:
            assert self._go.acquire(timeout=PATIENCE_S), "the step was not released"

    def arrival(self) -> list[tuple[int, int]]:
        """(past, tokens) of every sequence of the step that waits at the gate."""
        return self._arrived.get(timeout=PATIENCE_S)

    def pass_steps(self, steps: int = 1) -> None:
        """Wait for `steps` steps, and release each."""
        for _ in range(steps):
            self.arrival()
            self.release()

    def release(self) -> None:
        """Release the step that waits."""
        self._go.release()

    def open(self) -> None:
        """Block no further step."""
        self._open = True
        self._go.release()


class PartGate(Gate):
    """Blocks a prefill pass before each part; `arrival` is [(first row, part)]."""

    def part(self, first_row: int, part: int) -> None:
        self._wait([(first_row, part)])


class NoExperts:
    """An expert runner without experts."""

    recorder = None
    cache = SimpleNamespace(layout=SimpleNamespace(nbytes=0))

    def counters(self) -> ExpertCounters:
        return ExpertCounters(0, 0, 0, 0)


# -- text ------------------------------------------------------------------------------------------


class ByteDecoder:
    """Ids below 256 are bytes of UTF-8; the others have no text."""

    def __init__(self) -> None:
        self._inner = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._inner.decode(bytes([token])) if token < 256 else ""

    def flush(self) -> str:
        return self._inner.decode(b"", final=True)


class ByteTokenizer:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decoder(self) -> ByteDecoder:
        return ByteDecoder()

    def special_id(self, text: str) -> int | None:
        return SPECIAL if text == "<special>" else None


# -- engines ---------------------------------------------------------------------------------------


class EngineHarness:
    """An engine over a HistoryModel, with its model and its KV cache manager."""

    def __init__(
        self,
        rule: Rule = scrambled,
        *,
        context: int = 64,
        chunk: int = 8,
        page: int = 4,
        pages: int | None = None,
        sequences: int = 3,
        gate: Gate | None = None,
        parts: PartGate | None = None,
        pass_tokens: int | None = None,
        lookahead: int = 0,
        **options: Any,
    ) -> None:
        table = -(-context // page)
        pages = table * sequences if pages is None else pages
        self.model = HistoryModel(rule, pages + 1, page, sequences, chunk)
        self.model.pass_tokens = pass_tokens or chunk
        if gate is not None:
            self.model.before = gate
        if parts is not None:
            self.model.before_part = parts.part
        self.kv_cache = KVCacheManager(pages, page, sequences)
        state = ModelState(page, pages + 1, sequences, ())
        model, store = cast(Any, self.model), cast(Any, NoExperts())
        runner = ModelRunner(ReferenceOps(), model, store, state, sequences, table, lookahead)
        options.setdefault("tokenizer", ByteTokenizer())
        self.engine = Engine(runner, self.kv_cache, name="fake", context=context, **options)

    def submit(self, prompt: list[int], params: SamplingParams = GREEDY) -> "Response":
        response = Response()
        response.request = self.engine.submit(prompt, params, response.on_event)
        return response

    def close(self) -> None:
        """Close the engine; every page and slot must be free."""
        self.engine.close()
        assert self.kv_cache.free_pages == self.kv_cache.num_pages, "pages were lost"
        assert self.kv_cache.free_slots == self.kv_cache.num_slots, "slots were lost"


class Response:
    """The events of one request."""

    def __init__(self) -> None:
        self.request: Any = None
        self.tokens: list[Token] = []
        self._finish: Finish | None = None
        self._done = threading.Event()
        self._tokens_changed = threading.Condition()

    def on_event(self, event: Event) -> None:
        assert self._finish is None, f"{event} after the end of the request"
        if isinstance(event, Token):
            with self._tokens_changed:
                self.tokens.append(event)
                self._tokens_changed.notify_all()
        else:
            self._finish = event
            self._done.set()

    def wait(self) -> Finish:
        """Wait for the end of the request."""
        assert self._done.wait(PATIENCE_S), "the request was lost"
        assert self._finish is not None
        return self._finish

    def wait_for_tokens(self, count: int) -> None:
        with self._tokens_changed:
            assert self._tokens_changed.wait_for(lambda: len(self.tokens) >= count, PATIENCE_S)

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + self.wait().text
