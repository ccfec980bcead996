"""A conversation on the terminal: messages, the chat's own commands, and the loop around them.

A Reader supplies lines (editor.py), a Display prints responses (render.py).
"""

import difflib
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from osmium.cli.answer import Interrupt, Rendered, Response, render, respond
from osmium.cli.render import Display
from osmium.cli.timing import ResponseTimes
from osmium.engine.engine import Engine
from osmium.engine.request import FinishReason, SamplingParams
from osmium.errors import OsmiumError, RequestError

__all__ = ["COMMANDS", "Chat", "Reader", "banner", "talk"]

COMMANDS = {
    "/help": "list these commands",
    "/new": "start another conversation (the system message stays)",
    "/system": "TEXT  set the system message; without TEXT, show it",
    "/regenerate": "generate the last response again",
    "/save": "FILE  write the conversation; as JSON if FILE ends in .json",
    "/exit": "leave; so do /bye and Ctrl-D",
    "/bye": "leave",
}

_KEYS = """\
Enter sends, Alt-Enter starts a new line; pasted lines are one message.
Ctrl-C stops a response and keeps its text so far."""


class Reader(Protocol):
    """Source of lines."""

    def read(self) -> str:
        """The next message or command.

        Raises: EOFError at the end, KeyboardInterrupt at Ctrl-C on an empty line.
        """


def banner(engine: Engine) -> str:
    """Model, device, context, and the speed that the plan expects."""
    facts = [f"{engine.name} on {engine.device}", f"context {engine.context:,} tokens"]
    speed = getattr(engine.plan, "expected_tokens_per_s", None)
    if isinstance(speed, int | float) and speed > 0:
        facts.append(f"about {speed:.0f} tok/s expected")
    return ", ".join(facts) + "\n/help lists commands; Ctrl-C stops a response, Ctrl-D leaves."


class Chat:
    """One user's conversation with one engine."""

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        display: Callable[[], Display],
        say: Callable[[str], None],
        *,
        system: str | None = None,
        think: bool | None = None,
        timing: ResponseTimes | None = None,
    ) -> None:
        """`display` creates a display for each response; `say` prints a note on stderr."""
        self.engine, self.params, self.think = engine, params, think
        self._display, self._say, self._timing = display, say, timing
        self.system = system
        self.messages: list[dict[str, Any]] = []
        """User's and assistant's messages; `reasoning_content` is the reasoning."""
        self._question: str | None = None
        """The user's last message, also if its response was stopped before it started."""
        self._regenerated = 0
        """Number of /regenerate so far, added to the seed."""
        self._saved: Path | None = None

    def handle(self, line: str) -> bool:
        """Process a message or a command.  Returns False at the end of the conversation."""
        if not line.strip():
            return True
        if line.startswith("/"):
            return self._command(line.strip())
        self.ask(line.strip())
        return True

    # -- messages ---------------------------------------------------------------------------------

    def ask(self, text: str) -> None:
        """Send a message and display the response.

        Both join the conversation, unless the answer is empty.  Raises: EngineStopped.
        """
        self._question = text
        question = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            prompt = render(self.engine, [*system, *self.messages, question], self.think)
            with Interrupt() as interrupt:
                response = self._respond(prompt, interrupt)
        except OsmiumError as error:
            if self.engine.stopped is not None:
                raise
            self._say(self._error_text(error))
            return
        if response.finish.completion_tokens and self._timing is not None:
            self._timing.print_next()
        if response.answer:
            answer: dict[str, Any] = {"role": "assistant", "content": response.answer}
            if response.reasoning:
                answer["reasoning_content"] = response.reasoning
            self.messages += [question, answer]
        self._print_end(response)

    def _respond(self, prompt: Rendered, interrupt: Interrupt) -> Response:
        params = self.params
        if params.seed is not None:
            params = replace(params, seed=params.seed + self._regenerated)
        return respond(self.engine, prompt, params, self._display(), interrupt)

    def _error_text(self, error: OsmiumError) -> str:
        if isinstance(error, RequestError) and error.code == "context_length_exceeded":
            return (
                f"The conversation and the message are longer than the context of "
                f"{self.engine.context:,} tokens. /new starts another conversation; `--context` "
                "sets a longer context at start."
            )
        return str(error)

    def _print_end(self, response: Response) -> None:
        """Print a note if the response was stopped or truncated, or has no answer."""
        reason, kept = response.finish.reason, bool(response.answer)
        if reason is FinishReason.CANCELLED:
            self._say(
                "Stopped; the response so far is part of the conversation."
                if kept
                else "Stopped before an answer; /regenerate tries again."
            )
        elif reason is FinishReason.LENGTH:
            limit = self.params.max_tokens
            if limit is not None and response.finish.completion_tokens >= limit:
                note = f"Cut off after --max-tokens {limit}."
            else:
                note = (
                    f"Cut off: the context of {self.engine.context:,} tokens is full. /new starts "
                    "another conversation."
                )
            self._say(
                note if kept else note + " It was still thinking: --no-think answers at once."
            )
        elif not kept:
            self._say("The model ended its response without an answer; /regenerate tries again.")

    # -- commands ---------------------------------------------------------------------------------

    def _command(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/bye", "/quit"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            "/help": self._help, "/new": self._new, "/system": self._system,
            "/regenerate": self._regenerate, "/save": self._save,
        }  # fmt: skip
        if name in commands:
            commands[name](rest)
            return True
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        self._say(
            f"There is no command {name}; "
            + (f"did you mean {near[0]}? " if near else "/help lists them. ")
            + "A message that begins with / needs a space before it."
        )
        return True

    def _help(self, rest: str) -> None:
        lines = [f"{name:13}{text}" for name, text in COMMANDS.items() if name != "/bye"]
        self._say("\n".join([*lines, _KEYS]))

    def _new(self, rest: str) -> None:
        self.messages, self._question = [], None
        self._say("A new conversation.")

    def _system(self, rest: str) -> None:
        if rest:
            self.system = rest
            self._say("The system message is set; it applies from the next message on.")
        else:
            self._say(self.system or "There is no system message; /system TEXT sets one.")

    def _regenerate(self, rest: str) -> None:
        if self._question is None:
            self._say("There is no message to respond to yet.")
            return
        previous = self.messages
        if previous and previous[-2]["content"] == self._question:
            self.messages = previous[:-2]
        self._regenerated += 1
        length = len(self.messages)
        self.ask(self._question)
        if len(self.messages) == length:  # no new answer: restore the old one
            self.messages = previous

    def _save(self, rest: str) -> None:
        try:
            (name,) = shlex.split(rest)
        except ValueError:
            self._say("/save needs a file name: /save talk.md, or /save talk.json")
            return
        path = Path(name).expanduser()
        if path.exists() and path != self._saved:
            self._say(f"{path} exists; choose another name.")
            return
        try:
            path.write_text(self._document(path.suffix == ".json"), encoding="utf-8")
        except OSError as error:
            self._say(f"{path} cannot be written: {error.strerror}.")
            return
        self._saved = path
        self._say(f"Saved to {path}.")

    def _document(self, as_json: bool) -> str:
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self.messages]
        if as_json:
            return json.dumps(messages, ensure_ascii=False, indent=1) + "\n"
        return "\n".join(f"## {m['role']}\n\n{m['content']}\n" for m in messages)


def talk(chat: Chat, reader: Reader, say: Callable[[str], None]) -> None:
    """Read messages and generate responses until the user exits.  Raises: EngineStopped."""
    warned = False
    while True:
        try:
            line = reader.read()
        except EOFError:
            return
        except KeyboardInterrupt:
            if warned:
                return
            warned = True
            say("Ctrl-C once more, Ctrl-D or /exit leaves.")
            continue
        warned = False
        if not chat.handle(line):
            return
