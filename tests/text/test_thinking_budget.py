"""Budgets of the thinking as a token mask, alone and over a grammar."""

import json
from collections.abc import Iterator

import numpy as np
import pytest

import osmium
from osmium.engine.engine import Engine
from osmium.engine.min_tokens import EndMask, drop_spent_mask, has_spent_mask
from osmium.engine.request import Request, SamplingParams, TokenMask
from osmium.text.grammar import GrammarCompiler
from osmium.text.thinking_budget import ThinkingBudget
from osmium.text.tokenizer import Tokenizer
from tests.text.byte_level import byte_level, byte_level_json

END = "</think>"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = osmium.load(device="cpu")
    yield made
    made.close()


def allowed(mask: TokenMask, vocab: int) -> list[int]:
    words = np.full(-(-vocab // 32), 77, np.int32)
    mask.fill(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:vocab]
    return [int(token) for token in np.flatnonzero(bits)]


def text_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, specials=False)


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_after_the_budget_only_the_end_of_the_thinking_is_allowed(
    engine: Engine, budget: int
) -> None:
    vocab, tokenizer = engine.config.vocab_size, engine.tokenizer
    mask = ThinkingBudget(budget, tokenizer, True)
    for token in text_tokens(tokenizer, "a b c")[:budget]:
        assert len(allowed(mask, vocab)) == vocab
        mask.push(token)
    assert allowed(mask, vocab) == [tokenizer.id_of(END)] and not mask.spent
    mask.push(tokenizer.id_of(END))
    assert mask.spent and len(allowed(mask, vocab)) == vocab


def test_an_end_in_ordinary_tokens_is_forced_token_by_token() -> None:
    described = json.loads(byte_level_json())
    described["added_tokens"] = [one for one in described["added_tokens"] if one["special"]]
    tokenizer = Tokenizer(json.dumps(described).encode())
    assert tokenizer.id_of(END) is None
    mask, text = ThinkingBudget(2, tokenizer, True), ""
    for token in text_tokens(tokenizer, "xy"):
        mask.push(token)
    while not mask.spent:
        (token,) = allowed(mask, tokenizer.vocab_size)
        text += tokenizer.decode([token])
        mask.push(token)
    assert text == END


@pytest.mark.parametrize("as_text", [False, True])
def test_thinking_that_ends_by_itself_spends_the_budget(engine: Engine, as_text: bool) -> None:
    tokenizer = engine.tokenizer
    mask = ThinkingBudget(30, tokenizer, True)
    for token in text_tokens(tokenizer, END) if as_text else [tokenizer.id_of(END)]:
        assert not mask.spent
        mask.push(token)
    assert mask.spent


def test_a_model_that_begins_its_thinking_itself_has_the_budget_too(engine: Engine) -> None:
    tokenizer, vocab = engine.tokenizer, engine.config.vocab_size
    mask = ThinkingBudget(1, tokenizer, False)
    for token in (*text_tokens(tokenizer, "\n"), tokenizer.id_of("<think>")):
        mask.push(token)
    assert not mask.spent and len(allowed(mask, vocab)) == vocab
    mask.push(text_tokens(tokenizer, "a")[0])
    assert allowed(mask, vocab) == [tokenizer.id_of(END)]
    mask = ThinkingBudget(1, tokenizer, False)
    mask.push(text_tokens(tokenizer, "a")[0])
    assert mask.spent, "an answer without thinking needs no mask"


def test_a_grammar_begins_after_a_forced_end(engine: Engine) -> None:
    tokenizer, vocab = engine.tokenizer, engine.config.vocab_size
    compiler = GrammarCompiler(tokenizer, vocab, engine.config.eos_token_ids)
    inner = compiler.compile("choice", ["yes"], "rule").mask(40, thinking=True)
    mask = ThinkingBudget(1, tokenizer, True, inner)
    assert engine.config.eos_token_ids[0] not in allowed(mask, vocab), "the grammar's rule"
    mask.push(text_tokens(tokenizer, "a")[0])
    mask.push(tokenizer.id_of(END))
    texts = {tokenizer.decode([token]).strip("\n") for token in allowed(mask, vocab)}
    assert texts <= {"", "y", "ye", "yes"} and not mask.completion() == ()


def test_spent_masks_are_dropped_from_the_outside_in() -> None:
    tokenizer = byte_level()
    budget = ThinkingBudget(0, tokenizer, True)
    outer = EndMask({1}, 1, budget)
    request = Request([0], SamplingParams(), lambda event: None, None, 0, token_mask=outer)
    for token in text_tokens(tokenizer, END):
        outer.push(token)
    assert has_spent_mask(request)
    drop_spent_mask(request)
    assert request.token_mask is None
    request.token_mask = EndMask({1}, 9, budget)
    drop_spent_mask(request)
    assert isinstance(request.token_mask, EndMask)
