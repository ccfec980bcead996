"""Load: 64 streaming clients at once against the demo, some of which are killed midway."""

import asyncio
import random
from typing import Any

from tests.long.server import Answer, Server, stream_chat

CLIENTS = 64

QUESTIONS = (
    "What is the capital of France?", "Hello!", "Who are you?", "What is 2 + 2?",
    "Why is the sky blue?", "What is the largest planet?", "Name a colour.", "Tell me a joke.",
)  # fmt: skip


def whole(answer: Answer) -> None:
    """A stream as it should be, from its first byte to its last."""
    assert answer.status == 200
    assert answer.done, "the stream ends with [DONE]"
    assert len(answer.reasons) == 1 and answer.reasons[0] in ("stop", "length")
    assert len({one["id"] for one in answer.chunks}) == 1
    assert answer.usage["completion_tokens"] > 0


async def everyone(port: int, plans: list[dict[str, Any]]) -> list[Answer]:
    """All of them at once."""
    return await asyncio.gather(*(stream_chat(port, **plan) for plan in plans))


def alone(server: Server) -> dict[str, str]:
    """What each question is answered when nobody else asks."""
    return {
        text: asyncio.run(stream_chat(server.port, text, max_tokens=40)).text for text in QUESTIONS
    }


def test_every_client_gets_its_own_whole_stream(demo: Server) -> None:
    wanted = alone(demo)
    texts = [QUESTIONS[i % len(QUESTIONS)] for i in range(CLIENTS)]
    plans = [{"text": text, "max_tokens": 40} for text in texts]
    answers = asyncio.run(everyone(demo.port, plans))
    for answer in answers:
        whole(answer)
    # Sums in another order may turn a near-tie: almost all of them must be the same.
    same = sum(a.text == wanted[text] for a, text in zip(answers, texts, strict=True))
    assert same >= CLIENTS - 4, f"{same} of {CLIENTS} were answered as when alone"
    assert len({answer.chunks[0]["id"] for answer in answers}) == CLIENTS
    demo.settled()
    demo.healthy()


def test_clients_that_are_killed_midway_disturb_nobody(demo: Server, seed: int) -> None:
    rng, wanted = random.Random(seed), alone(demo)
    plans: list[dict[str, Any]] = []
    for i in range(CLIENTS):
        plan: dict[str, Any] = {"text": QUESTIONS[i % len(QUESTIONS)], "max_tokens": 40}
        if i % 2:
            plan |= {"leave_after": rng.randint(0, 8), "reset": rng.random() < 0.5,
                     "max_tokens": 1000, "ignore_eos": True}  # fmt: skip
        plans.append(plan)
    answers = asyncio.run(everyone(demo.port, plans))
    stayed = [(plan, answer) for plan, answer in zip(plans, answers, strict=True)
              if "leave_after" not in plan]  # fmt: skip
    for _, answer in stayed:
        whole(answer)
    same = sum(answer.text == wanted[plan["text"]] for plan, answer in stayed)
    assert same >= len(stayed) - 4, f"{same} of {len(stayed)}"
    demo.settled()
    demo.healthy()


def test_clients_that_do_not_read_hold_up_nobody(demo: Server) -> None:
    async def scene() -> list[Answer]:
        """Three of the four that run at once ask for long answers and read nothing."""
        body = b'{"messages":[{"role":"user","content":"Hello"}],"stream":true,"ignore_eos":true}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        silent = []
        for _ in range(3):
            _, writer = await asyncio.open_connection("127.0.0.1", demo.port, limit=1)
            writer.write(head % len(body) + body)
            await writer.drain()
            silent.append(writer)
        await asyncio.sleep(0.5)
        answers = await everyone(demo.port, [{"text": t, "max_tokens": 20} for t in QUESTIONS])
        for writer in silent:
            writer.transport.abort()
        return answers

    for answer in asyncio.run(scene()):
        whole(answer)
    demo.settled()
    demo.healthy()


def test_waves_of_clients_leave_nothing_behind(demo: Server) -> None:
    held: list[tuple[int, int, int]] = []
    for wave in range(6):
        plans = [{"text": f"{QUESTIONS[i % 8]} {wave}", "max_tokens": 8} for i in range(CLIENTS)]
        for answer in asyncio.run(everyone(demo.port, plans)):
            whole(answer)
        demo.settled()
        status = demo.status
        held.append((status.num_fds(), status.num_threads(), status.memory_info().rss))
    files, threads, memory = zip(*held[1:], strict=True)
    assert max(files) <= min(files) + 4, files
    assert max(threads) <= min(threads) + 4, threads
    assert max(memory) - memory[0] < 32 << 20, memory
    demo.healthy()
