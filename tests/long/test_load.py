"""Load: 64 concurrent streaming clients against the demo, some of which disconnect."""

import asyncio
import random
from typing import Any

from tests.long.server import Answer, Server, stream_chat

CLIENTS = 64

QUESTIONS = (
    "What is the capital of France?", "Hello!", "What are you?", "What is 2 + 2?",
    "Why is the sky blue?", "What is the largest planet?", "Name a colour.", "Tell me a joke.",
)  # fmt: skip


def assert_complete(answer: Answer) -> None:
    """Assert that a stream is complete and consistent."""
    assert answer.status == 200
    assert answer.done, "the stream ends with [DONE]"
    assert len(answer.reasons) == 1 and answer.reasons[0] in ("stop", "length")
    assert len({one["id"] for one in answer.chunks}) == 1
    assert answer.usage["completion_tokens"] > 0


async def stream_all(port: int, plans: list[dict[str, Any]]) -> list[Answer]:
    """Run all clients concurrently."""
    return await asyncio.gather(*(stream_chat(port, **plan) for plan in plans))


def unloaded_responses(server: Server) -> dict[str, str]:
    """The response to each question without load."""
    return {
        text: asyncio.run(stream_chat(server.port, text, max_tokens=40)).text for text in QUESTIONS
    }


def test_every_client_gets_its_own_complete_stream(demo: Server) -> None:
    wanted = unloaded_responses(demo)
    texts = [QUESTIONS[i % len(QUESTIONS)] for i in range(CLIENTS)]
    plans = [{"text": text, "max_tokens": 40} for text in texts]
    answers = asyncio.run(stream_all(demo.port, plans))
    for answer in answers:
        assert_complete(answer)
    # Another summation order may change a near-tie, so almost all must be equal.
    equal = sum(a.text == wanted[text] for a, text in zip(answers, texts, strict=True))
    assert equal >= CLIENTS - 4, f"{equal} of {CLIENTS} equal the responses without load"
    assert len({answer.chunks[0]["id"] for answer in answers}) == CLIENTS
    demo.wait_until_idle()
    demo.assert_healthy()


def test_disconnecting_clients_do_not_affect_the_others(demo: Server, seed: int) -> None:
    rng, wanted = random.Random(seed), unloaded_responses(demo)
    plans: list[dict[str, Any]] = []
    for i in range(CLIENTS):
        plan: dict[str, Any] = {"text": QUESTIONS[i % len(QUESTIONS)], "max_tokens": 40}
        if i % 2:
            plan |= {"disconnect_after": rng.randint(0, 8), "reset": rng.random() < 0.5,
                     "max_tokens": 1000, "ignore_eos": True}  # fmt: skip
        plans.append(plan)
    answers = asyncio.run(stream_all(demo.port, plans))
    complete = [(plan, answer) for plan, answer in zip(plans, answers, strict=True)
              if "disconnect_after" not in plan]  # fmt: skip
    for _, answer in complete:
        assert_complete(answer)
    equal = sum(answer.text == wanted[plan["text"]] for plan, answer in complete)
    assert equal >= len(complete) - 4, f"{equal} of {len(complete)}"
    demo.wait_until_idle()
    demo.assert_healthy()


def test_clients_that_do_not_read_do_not_block_others(demo: Server) -> None:
    async def run_clients() -> list[Answer]:
        """Three of four running requests generate long responses that their clients do not read."""
        body = b'{"messages":[{"role":"user","content":"Hello"}],"stream":true,"ignore_eos":true}'
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        )
        unread_writers = []
        for _ in range(3):
            _, writer = await asyncio.open_connection("127.0.0.1", demo.port, limit=1)
            writer.write(head % len(body) + body)
            await writer.drain()
            unread_writers.append(writer)
        await asyncio.sleep(0.5)
        answers = await stream_all(demo.port, [{"text": t, "max_tokens": 20} for t in QUESTIONS])
        for writer in unread_writers:
            writer.transport.abort()
        return answers

    for answer in asyncio.run(run_clients()):
        assert_complete(answer)
    demo.wait_until_idle()
    demo.assert_healthy()


def test_repeated_load_leaks_no_files_threads_or_memory(demo: Server) -> None:
    usage: list[tuple[int, int, int]] = []
    for wave in range(6):
        plans = [{"text": f"{QUESTIONS[i % 8]} {wave}", "max_tokens": 8} for i in range(CLIENTS)]
        for answer in asyncio.run(stream_all(demo.port, plans)):
            assert_complete(answer)
        demo.wait_until_idle()
        status = demo.status
        usage.append((status.num_fds(), status.num_threads(), status.memory_info().rss))
    files, threads, memory = zip(*usage[1:], strict=True)
    assert max(files) <= min(files) + 4, files
    assert max(threads) <= min(threads) + 4, threads
    assert max(memory) - memory[0] < 32 << 20, memory
    demo.assert_healthy()
