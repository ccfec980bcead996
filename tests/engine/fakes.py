"""A model that costs nothing and forgives nothing, a byte tokenizer, and engines made of them.

`HistoryModel` keeps every id it is given in the very pages and slots that the engine names, and
makes its logits of what it reads back: a wrong page, slot, position or length gives other logits,
or an assertion.
"""

import codecs
import queue
import threading
from collections.abc import Callable
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
"""From a sequence's ids so far to the logits of the next one."""

EOS, OTHER_EOS = 256, 258
VOCAB = 260
"""256 bytes and a few ids that are no text."""

CONFIG = replace(
    ModelConfig.from_hf(hf_config(CASES[0])), vocab_size=VOCAB, eos_token_ids=(EOS, OTHER_EOS)
)

GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)

PATIENCE_S = 30.0
"""A test that waits longer than this has found a request that was lost."""


# -- rules: what the model says --------------------------------------------------------------------


def scrambled(history: list[int]) -> Logits:
    """Logits that look random and depend on every id of the history and on their order."""
    code = 0
    for one in history:
        code = (code * 6364136223846793005 + one + 1442695040888963407) % 2**64
    return np.random.default_rng(code).normal(0, 3, VOCAB).astype(np.float32)


def uniform(history: list[int]) -> Logits:
    return np.zeros(VOCAB, np.float32)


def always(*ids: int, prompt: int = 1) -> Rule:
    """Say these ids one after another, over and over, after a prompt of so many tokens."""

    def rule(history: list[int]) -> Logits:
        logits = np.zeros(VOCAB, np.float32)
        logits[ids[(len(history) - prompt) % len(ids)]] = 50
        return logits

    return rule


def follow(rule: Rule, prompt: list[int], count: int) -> list[int]:
    """The greedy reply, without any engine."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(rule(ids).argmax()))
    return ids[len(prompt) :]


# -- the model -------------------------------------------------------------------------------------


class HistoryModel:
    """Remembers ids in pages, and a checksum of the sequence in slots, as a real model would."""

    def __init__(self, rule: Rule, pages: int, page: int, slots: int, rows: int) -> None:
        self.config, self.rows, self.rule = CONFIG, rows, rule
        self.pages = np.full((pages, page), -1, np.int64)
        self.slots: list[tuple[int, int]] = [(-1, -1)] * slots
        """(tokens, checksum) of the sequence that used a slot last."""
        self.said: list[tuple[list[int], int]] = []
        """For every row of the last step, its sequence's ids and how many of them it has seen."""
        self.before: Callable[[StepInputs], None] = lambda step: None
        self.steps: list[list[tuple[int, int, int]]] = []
        """(slot, past, tokens) of every sequence of every step."""

    def forward(self, step: StepInputs, state: ModelState) -> None:
        self.before(step)
        self.said, parts = [], []
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
                self.pages[table[position // step.page], position % step.page] = step.ids[row]
            at = np.arange(past + end - first)
            ids = self.pages[table[at // step.page], at % step.page].tolist()
            if past:
                assert self.slots[slot] == (past, hash(tuple(ids[:past]))), "another's slot"
            self.slots[slot] = (len(ids), hash(tuple(ids)))
            self.said += [(ids, past + 1 + i) for i in range(end - first)]
            parts.append((slot, past, end - first))
        held = [slot for slot, _, _ in parts if slot < len(self.slots) - 1]  # the last is nobody's
        assert len(set(held)) == len(held), "two sequences in one slot"
        assert len(self.said) == step.tokens
        self.steps.append(parts)

    def head(self, out: Logits, rows: npt.NDArray[np.int32] | None = None) -> None:
        for i, row in enumerate(range(len(out)) if rows is None else rows):
            ids, seen = self.said[row]
            out[i] = self.rule(ids[:seen])


class Gate:
    """Holds the model before each step until it is let through: a test sees where it stands."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[list[tuple[int, int]]] = queue.SimpleQueue()
        self._go = threading.Semaphore(0)
        self._open = False

    def __call__(self, step: StepInputs) -> None:
        counts = np.diff(step.query_start_loc).tolist()
        self._arrived.put(list(zip(step.context_lens.tolist(), counts, strict=True)))
        if not self._open:
            assert self._go.acquire(timeout=PATIENCE_S), "nobody let the step through"

    def arrival(self) -> list[tuple[int, int]]:
        """(past, tokens) of every sequence of the step that has come to the gate."""
        return self._arrived.get(timeout=PATIENCE_S)

    def let(self, steps: int = 1) -> None:
        """Let so many steps through, seeing each arrive."""
        for _ in range(steps):
            self.arrival()
            self.release()

    def release(self) -> None:
        """Let the step that has arrived through."""
        self._go.release()

    def open(self) -> None:
        """Hold nobody from now on."""
        self._open = True
        self._go.release()


class _Store:
    """No experts."""

    recorder = None
    cache = SimpleNamespace(record=SimpleNamespace(nbytes=0))

    def counters(self) -> ExpertCounters:
        return ExpertCounters(0, 0, 0, 0)


# -- text ------------------------------------------------------------------------------------------


class ByteDecoder:
    """An id below 256 is a byte of UTF-8; the others are no text."""

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


# -- engines ---------------------------------------------------------------------------------------


class Bench:
    """An engine over a HistoryModel, and what a test wants to look at."""

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
        ahead: int = 0,
        **options: Any,
    ) -> None:
        table = -(-context // page)
        pages = table * sequences if pages is None else pages
        self.model = HistoryModel(rule, pages + 1, page, sequences + 1, chunk)
        if gate is not None:
            self.model.before = gate
        self.kv_cache = KVCacheManager(pages, page, sequences)
        state = ModelState(page, pages + 1, sequences + 1, ())
        model, store = cast(Any, self.model), cast(Any, _Store())
        runner = ModelRunner(ReferenceOps(), model, store, state, sequences, table, ahead)
        options.setdefault("tokenizer", ByteTokenizer())
        self.engine = Engine(runner, self.kv_cache, name="fake", context=context, **options)

    def ask(self, prompt: list[int], params: SamplingParams = GREEDY) -> "Reply":
        reply = Reply()
        reply.request = self.engine.submit(prompt, params, reply.take)
        return reply

    def close(self) -> None:
        """End the engine; nothing may be left taken."""
        self.engine.close()
        assert self.kv_cache.free_pages == self.kv_cache.num_pages, "pages were lost"
        assert self.kv_cache.free_slots == self.kv_cache.num_slots, "slots were lost"


class Reply:
    """What came back of one request."""

    def __init__(self) -> None:
        self.request: Any = None
        self.tokens: list[Token] = []
        self._finish: Finish | None = None
        self._done = threading.Event()
        self._some = threading.Condition()

    def take(self, event: Event) -> None:
        assert self._finish is None, f"{event} after the end"
        if isinstance(event, Token):
            with self._some:
                self.tokens.append(event)
                self._some.notify_all()
        else:
            self._finish = event
            self._done.set()

    def wait(self) -> Finish:
        """The end, which must come."""
        assert self._done.wait(PATIENCE_S), "the request was lost"
        assert self._finish is not None
        return self._finish

    def wait_for_tokens(self, count: int) -> None:
        with self._some:
            assert self._some.wait_for(lambda: len(self.tokens) >= count, PATIENCE_S)

    @property
    def is_over(self) -> bool:
        return self._done.is_set()

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + self.wait().text
