"""Random cases without a server: bodies of requests, responses, templates, ids, stop texts.

`python -m tests.long.fuzz KIND SEED FIRST COUNT` prints the outcome as JSON.  A case is made from
its seed, kind and number alone, so that one case can be run again.
"""

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from osmium.engine.engine import Engine
from osmium.engine.request import Finish, FinishReason, check_prompt
from osmium.engine.stops import StopMatcher
from osmium.errors import RequestError
from osmium.ops.controls import mask_words
from osmium.ops.sampling import allowed_tokens
from osmium.server.anthropic import count_prompt, prepare_message
from osmium.server.completion import prepare_completion
from osmium.server.openai import error_body
from osmium.server.prepare import Prepared, prepare_chat
from osmium.server.responses import prepare_response
from osmium.server.responses_store import ResponseStore
from osmium.server.tokens import detokenize_body, tokenize_body
from osmium.text.chat import ChatTemplate
from osmium.text.tokenizer import Tokenizer
from tests.long.mutations import (
    CHAT,
    CHAT_PROMPT,
    COMPLETION,
    MESSAGE,
    RESPONSE,
    SCHEMA,
    TOKENIZE,
    damaged,
    mutated,
    varied,
)
from tests.server.scripted import END, TOKENIZER, ScriptedEngine, ScriptedRequest
from tests.text import test_control_tokens as control
from tests.text.responses import (
    HERMES,
    PIECES,
    XML,
    check_response,
    parse,
    random_calls,
    splits,
    write_hermes,
    write_xml,
)
from tests.text.templates import SOURCES, TOKENS
from tests.text.test_detokenizer import byte_fallback

CASES = {
    "schemas": 6_000, "chats": 150_000, "completions": 120_000, "responses_bodies": 80_000,
    "messages": 80_000, "tokens": 30_000, "damaged": 150_000, "responses": 200_000, "calls": 10_000,
    "templates": 50_000, "ids": 120_000, "stops": 80_000,
}  # fmt: skip
"""Cases of each kind; more than 10^6 in all."""

MOST_CPU_S = 3.0
"""Processor time of one case; more means that some input takes unreasonable time."""

MAX_FAILURES = 5

CONTEXT = 2000

Prepare = Callable[[Engine, str, bytearray], Any]


# -- bodies ----------------------------------------------------------------------------------------


@cache
def engine() -> Engine:
    """An engine that prepares requests and runs none."""
    made = ScriptedEngine(template=SOURCES["demo"](), context=CONTEXT)
    made.config = SimpleNamespace(vocab_size=TOKENIZER.vocab_size, eos_token_ids=(END,))
    return cast(Engine, made)


@cache
def bodies() -> dict[str, tuple[Prepare, dict[str, Any]]]:
    """What prepares the body of each endpoint, and a valid body."""
    store = ResponseStore()
    return {
        "chats": (prepare_chat, CHAT),
        "completions": (prepare_completion, COMPLETION),
        "responses_bodies": (partial(prepare_response, store), RESPONSE),
        "messages": (partial(prepare_message, request_id="req_1"), MESSAGE),
        "count_tokens": (count_prompt, MESSAGE),
        "tokenize": (tokenize_body, TOKENIZE),
        "tokenize_chat": (tokenize_body, {**CHAT_PROMPT, "return_token_strs": True}),
        "detokenize": (detokenize_body, {"model": "demo", "tokens": [1, 2, 3]}),
    }


def body_case(names: tuple[str, ...], damage: bool, rng: random.Random) -> str:
    """A mutated body: it is refused as a client's fault, or can be run and answered."""
    prepare, body = bodies()[rng.choice(names)]
    base = dict(body)
    for name in ("n", "best_of", "echo", "prompt_logprobs", "prompt", "max_tokens"):
        if name in base and rng.random() < 0.1:
            base[name] = rng.choice((0, 1, 2, 3, True, ["a", "b c"], [[1, 2], [3]], "<think>"))
    if rng.random() < 0.3:
        base["stream"] = not base.get("stream")
    change = varied if rng.random() < 0.5 else mutated
    raw = json.dumps(change(rng, base)).encode()
    if damage:
        raw = damaged(rng, raw)
    try:
        made = prepare(engine(), "served", bytearray(raw))
    except RequestError as error:
        assert 400 <= error.status < 500
        json.dumps(error_body(error), allow_nan=False)
        return "refused"
    if isinstance(made, Prepared):
        try:
            for run in made.runs:
                check_prompt(run.ids, run.params, TOKENIZER.vocab_size, CONTEXT)
        except RequestError:  # as the engine does
            return "refused"
        answer(made, rng)
    return "accepted"


def schema_case(rng: random.Random) -> str:
    """A schema with wrong values, of a tool or of the response: refused, or masks can be made."""
    schema = mutated(rng, SCHEMA)
    body: dict[str, Any] = {"messages": CHAT["messages"], "max_tokens": rng.randint(1, 40)}
    form = rng.choice(("schema", "guided", "tool", "tool", "tools"))
    if form == "schema":
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    elif form == "guided":
        body["guided_json"] = schema
    else:
        function = {"name": "f", "parameters": schema, "strict": rng.random() < 0.5}
        body["tools"] = [{"type": "function", "function": function}]
        if form == "tools":
            body["tools"].append({"type": "function", "function": {"name": "g"}})
        named = {"type": "function", "function": {"name": "f"}}
        body["tool_choice"] = rng.choice(("required", "auto", named))
    try:
        made = prepare_chat(engine(), "served", bytearray(json.dumps(body).encode()))
        masks = [run.token_mask() for run in made.runs if run.token_mask is not None]
    except RequestError as error:
        assert 400 <= error.status < 500
        json.dumps(error_body(error), allow_nan=False)
        return "refused"
    words = np.zeros(mask_words(TOKENIZER.vocab_size), np.int32)
    for mask in masks:
        for _ in range(rng.randrange(8)):
            mask.fill(words)
            allowed = np.flatnonzero(allowed_tokens(words, TOKENIZER.vocab_size))
            assert len(allowed), "some token is always allowed"
            token = int(allowed[rng.randrange(len(allowed))])
            if token == END:
                break
            mask.push(token)
        mask.completion()
    return "accepted"


def answer(made: Prepared, rng: random.Random) -> None:
    """Write a response of random tokens, as a stream and whole."""
    handles = [ScriptedRequest(run.ids, run.params) for run in made.runs]
    written = [*made.writer.first()]
    if made.shows_progress:
        written += made.writer.progress(1, 2, 0.1)
    make_token = cast(ScriptedEngine, engine()).token
    for index, (handle, run) in enumerate(zip(handles, made.runs, strict=True)):
        if handle.prompt_logprobs is not None:
            handle.prompt_logprobs.add(0, ScriptedEngine.logits_of(run.ids))
        stops = StopMatcher(TOKENIZER.decoder(), (), run.params.stop_after)
        count = 0 if run.params.max_tokens == 0 else rng.randrange(6)
        for _ in range(count):
            token = rng.randrange(TOKENIZER.vocab_size)
            start, text = stops.length, stops.push(token)
            event = make_token(token, text, run.params, start, stops.length)
            written += made.writer.push(index, event, handles)
        end = Finish(rng.choice([*FinishReason][:2]), stops.flush(), len(run.ids), count)
        written += made.writer.push(index, end, handles)
    assert made.writer.finished and made.writer.error is None
    written += made.writer.last(handles)
    assert all(isinstance(one["data"], str) for one in written)
    json.dumps(made.writer.body(handles), allow_nan=False)


# -- texts -----------------------------------------------------------------------------------------


def call_case(rng: random.Random) -> str:
    """Calls come back as they were written."""
    calls = random_calls(rng)
    for form, write in ((XML, write_xml), (HERMES, write_hermes)):
        text = write(calls)
        for pieces in (text, *splits(text, rng, 1)):
            result = parse(pieces, form=form)
            assert result.calls == calls and not result.content, f"{text!r}"
    return "calls"


@cache
def template(name: str) -> tuple[ChatTemplate, list[str]]:
    """A template, and the control tokens of a harmless conversation."""
    made = ChatTemplate(SOURCES[name](), TOKENS)
    ids = control.TOKENIZER.encode(made.render(*control.conversation("x")))
    return made, control.control_of(ids)


def template_case(rng: random.Random) -> str:
    """A text in every place of a conversation adds no control token, and stays as it is."""
    made, honest = template(rng.choice([*SOURCES]))
    parts = rng.choices((*control.PARTS, *control.CONTROL, *PIECES), k=rng.randint(1, 5))
    said = "x" + "".join(parts)
    text = made.render(*control.conversation(said))
    ids = control.TOKENIZER.encode(text)
    assert control.control_of(ids) == honest, f"{said!r}"
    assert control.TOKENIZER.decode(ids, specials=True) == text, f"{said!r}"
    return "rendered"


@cache
def tokenizers() -> tuple[Tokenizer, ...]:
    return TOKENIZER, byte_fallback(), control.TOKENIZER


def id_case(rng: random.Random) -> str:
    """Ids one by one give the text of the whole; a text's ids give the text."""
    tokenizer, specials = rng.choice((tokenizers()[0], tokenizers()[2])), rng.random() < 0.5
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 40))]
    decoder = tokenizer.decoder(specials)
    text = "".join(map(decoder.push, ids)) + decoder.flush()
    assert text == tokenizer.decode(ids, specials), f"{ids}"
    words = "".join(rng.choices((*PIECES, "the ", " end", "é", "🙂", "\x00"), k=rng.randint(0, 6)))
    for one in tokenizers():
        decoder = one.decoder(specials=True)
        pushed = "".join(map(decoder.push, one.encode(words))) + decoder.flush()
        assert pushed == words or one is tokenizers()[1], f"{words!r}"
    return "decoded"


def stop_case(rng: random.Random) -> str:
    """A response ends before the first stop text, wherever the tokens are cut."""
    letters = rng.choice(("ab", "abc", "aé🙂"))
    text = "".join(rng.choices(letters, k=rng.randint(0, 30)))
    stops = tuple(
        "".join(rng.choices(letters, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))
    )
    matcher, decoder = StopMatcher(TOKENIZER.decoder(), stops), TOKENIZER.decoder()
    got = pushed = ""
    for token in TOKENIZER.encode(text):
        got += matcher.push(token)
        pushed += decoder.push(token)
        starts = [at for stop in stops if (at := pushed.find(stop)) >= 0]
        assert matcher.matched == bool(starts), f"{text!r}, {stops}"
        if starts:
            assert got == pushed[: min(starts)] and not matcher.flush(), f"{text!r}, {stops}"
            return "stopped"
        assert pushed.startswith(got)
    assert got + matcher.flush() == text, f"{text!r}, {stops}"
    return "complete"


KINDS: dict[str, Callable[[random.Random], str]] = {
    "schemas": schema_case,
    "chats": partial(body_case, ("chats",), False),
    "completions": partial(body_case, ("completions",), False),
    "responses_bodies": partial(body_case, ("responses_bodies",), False),
    "messages": partial(body_case, ("messages", "messages", "count_tokens"), False),
    "tokens": partial(body_case, ("tokenize", "tokenize_chat", "detokenize"), False),
    "damaged": partial(
        body_case, ("chats", "completions", "responses_bodies", "messages", "tokenize_chat"), True
    ),
    "responses": check_response,
    "calls": call_case,
    "templates": template_case,
    "ids": id_case,
    "stops": stop_case,
}


def run(kind: str, seed: str, first: int, count: int) -> dict[str, Any]:
    """Run the cases `first` and on; the outcome."""
    start = time.monotonic()
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    slowest = 0.0
    for case in range(first, first + count):
        began = time.process_time()
        try:
            outcomes[KINDS[kind](random.Random(f"{seed} {kind} {case}"))] += 1
        except Exception as error:
            failures.append(f"case {case}: {type(error).__name__}: {error!s:.1500}")
        seconds = time.process_time() - began
        slowest = max(slowest, seconds)
        if seconds > MOST_CPU_S:
            failures.append(f"case {case} takes {seconds:.1f} s")
        if len(failures) >= MAX_FAILURES:
            break
    return {
        "cases": sum(outcomes.values()), "outcomes": outcomes, "failures": failures,
        "slowest_s": round(slowest, 3), "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
