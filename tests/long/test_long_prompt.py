"""Prompts as long as those of coding agents, on the demo with --context 32k."""

import asyncio

import pytest

from tests.long.server import serving, stream_chat
from tests.long.test_load import whole

LINE = "The capital of France is Paris, a large city on the river Seine with many people in it. "


@pytest.mark.parametrize(("lines", "tokens"), [(310, 6_000), (1_080, 20_000)])
def test_a_first_prompt_of_an_agent_is_answered(lines: int, tokens: int) -> None:
    with serving("--context", "32k") as server:
        assert "4096" in server.log(), "a warning says for how many tokens it was trained"
        answer = asyncio.run(
            stream_chat(server.port, LINE * lines + "\nWhat is this about?", max_tokens=40)
        )
        whole(answer)
        assert answer.usage["prompt_tokens"] >= tokens
        assert answer.text.strip()
        print(f"{answer.usage['prompt_tokens']} tokens: first text after {answer.first_s:.1f} s")
        server.settled()
        server.healthy()


def test_a_conversation_that_outgrows_the_context_is_refused_by_its_length() -> None:
    with serving("--context", "8k") as server:
        body = {"messages": [{"role": "user", "content": LINE * 1_000}]}
        status, answer = server.post("/v1/chat/completions", body)
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
        server.healthy()
