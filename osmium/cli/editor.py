"""Lines for the chat: a line editor with history on a terminal, else plain lines of stdin."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from osmium.cli.chat import Reader
from osmium.errors import ConfigError

if TYPE_CHECKING:
    from prompt_toolkit.history import History

__all__ = ["history_path", "reader_for"]

PROMPT = "> "


def reader_for(commands: Sequence[str]) -> Reader:
    """The reader for stdin and stdout.  Tab completes `commands`."""
    interactive = sys.stdin is not None and sys.stdin.isatty()
    interactive = interactive and sys.stdout is not None and sys.stdout.isatty()
    if interactive and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown"):
        return _Editor(commands)
    return _Lines()


def history_path() -> Path:
    """The history file: chat_history in $XDG_STATE_HOME/osmium, else ~/.local/state/osmium."""
    state = os.environ.get("XDG_STATE_HOME")
    return Path(state or Path.home() / ".local" / "state") / "osmium" / "chat_history"


class _Lines:
    """Reads one message per line; prints a prompt on stderr if stdin is a terminal."""

    def read(self) -> str:
        if sys.stdin is None:
            raise EOFError
        if sys.stdin.isatty():
            print(PROMPT, end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            print(file=sys.stderr)  # a new line after ^C
            raise
        except UnicodeDecodeError as error:
            raise ConfigError(f"stdin is not {error.encoding} text: {error.reason}.") from None
        if not line:
            raise EOFError
        return line.rstrip("\n")


class _Editor:
    """prompt_toolkit's editor: Enter sends, Alt-Enter adds a line, a paste is one message."""

    def __init__(self, commands: Sequence[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        keys = KeyBindings()

        @keys.add("enter")
        def send(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c")
        def clear(event: KeyPressEvent) -> None:
            """Ctrl-C clears the line; on an empty line read() raises KeyboardInterrupt."""
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

        def is_command() -> bool:
            return self._session.default_buffer.text.startswith("/")

        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            key_bindings=keys,
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: "." * (width - 1) + " ",
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=Condition(is_command),
            reserve_space_for_menu=4,
        )

    def read(self) -> str:
        print()  # between a response and the next message
        text = self._session.prompt(PROMPT)
        # In an ASCII locale each byte of a letter arrives as half a surrogate pair.
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _history() -> "History":
    """The history in a file that only this user can read; in memory if it cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()

    class SafeFileHistory(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # a full disk must not end the chat
                super().store_string(string)

    return SafeFileHistory(str(path))
