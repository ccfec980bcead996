"""Prompts as long as those of coding agents, on the demo with --context 32k."""

import asyncio

import pytest

from tests.long.server import run_server, stream_chat
from tests.long.test_load import assert_complete

LINE = "The capital of France is Paris, a large city on the river Seine with many people in it. "


@pytest.mark.parametrize(("lines", "tokens"), [(310, 6_000), (1_080, 20_000)])
def test_an_agents_first_prompt_gets_a_response(lines: int, tokens: int) -> None:
    with run_server("--context", "32k") as server:
        assert "4096" in server.log(), "a warning names the trained context"
        answer = asyncio.run(
            stream_chat(server.port, LINE * lines + "\nWhat is this about?", max_tokens=40)
        )
        assert_complete(answer)
        assert answer.usage["prompt_tokens"] >= tokens
        assert answer.text.strip()
        print(f"{answer.usage['prompt_tokens']} tokens: first text after {answer.first_s:.1f} s")
        server.wait_until_idle()
        server.assert_healthy()


def test_a_conversation_longer_than_the_context_is_refused_with_its_length() -> None:
    with run_server("--context", "8k") as server:
        body = {"messages": [{"role": "user", "content": LINE * 1_000}]}
        status, answer = server.post("/v1/chat/completions", body)
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
        server.assert_healthy()
