"""Completions: several prompts, echo, fill in the middle, best_of, log-probabilities of prompts."""

import itertools
import threading
from typing import Any

import pytest
import tokenizers

from osmium.engine.sampler import log_softmax
from osmium.errors import EngineStopped
from osmium.server.completion import FIM_ENDS
from osmium.server.limits import MAX_RUNNING_CHOICES
from osmium.text.tokenizer import Tokenizer
from tests.server.scripted import (
    PATIENCE_S,
    TOKENIZER,
    ScriptedEngine,
    ScriptedRequest,
    chunks,
    client_of,
)
from tests.text.byte_level import byte_level_json

PLAIN = "/v1/completions"


def post(client: Any, prompt: Any = "Hello", status: int = 200, **fields: Any) -> Any:
    response = client.post(PLAIN, json={"prompt": prompt, **fields})
    assert response.status_code == status, response.text
    return response.json() if status == 200 else response.json()["error"]


def stream(client: Any, prompt: Any = "Hello", **fields: Any) -> list[dict[str, Any]]:
    response = client.post(PLAIN, json={"prompt": prompt, "stream": True, **fields})
    assert response.status_code == 200, response.text
    return chunks(response.text)


def joined(found: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """A choice of a stream as a whole one."""
    own = [one["choices"][0] for one in found if one["choices"]]
    own = [choice for choice in own if choice["index"] == index]
    parts = [choice["logprobs"] for choice in own if choice["logprobs"]]
    logprobs = (
        {key: [one for part in parts for one in part[key]] for key in parts[0]} if parts else None
    )
    return {
        "index": index,
        "text": "".join(choice["text"] for choice in own),
        "logprobs": logprobs,
        "finish_reason": own[-1]["finish_reason"],
    }


# -- several prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "prompt",
    [["one", "two two", "three"], [TOKENIZER.encode(one) for one in ("one", "two two", "three")],
     ["one", TOKENIZER.encode("two two"), "three"]],
)  # fmt: skip
def test_choices_of_several_prompts_are_numbered_by_prompt(prompt: Any, n: int) -> None:
    engine = ScriptedEngine("the end")
    with client_of(engine) as client:
        body = post(client, prompt, n=n, seed=5, echo=True)
    texts = [text for text in ("one", "two two", "three") for _ in range(n)]
    assert [one["index"] for one in body["choices"]] == list(range(3 * n))
    assert [one["text"] for one in body["choices"]] == [text + "the end" for text in texts]
    assert sorted(one.prompt for one in engine.requests) == sorted(texts)
    seeds = [one.params.seed for one in engine.requests]
    assert seeds == [*range(5, 5 + n)] * 3, "a prompt has the seeds that it has alone"
    tokens = [len(TOKENIZER.encode(text)) for text in texts]
    assert body["usage"]["prompt_tokens"] == sum(tokens[::n])
    assert body["usage"]["completion_tokens"] == 3 * n * (len(engine.token_ids) + 1)
    assert body["timings"]["prompt_n"] == sum(tokens[::n])


@pytest.mark.parametrize("prompt", [["one"], [TOKENIZER.encode("one")]])
def test_a_list_of_one_prompt_is_that_prompt(prompt: Any) -> None:
    with client_of() as client:
        one, alone = post(client, prompt), post(client, "one")
        assert post(client, prompt * 40 + ["x" * 999], status=400)["param"] == "prompt[40]"
        assert post(client, ["x" * 999], status=400)["param"] == "prompt"
    assert one["choices"] == alone["choices"] and one["usage"] == alone["usage"]


def test_a_stream_of_several_prompts_has_interleaved_choices() -> None:
    engine = ScriptedEngine("the end the end the end", pace_s=0.01)
    with client_of(engine) as client:
        found = stream(client, ["a", "b", "c"], n=2, stream_options={"include_usage": True})
    order = [one["choices"][0]["index"] for one in found[:-1]]
    assert {*order} == {*range(6)} and order != sorted(order)
    for index in range(6):
        assert joined(found, index)["text"] == "the end the end the end"
        assert joined(found, index)["finish_reason"] == "stop"
    assert found[-1]["usage"]["prompt_tokens"] == 3
    assert len({one["id"] for one in found}) == 1


@pytest.mark.parametrize("is_stream", [False, True])
def test_at_most_eight_choices_of_a_request_are_in_the_engine(is_stream: bool) -> None:
    engine = ScriptedEngine("the", pace_s=0.02)
    running: list[int] = []
    submit = engine.submit

    def counting(*args: Any, **more: Any) -> ScriptedRequest:
        running.append(sum(one.finish is None for one in engine.requests))
        return submit(*args, **more)

    engine.submit = counting  # type: ignore[method-assign]
    with client_of(engine) as client:
        if is_stream:
            found = stream(client, [str(i) for i in range(30)])
            texts = [joined(found, i)["text"] for i in range(30)]
        else:
            texts = [one["text"] for one in post(client, [str(i) for i in range(30)])["choices"]]
    assert texts == ["the"] * 30
    assert [one.prompt for one in engine.requests] == [str(i) for i in range(30)]
    assert max(running) == MAX_RUNNING_CHOICES - 1


def test_another_request_comes_between_the_prompts_of_one() -> None:
    engine = ScriptedEngine("the", pace_s=0.02)
    with client_of(engine) as client:
        thread = threading.Thread(target=post, args=(client, ["many"] * 40))
        thread.start()
        engine.wait_for_request()
        post(client, "one")
        thread.join()
    assert [one.prompt for one in engine.requests].index("one") < 30


@pytest.mark.parametrize(
    ("bad", "code"),
    [("x" * 300, "context_length_exceeded"), ([5] * 300, "context_length_exceeded"),
     ([5, 10**6], "invalid_token"), ([-1], "invalid_token"), ("", "empty_prompt"),
     ([], "empty_prompt")],
)  # fmt: skip
def test_one_invalid_prompt_refuses_all_before_any_is_run(bad: Any, code: str) -> None:
    engine = ScriptedEngine()
    with client_of(engine) as client:
        for fields in ({}, {"stream": True}, {"n": 2, "best_of": 2}):
            error = post(client, ["fine", [1, 2], bad, "fine"], status=400, **fields)
            assert (error["param"], error["code"]) == ("prompt[2]", code)
            assert error["message"].startswith("prompt[2]: ")
    assert not engine.requests


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_failed_prompt_ends_the_response_and_submits_no_further_one(is_stream: bool) -> None:
    engine = ScriptedEngine("the end", fails_after=2)
    with client_of(engine) as client:
        body = {"prompt": ["a"] * 30, "stream": is_stream}
        response = client.post(PLAIN, json=body)
    assert "The engine has stopped" in response.text
    assert response.status_code == (200 if is_stream else 503)
    assert len(engine.requests) <= MAX_RUNNING_CHOICES
    assert all(one.cancelled.is_set() for one in engine.requests)


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_engine_that_stops_between_two_prompts_ends_the_response(is_stream: bool) -> None:
    engine = ScriptedEngine("the end")
    submit = engine.submit

    def stopping(*args: Any, **more: Any) -> ScriptedRequest:
        if len(engine.requests) == 10:
            raise EngineStopped("The engine has stopped.")
        return submit(*args, **more)

    engine.submit = stopping  # type: ignore[method-assign]
    with client_of(engine) as client:
        response = client.post(PLAIN, json={"prompt": ["a"] * 30, "stream": is_stream})
    assert "The engine has stopped" in response.text and "[DONE]" not in response.text
    assert response.status_code == (200 if is_stream else 503)
    assert all(one.done.wait(PATIENCE_S) for one in engine.requests)


# -- echo ------------------------------------------------------------------------------------------


def expected_scores(prompt: str) -> list[float]:
    """Log-probabilities of a prompt's tokens but the first."""
    ids = TOKENIZER.encode(prompt)
    return [
        float(log_softmax(ScriptedEngine.logits_after(before))[token])
        for before, token in itertools.pairwise(ids)
    ]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("prompt", ["in the é", TOKENIZER.encode("in the é")])
def test_echo_with_logprobs_has_those_of_the_prompt(prompt: Any, is_stream: bool) -> None:
    engine = ScriptedEngine("the end")
    with client_of(engine) as client:
        fields = {"echo": True, "logprobs": 2}
        if is_stream:
            choice = joined(stream(client, prompt, **fields), 0)
        else:
            (choice,) = post(client, prompt, **fields)["choices"]
    assert choice["text"] == "in the éthe end"
    found = choice["logprobs"]
    ids = TOKENIZER.encode("in the é")
    text = "".join(found["tokens"]).replace("\ufffd\ufffd", "é")
    assert text == choice["text"] + "<|im_end|>", "the end token counts, too"
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    scores = found["token_logprobs"][1 : len(ids)]
    assert scores == pytest.approx(expected_scores("in the é"), abs=1e-5)
    generated = len(engine.token_ids) + 1
    assert found["token_logprobs"][len(ids) :] == [-0.5] * generated
    for at, (token, score) in enumerate(zip(found["tokens"], scores, strict=False), 1):
        top = found["top_logprobs"][at]
        assert 1 <= len(top) <= 3 and top[found["tokens"][at]] >= score, token
        assert max(top.values()) == pytest.approx(
            float(log_softmax(ScriptedEngine.logits_after(0)).max()), abs=1e-5
        )
    offsets = found["text_offset"]
    assert offsets[0] == 0 and offsets == sorted(offsets)
    assert offsets[len(ids)] == len("in the é")
    assert {len(values) for values in found.values()} == {len(ids) + generated}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 1])
def test_a_prompt_can_be_echoed_without_a_generated_token(
    logprobs: int | None, is_stream: bool
) -> None:
    engine = ScriptedEngine("the end")
    fields: dict[str, Any] = {"echo": True, "max_tokens": 0, "logprobs": logprobs}
    with client_of(engine) as client:
        if is_stream:
            found = stream(client, "the one", stream_options={"include_usage": True}, **fields)
            choice, usage = joined(found, 0), found[-1]["usage"]
        else:
            body = post(client, "the one", **fields)
            (choice,), usage = body["choices"], body["usage"]
    assert (choice["text"], choice["finish_reason"]) == ("the one", "length")
    tokens = len(TOKENIZER.encode("the one"))
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (tokens, 0)
    if logprobs is None:
        assert choice["logprobs"] is None
    else:
        found = choice["logprobs"]
        assert [len(values) for values in found.values()] == [tokens] * 4
        assert found["token_logprobs"][1:] == pytest.approx(expected_scores("the one"), abs=1e-5)
        assert [len(one) for one in found["top_logprobs"][1:]] != [], "the token itself is there"


def test_logprobs_without_echo_are_those_of_the_response_alone() -> None:
    engine = ScriptedEngine("the end")
    with client_of(engine) as client:
        (choice,) = post(client, "one", logprobs=1)["choices"]
        (echoed,) = post(client, "one", echo=True)["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-0.5] * len(engine.token_ids)
    assert choice["logprobs"]["text_offset"][0] == 0
    assert (echoed["text"], echoed["logprobs"]) == ("onethe end", None)
    assert [one.params.prompt_logprobs for one in engine.requests] == [None, None]


def test_a_whole_context_can_be_scored_but_not_continued() -> None:
    engine = ScriptedEngine(context=20)
    with client_of(engine) as client:
        fields = {"echo": True, "logprobs": 1}
        (choice,) = post(client, "x" * 20, max_tokens=0, **fields)["choices"]
        assert len(choice["logprobs"]["tokens"]) == 20
        for prompt in ("x" * 20, [5] * 20):
            post(client, prompt, status=400, max_tokens=1, **fields)
        for prompt in ("x" * 21, [5] * 21):
            post(client, prompt, status=400, max_tokens=0, **fields)


def test_log_probabilities_of_too_many_prompt_tokens_are_refused() -> None:
    engine = ScriptedEngine(context=30_000)
    with client_of(engine) as client:
        error = post(client, [5] * 25_000, status=400, echo=True, logprobs=20)
        assert error["code"] == "too_many_items"
        chat = {"messages": [{"role": "user", "content": "x" * 29_000}], "prompt_logprobs": 20}
        assert client.post("/v1/chat/completions", json=chat).status_code == 400
        post(client, [5] * 20_000, echo=True, logprobs=20, max_tokens=0)
    assert len(engine.requests) == 1


def test_text_of_token_ids_is_echoed_with_special_tokens() -> None:
    ids = TOKENIZER.encode("<|im_start|>user\nHi<|im_end|>")
    with client_of(ScriptedEngine("!")) as client:
        (choice,) = post(client, ids, echo=True)["choices"]
    assert choice["text"] == "<|im_start|>user\nHi<|im_end|>!"


def test_a_model_without_a_tokenizer_scores_token_ids() -> None:
    with client_of(ScriptedEngine(tokenizer=None)) as client:
        (choice,) = post(client, [1, 2, 3], echo=True, logprobs=0, max_tokens=0)["choices"]
        assert post(client, "text", status=400)["param"] == "prompt"
        assert post(client, [1, 2], status=400, suffix="x")["param"] == "suffix"
    assert len(choice["logprobs"]["token_logprobs"]) == 3


# -- lm-eval ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("says", ["x", ""])
def test_lm_evals_requests_give_the_log_likelihood_of_a_continuation(says: str) -> None:
    """Lists of ids, and one generated token, also an end token: lm-eval leaves out its entry."""
    context, continuation = TOKENIZER.encode("in the"), TOKENIZER.encode(" end")
    ids = context + continuation
    fields = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    with client_of(ScriptedEngine(says)) as client:
        body = post(client, [ids, ids], **fields)
    for choice in body["choices"]:
        scores = choice["logprobs"]["token_logprobs"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        wanted = expected_scores("in the end")[len(context) - 1 :]
        assert scores == pytest.approx(wanted, abs=1e-5)
        assert [score == max(top.values()) for score, top in zip(scores, tops, strict=True)] == [
            token == before + 1
            for before, token in zip(ids[len(context) - 1 :], continuation, strict=False)
        ]


# -- fill in the middle ----------------------------------------------------------------------------


def fim_tokenizer() -> Tokenizer:
    inner = tokenizers.Tokenizer.from_str(byte_level_json().decode())
    inner.add_tokens(
        [tokenizers.AddedToken(one, special=False, normalized=False) for one in FIM_ENDS]
    )
    return Tokenizer(inner.to_str().encode())


@pytest.mark.parametrize(
    "prompt", ["def f(", TOKENIZER.encode("def f("), ["def f("], ["def f(", "g("]]
)
def test_a_suffix_makes_a_fill_in_the_middle_prompt(prompt: Any) -> None:
    tokenizer = fim_tokenizer()
    engine = ScriptedEngine("x", tokenizer=tokenizer)
    engine.config.vocab_size = tokenizer.vocab_size
    with client_of(engine) as client:
        body = post(client, prompt, suffix="): pass", stop_token_ids=[3])
    first = tokenizer.decode(engine.requests[0].ids, specials=True)
    assert first == "<|fim_prefix|>def f(<|fim_suffix|>): pass<|fim_middle|>"
    assert body["choices"][0]["text"] == "x"
    ends = engine.requests[0].params.stop_token_ids
    assert ends == (3, *(tokenizer.id_of(one) for one in FIM_ENDS))


def test_a_suffix_is_refused_without_the_tokens_for_it() -> None:
    engine = ScriptedEngine()
    with client_of(engine) as client:
        error = post(client, "a", status=400, suffix="b")
        assert error["param"] == "suffix" and "<|fim_prefix|>" in error["message"]
        for suffix in (None, ""):
            post(client, "a", suffix=suffix)
    assert [one.prompt for one in engine.requests] == ["a", "a"]


def test_prompt_and_suffix_must_fit_the_context_together() -> None:
    tokenizer = fim_tokenizer()
    engine = ScriptedEngine("x", tokenizer=tokenizer, context=50)
    engine.config.vocab_size = tokenizer.vocab_size
    with client_of(engine) as client:
        post(client, "a" * 20, suffix="b" * 20)
        error = post(client, ["a", "a" * 25], status=400, suffix="b" * 25)
    assert (error["param"], error["code"]) == ("prompt[1]", "context_length_exceeded")


# -- best_of ---------------------------------------------------------------------------------------


class EngineBySeed(ScriptedEngine):
    """The text of a choice is its seed, three times; each seed has its log-probability."""

    def _answer(self, request: ScriptedRequest, on_event: Any) -> None:
        seed = request.params.seed
        assert seed is not None
        one = ScriptedEngine(str(seed) * 3)
        one.logprob = [-3.0, -1.0, -2.0, -4.0][seed - 1]
        one._answer(request, on_event)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_best_of_returns_the_likeliest_choices_per_token(logprobs: int | None) -> None:
    engine = EngineBySeed()
    with client_of(engine) as client:
        body = post(client, ["p", "q"], n=2, best_of=4, seed=1, logprobs=logprobs)
        all_of_them = post(client, "p", n=4, best_of=4, seed=1)
    assert [one["text"] for one in body["choices"]] == ["222", "333"] * 2
    assert [one["index"] for one in body["choices"]] == [0, 1, 2, 3]
    assert [one["logprobs"] is None for one in body["choices"]] == [logprobs is None] * 4
    assert body["usage"]["completion_tokens"] == 2 * 4 * 4, "all that are generated count"
    assert [one["text"] for one in all_of_them["choices"]] == ["111", "222", "333", "444"]
    assert engine.requests[-1].params.logprobs is None


# -- prompt_logprobs -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [PLAIN, "/v1/chat/completions"])
def test_prompt_logprobs_have_vllms_form(path: str) -> None:
    engine = ScriptedEngine("the end")
    prompt = (
        {"prompt": "in the"} if path == PLAIN else {"messages": [{"role": "user", "content": "Hi"}]}
    )
    with client_of(engine) as client:
        body = client.post(path, json={**prompt, "prompt_logprobs": 2, "n": 2}).json()
        plain = client.post(path, json={**prompt, "prompt_logprobs": False}).json()
        refused = client.post(path, json={**prompt, "prompt_logprobs": 21})
    found = body["choices"][1]["prompt_logprobs"] if path == PLAIN else body["prompt_logprobs"]
    ids = engine.requests[0].ids
    assert len(found) == len(ids) and found[0] is None
    for (before, token), entry in zip(itertools.pairwise(ids), found[1:], strict=True):
        scores = log_softmax(ScriptedEngine.logits_after(before))
        own = entry[str(token)]
        assert own["logprob"] == pytest.approx(float(scores[token]), abs=1e-5)
        assert own["rank"] == 1 + int((scores > scores[token]).sum())
        assert own["decoded_token"] == TOKENIZER.token_bytes(token).decode(errors="replace")
        ranks = {one["rank"] for one in entry.values()}
        assert ranks == {1, 2, own["rank"]}
    assert "prompt_logprobs" not in str(plain)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt_logprobs"


def test_prompts_can_be_scored_without_echo_or_generated_tokens() -> None:
    with client_of() as client:
        body = post(client, ["in", "the end"], prompt_logprobs=0, max_tokens=0)
        both = post(client, "the end", prompt_logprobs=1, echo=True, logprobs=3, max_tokens=0)
    assert [one["text"] for one in body["choices"]] == ["", ""]
    assert [len(entry) for entry in body["choices"][1]["prompt_logprobs"][1:]] == [1] * (
        len(TOKENIZER.encode("the end")) - 1
    )
    (choice,) = both["choices"]
    assert all(len(one) <= 2 for one in choice["prompt_logprobs"][1:])
    assert all(3 <= len(one) <= 4 for one in choice["logprobs"]["top_logprobs"][1:])
