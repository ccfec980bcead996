"""The chat without a terminal: scripted input, a recording display, the demo model."""

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
from tests.server.scripted import ScriptedEngine

GREEDY = SamplingParams(temperature=0, max_tokens=40)
GREEDY_LONG = SamplingParams(temperature=0)
QUESTION = "What is the capital of France?"


class RecordingDisplay:
    """A display that records text, and sends Ctrl-C at the first "thought" or "answer"."""

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


class ScriptedChat:
    """A chat, with its displays and notes."""

    def __init__(self, engine: Engine, params: SamplingParams = GREEDY, **more: Any) -> None:
        self.displays: list[RecordingDisplay] = []
        self.notes: list[str] = []
        self.stops: list[str | None] = []
        """For each response, the kind of text at which Ctrl-C is sent."""

        def display() -> Display:
            self.displays.append(RecordingDisplay(self.stops.pop(0) if self.stops else None))
            return self.displays[-1]

        self.chat = Chat(engine, params, display, self.notes.append, **more)

    def read(self, *lines: str | type[BaseException]) -> None:
        """Run the loop over these lines; an exception type is raised instead of a line."""
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
        self.unread = waiting


@pytest.fixture
def session(demo: Engine) -> ScriptedChat:
    return ScriptedChat(demo, think=False)


def test_reasoning_and_answer_are_separate_in_the_conversation(demo: Engine) -> None:
    session = ScriptedChat(demo, think=True)
    session.read(QUESTION)
    question, answer = session.chat.messages
    assert question == {"role": "user", "content": QUESTION}
    assert answer["content"] == session.displays[0].answers
    assert answer["reasoning_content"] == session.displays[0].thoughts
    assert "Paris" in answer["content"] and answer["reasoning_content"]
    assert "think>" not in answer["content"] + answer["reasoning_content"]


def test_a_later_prompt_includes_the_earlier_messages(session: ScriptedChat) -> None:
    session.read(QUESTION, "And of Spain?")
    assert [one["role"] for one in session.chat.messages] == ["user", "assistant"] * 2
    prompt = render(session.chat.engine, session.chat.messages, False)
    text = session.chat.engine.tokenizer.decode(prompt.ids)
    assert QUESTION in text and "And of Spain?" in text


def test_an_empty_line_does_nothing(session: ScriptedChat) -> None:
    session.read("", "   ", "\n")
    assert not session.displays and not session.notes


def test_ctrl_c_stops_the_response_and_keeps_the_conversation(session: ScriptedChat) -> None:
    session.chat.params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    session.stops = ["answer"]
    handler = signal.getsignal(signal.SIGINT)
    session.read(QUESTION, "/save")
    assert signal.getsignal(signal.SIGINT) is handler
    assert session.chat.messages[1]["content"] == session.displays[0].answers
    assert len(session.displays[0].answers) < 500 and session.displays[0].ended == 1
    assert "Stopped" in session.notes[0]
    assert "/save talk.md" in session.notes[1], "the chat continues"


def test_after_ctrl_c_before_an_answer_regenerate_repeats_the_question(demo: Engine) -> None:
    session = ScriptedChat(demo, SamplingParams(temperature=0, max_tokens=60), think=True)
    session.stops = ["thought"]
    session.read(QUESTION, "/regenerate")
    assert "/regenerate" in session.notes[0]
    assert session.chat.messages[0]["content"] == QUESTION
    assert len(session.chat.messages) == 2 and "Paris" in session.displays[1].answers


def test_a_second_ctrl_c_does_not_wait_for_the_response() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupt() as twice:
        os.kill(os.getpid(), signal.SIGINT)
        assert twice.requested
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_at_an_empty_prompt_ends_the_chat(session: ScriptedChat) -> None:
    session.read(KeyboardInterrupt, "", KeyboardInterrupt, KeyboardInterrupt, "never read")
    assert session.unread == ["never read"]
    assert sum("Ctrl-C once more" in note for note in session.notes) == 2


@pytest.mark.parametrize("line", ["/exit", "/bye", "/quit", " /exit ".strip()])
def test_exit_commands_end_the_chat(session: ScriptedChat, line: str) -> None:
    session.read(line, "never read")
    assert session.unread == ["never read"]


def test_an_unknown_command_is_not_sent_and_gets_a_suggestion(session: ScriptedChat) -> None:
    session.read("/regenrate", "/etc/passwd")
    assert "/regenerate?" in session.notes[0] and "/help" in session.notes[1]
    assert not session.displays


def test_help_lists_every_command(session: ScriptedChat) -> None:
    session.read("/help")
    assert all(name in session.notes[0] for name in COMMANDS)


def test_new_clears_the_conversation_and_keeps_the_system_message(session: ScriptedChat) -> None:
    session.read("/system Be brief.", QUESTION, "/new", "/regenerate", "/system")
    assert not session.chat.messages and session.chat.system == "Be brief."
    assert "no message to respond to" in session.notes[-2] and session.notes[-1] == "Be brief."


def test_the_system_message_reaches_the_prompt(
    session: ScriptedChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[list[dict[str, Any]]] = []

    def recording_render(
        engine: Engine, messages: list[dict[str, Any]], think: bool | None
    ) -> Rendered:
        rendered.append(messages)
        return render(engine, messages, think)

    monkeypatch.setattr("osmium.cli.chat.render", recording_render)
    session.read("/system Be brief.", QUESTION)
    assert rendered[0][0] == {"role": "system", "content": "Be brief."}


def test_regenerate_replaces_the_last_response_and_changes_the_seed(demo: Engine) -> None:
    params = SamplingParams(temperature=1.5, seed=1, max_tokens=12, ignore_eos=True)
    session = ScriptedChat(demo, params, think=False)
    session.read("Tell me about the Congress", "/regenerate", "/regenerate")
    responses = [one.answers for one in session.displays]
    assert len(set(responses)) == 3
    assert [one["content"] for one in session.chat.messages[1:]] == [responses[2]]


def test_a_full_context_suggests_new_and_the_chat_continues(demo: Engine) -> None:
    session = ScriptedChat(demo, think=False)
    long = "word " * (demo.context + 10)
    session.read(long, QUESTION)
    assert "/new" in session.notes[0] and f"{demo.context:,}" in session.notes[0]
    assert len(session.chat.messages) == 2 and "Paris" in session.displays[-1].answers


def test_a_response_that_fills_the_context_is_reported(demo: Engine) -> None:
    params = SamplingParams(temperature=0, ignore_eos=True)
    session = ScriptedChat(demo, params, think=False)
    text = "word"
    while len(render(demo, [{"role": "user", "content": text}], False).ids) < demo.context - 8:
        text += " word"
    session.read(text)
    assert "context" in session.notes[-1] and "/new" in session.notes[-1]
    assert session.chat.messages[1]["content"] == session.displays[0].answers


def test_reaching_max_tokens_is_not_reported_as_a_full_context(demo: Engine) -> None:
    session = ScriptedChat(demo, SamplingParams(temperature=0, max_tokens=2), think=False)
    session.read("Tell me about the Congress")
    assert "--max-tokens 2" in session.notes[-1] and "context" not in session.notes[-1]


def test_save_writes_the_conversation_and_overwrites_only_its_own_file(
    session: ScriptedChat, tmp_path: Path
) -> None:
    text, data, other = tmp_path / "a b.md", tmp_path / "talk.json", tmp_path / "other.md"
    other.write_text("mine")
    session.read(
        "/system Be brief.", QUESTION, f"/save '{text}'", f"/save {data}", f"/save {data}",
        f"/save {other}", f"/save {tmp_path}/no/such/folder.md",
    )  # fmt: skip
    assert QUESTION in text.read_text() and "Paris" in text.read_text()
    messages = json.loads(data.read_text())
    assert [one["role"] for one in messages] == ["system", "user", "assistant"]
    assert other.read_text() == "mine"
    assert "exists" in session.notes[-2] and "cannot be written" in session.notes[-1]


def test_the_banner_names_model_device_context_and_expected_speed(demo: Engine) -> None:
    assert banner(demo).startswith("demo on cpu, context 256 tokens")
    plan = type("Plan", (), {"expected_tokens_per_s": 41.6})()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "plan", plan)
        assert "about 42 tok/s" in banner(demo)


def test_a_raw_response_is_the_models_unchanged_text(demo: Engine) -> None:
    ids = demo.tokenizer.encode("<think>\nhm\n</think>\n\n")
    display = RecordingDisplay()
    response = respond(demo, Rendered(ids, thinking=False, raw=True), GREEDY, display)
    plain = "".join(token.text for token in demo.generate(ids, GREEDY))
    assert response.answer == display.answers == plain and not display.thoughts


CALL = "<tool_call>\n<function={}>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "thinking", "thoughts", "answers"),
    [
        ("hm\n</think>\n\nParis.", True, "hm", "Paris."),
        ("<think>\nhm\n</think>\n\nParis.", False, "hm", "Paris."),
        ("Look:\n" + CALL.format("weather"), False, "",
         'Look:\n```\nweather({"city": "Rome"})\n```\n'),
        (CALL.format("weather") + "\n" + CALL.format("time"), False, "",
         '\n```\nweather({"city": "Rome"})\n```\n\n```\ntime({"city": "Rome"})\n```\n'),
        ("a `<tool_call>` tag, or <tool_call> here", False, "",
         "a `<tool_call>` tag, or <tool_call> here"),
    ],
)  # fmt: skip
def test_reasoning_answer_and_tool_calls_are_displayed_apart(
    text: str, thinking: bool, thoughts: str, answers: str
) -> None:
    """No tool is offered and nothing runs a call, so it is shown as code."""
    engine: Any = ScriptedEngine(text, template="{{ '<function=example>' }}")
    display = RecordingDisplay()
    response = respond(engine, Rendered([1], thinking), GREEDY_LONG, display)
    assert (response.reasoning, response.answer) == (thoughts, answers)
    assert (display.thoughts, display.answers) == (thoughts, answers)


def test_prompt_progress_reports_done_and_total_tokens(
    demo: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[tuple[str, int, int]] = []

    class RecordingBar:
        def __enter__(self) -> Callable[[str, int, int], None]:
            return lambda *report: reports.append(report)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("osmium.cli.answer.progress_bar", RecordingBar)
    monkeypatch.setattr("osmium.cli.answer.POLL_S", 0.001)
    forward = demo.runner.forward

    def slow(batch: Any) -> None:
        time.sleep(0.02)  # so that each chunk is reported on a busy machine too
        forward(batch)

    monkeypatch.setattr(demo.runner, "forward", slow)
    ids = [7] * 200
    short = SamplingParams(temperature=0, max_tokens=1)
    respond(demo, Rendered(ids, thinking=False, raw=True), short, RecordingDisplay())
    done = [done for stage, done, total in reports if stage == "prompt" and total == 200]
    assert done == sorted(done) and any(0 < one < 200 for one in done)


def test_a_prompt_that_does_not_fit_is_refused_before_any_output(demo: Engine) -> None:
    display = RecordingDisplay()
    with pytest.raises(RequestError):
        respond(demo, Rendered([7] * demo.context, False), GREEDY, display)
    assert display.ended == 0


def test_an_interrupted_response_finishes_as_cancelled(demo: Engine) -> None:
    with Interrupt() as stop:
        stop.requested = True
        ids = demo.tokenizer.encode("The Congress shall")
        response = respond(
            demo,
            Rendered(ids, False, raw=True),
            SamplingParams(ignore_eos=True),
            RecordingDisplay(),
            stop,
        )
    assert response.finish.reason is FinishReason.CANCELLED
