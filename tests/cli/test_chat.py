"""The chat without a terminal: a scripted reader, a display that collects, the demo model."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from osmium.cli.answer import Interrupt, Rendered, render, respond
from osmium.cli.chat import COMMANDS, Chat, banner, talk
from osmium.cli.render import Display
from osmium.engine.engine import Engine
from osmium.engine.request import FinishReason, SamplingParams
from osmium.errors import RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=40)
ASKED = "What is the capital of France?"


class Collected:
    """A display; Ctrl-C is pressed at the first text of a kind, "thought" or "answer"."""

    shows_thinking = True

    def __init__(self, stop_at: str | None = None) -> None:
        self.thoughts, self.answers, self.ended = "", "", 0
        self._stop_at = stop_at

    def reasoning(self, text: str) -> None:
        self.thoughts += text
        self._press("thought", text)

    def answer(self, text: str) -> None:
        self.answers += text
        self._press("answer", text)

    def _press(self, kind: str, text: str) -> None:
        if text and kind == self._stop_at:
            self._stop_at = None
            os.kill(os.getpid(), signal.SIGINT)

    def tick(self) -> None:
        pass

    def end(self) -> None:
        self.ended += 1


class Talk:
    """A chat, what it showed and what it said."""

    def __init__(self, engine: Engine, params: SamplingParams = GREEDY, **more: Any) -> None:
        self.displays: list[Collected] = []
        self.notes: list[str] = []
        self.stops: list[str | None] = []
        """Where Ctrl-C is pressed, of each response."""

        def display() -> Display:
            self.displays.append(Collected(self.stops.pop(0) if self.stops else None))
            return self.displays[-1]

        self.chat = Chat(engine, params, display, self.notes.append, **more)

    def read(self, *lines: str | type[BaseException]) -> None:
        """Run the loop over these lines; an exception is what reading raises."""
        waiting = list(lines)

        def read() -> str:
            if not waiting:
                raise EOFError
            line = waiting.pop(0)
            if isinstance(line, str):
                return line
            raise line

        reader = type("Script", (), {"read": staticmethod(read)})()
        talk(self.chat, reader, self.notes.append)
        self.left = waiting


@pytest.fixture
def talking(demo: Engine) -> Talk:
    return Talk(demo, think=False)


def test_thinking_and_answer_are_kept_apart_in_the_conversation(demo: Engine) -> None:
    talking = Talk(demo, think=True)
    talking.read(ASKED)
    question, answer = talking.chat.messages
    assert question == {"role": "user", "content": ASKED}
    assert answer["content"] == talking.displays[0].answers
    assert answer["reasoning_content"] == talking.displays[0].thoughts
    assert "Paris" in answer["content"] and answer["reasoning_content"]
    assert "think>" not in answer["content"] + answer["reasoning_content"]


def test_a_conversation_goes_on_from_what_was_said(talking: Talk) -> None:
    talking.read(ASKED, "And of Spain?")
    assert [one["role"] for one in talking.chat.messages] == ["user", "assistant"] * 2
    prompt = render(talking.chat.engine, talking.chat.messages, False)
    text = talking.chat.engine.tokenizer.decode(prompt.ids)
    assert ASKED in text and "And of Spain?" in text


def test_an_empty_line_does_nothing(talking: Talk) -> None:
    talking.read("", "   ", "\n")
    assert not talking.displays and not talking.notes


def test_ctrl_c_stops_the_response_and_keeps_the_conversation(talking: Talk) -> None:
    talking.chat.params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    talking.stops = ["answer"]
    handler = signal.getsignal(signal.SIGINT)
    talking.read(ASKED, "/save")
    assert signal.getsignal(signal.SIGINT) is handler
    assert talking.chat.messages[1]["content"] == talking.displays[0].answers
    assert len(talking.displays[0].answers) < 500 and talking.displays[0].ended == 1
    assert "Stopped" in talking.notes[0]
    assert "/save talk.md" in talking.notes[1], "the chat goes on"


def test_ctrl_c_before_an_answer_leaves_the_question_to_regenerate(demo: Engine) -> None:
    talking = Talk(demo, SamplingParams(temperature=0, max_tokens=60), think=True)
    talking.stops = ["thought"]
    talking.read(ASKED, "/regenerate")
    assert "/regenerate" in talking.notes[0]
    assert talking.chat.messages[0]["content"] == ASKED
    assert len(talking.chat.messages) == 2 and "Paris" in talking.displays[1].answers


def test_a_second_ctrl_c_does_not_wait_for_the_response() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupt() as twice:
        os.kill(os.getpid(), signal.SIGINT)
        assert twice.requested
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_at_an_empty_prompt_leaves_at_the_second(talking: Talk) -> None:
    talking.read(KeyboardInterrupt, "", KeyboardInterrupt, KeyboardInterrupt, "never read")
    assert talking.left == ["never read"]
    assert sum("Ctrl-C once more" in note for note in talking.notes) == 2


@pytest.mark.parametrize("line", ["/exit", "/bye", "/quit", " /exit ".strip()])
def test_exit_and_bye_leave(talking: Talk, line: str) -> None:
    talking.read(line, "never read")
    assert talking.left == ["never read"]


def test_an_unknown_command_is_not_sent_and_gets_a_suggestion(talking: Talk) -> None:
    talking.read("/regenrate", "/etc/passwd")
    assert "/regenerate?" in talking.notes[0] and "/help" in talking.notes[1]
    assert not talking.displays


def test_help_lists_every_command(talking: Talk) -> None:
    talking.read("/help")
    assert all(name in talking.notes[0] for name in COMMANDS)


def test_new_forgets_the_conversation_and_keeps_the_system_message(talking: Talk) -> None:
    talking.read("/system Be brief.", ASKED, "/new", "/regenerate", "/system")
    assert not talking.chat.messages and talking.chat.system == "Be brief."
    assert "no message to respond to" in talking.notes[-2] and talking.notes[-1] == "Be brief."


def test_the_system_message_reaches_the_prompt(
    talking: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[dict[str, Any]]] = []

    def watch(engine: Engine, messages: list[dict[str, Any]], think: bool | None) -> Rendered:
        seen.append(messages)
        return render(engine, messages, think)

    monkeypatch.setattr("osmium.cli.chat.render", watch)
    talking.read("/system Be brief.", ASKED)
    assert seen[0][0] == {"role": "system", "content": "Be brief."}


def test_regenerate_replaces_the_last_response_and_changes_the_seed(demo: Engine) -> None:
    params = SamplingParams(temperature=1.5, seed=1, max_tokens=12, ignore_eos=True)
    talking = Talk(demo, params, think=False)
    talking.read("Tell me about the Congress", "/regenerate", "/regenerate")
    said = [one.answers for one in talking.displays]
    assert len(set(said)) == 3
    assert [one["content"] for one in talking.chat.messages[1:]] == [said[2]]


def test_a_full_context_offers_new_and_the_chat_goes_on(demo: Engine) -> None:
    talking = Talk(demo, think=False)
    long = "word " * (demo.context + 10)
    talking.read(long, ASKED)
    assert "/new" in talking.notes[0] and f"{demo.context:,}" in talking.notes[0]
    assert len(talking.chat.messages) == 2 and "Paris" in talking.displays[-1].answers


def test_a_response_that_fills_the_context_says_so(demo: Engine) -> None:
    params = SamplingParams(temperature=0, ignore_eos=True)
    talking = Talk(demo, params, think=False)
    text = "word"
    while len(render(demo, [{"role": "user", "content": text}], False).ids) < demo.context - 8:
        text += " word"
    talking.read(text)
    assert "context" in talking.notes[-1] and "/new" in talking.notes[-1]
    assert talking.chat.messages[1]["content"] == talking.displays[0].answers


def test_max_tokens_is_told_from_a_full_context(demo: Engine) -> None:
    talking = Talk(demo, SamplingParams(temperature=0, max_tokens=2), think=False)
    talking.read("Tell me about the Congress")
    assert "--max-tokens 2" in talking.notes[-1] and "context" not in talking.notes[-1]


def test_save_writes_what_was_said_and_overwrites_only_its_own_file(
    talking: Talk, tmp_path: Path
) -> None:
    text, data, other = tmp_path / "a b.md", tmp_path / "talk.json", tmp_path / "other.md"
    other.write_text("mine")
    talking.read(
        "/system Be brief.", ASKED, f"/save '{text}'", f"/save {data}", f"/save {data}",
        f"/save {other}", f"/save {tmp_path}/no/such/folder.md",
    )  # fmt: skip
    assert ASKED in text.read_text() and "Paris" in text.read_text()
    messages = json.loads(data.read_text())
    assert [one["role"] for one in messages] == ["system", "user", "assistant"]
    assert other.read_text() == "mine"
    assert "exists" in talking.notes[-2] and "cannot be written" in talking.notes[-1]


def test_the_banner_names_model_device_context_and_expected_speed(demo: Engine) -> None:
    assert banner(demo).startswith("demo on cpu, context 256 tokens")
    plan = type("Plan", (), {"expected_tokens_per_s": 41.6})()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "plan", plan)
        assert "about 42 tok/s" in banner(demo)


def test_a_raw_response_is_the_models_own_text(demo: Engine) -> None:
    ids = demo.tokenizer.encode("<think>\nhm\n</think>\n\n")
    display = Collected()
    response = respond(demo, Rendered(ids, thinking=False, raw=True), GREEDY, display)
    plain = "".join(token.text for token in demo.generate(ids, GREEDY))
    assert response.answer == display.answers == plain and not display.thoughts


def test_a_prompt_reports_tokens_done_of_all(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[tuple[str, int, int]] = []

    class Recorded:
        def __enter__(self) -> Callable[[str, int, int], None]:
            return lambda *report: reports.append(report)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("osmium.cli.answer.progress_bar", Recorded)
    monkeypatch.setattr("osmium.cli.answer.POLL_S", 0.001)
    forward = demo.runner.forward

    def slow(batch: Any) -> None:
        time.sleep(0.02)  # so that each chunk is seen on a busy machine too
        forward(batch)

    monkeypatch.setattr(demo.runner, "forward", slow)
    ids = [7] * 200
    short = SamplingParams(temperature=0, max_tokens=1)
    respond(demo, Rendered(ids, thinking=False, raw=True), short, Collected())
    done = [done for stage, done, total in reports if stage == "prompt" and total == 200]
    assert done == sorted(done) and any(0 < one < 200 for one in done)


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_shown(demo: Engine) -> None:
    display = Collected()
    with pytest.raises(RequestError):
        respond(demo, Rendered([7] * demo.context, False), GREEDY, display)
    assert display.ended == 0


def test_a_finish_by_cancelling_says_so(demo: Engine) -> None:
    with Interrupt() as stop:
        stop.requested = True
        ids = demo.tokenizer.encode("The Congress shall")
        response = respond(
            demo, Rendered(ids, False, raw=True), SamplingParams(ignore_eos=True), Collected(), stop
        )
    assert response.finish.reason is FinishReason.CANCELLED
