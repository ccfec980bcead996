"""Parses command lines: arguments, help, and one-line errors.

argparse parses the flags.  This module assigns the words without a dash, which may stand before,
between and after flags.  It imports nothing that loads slowly.
"""

import argparse
import difflib
import os
import re
import shutil
import textwrap
from collections.abc import Sequence

from osmium.cli import legacy
from osmium.cli.catalog import COMMANDS, Command
from osmium.distribution import version
from osmium.errors import ConfigError

__all__ = ["Help", "Usage", "main_help", "parse"]


class Usage(ConfigError):
    """An invalid command line; the message is one line and begins with the command."""


class Help(Exception):
    """The command line requests help or the version; carries the text."""


def parse(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command and its arguments.  Raises: Usage; Help with the text to print."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        if len(argv) > 1 and argv[0] == "help" and argv[1] in COMMANDS:
            raise Help(_help(argv[1]))
        raise Help(main_help())
    if argv[0] in ("-V", "--version"):
        raise Help(f"osmium {version() or '0+unknown'}")
    name = argv[0]
    if name not in COMMANDS:
        raise Usage(_no_command(name, argv[1:]))
    return COMMANDS[name], _arguments(name, list(argv[1:]))


def _arguments(name: str, argv: list[str]) -> argparse.Namespace:
    command, prog = COMMANDS[name], f"osmium {name}"
    at = argv.index("--") if "--" in argv else len(argv)
    before, after = argv[:at], argv[at + 1 :]
    if any(word in ("-h", "--help") for word in before):
        raise Help(_help(name))
    parser = _parser(name)
    for word in before:
        flag = word.partition("=")[0]
        advice = legacy.instead(flag)
        if advice is not None and flag not in parser.flags:
            raise Usage(f"{prog}: {flag} {advice}")
    try:
        args, rest = parser.parse_known_args(before)
    except argparse.ArgumentError as error:
        raise Usage(f"{prog}: {_wrong_value(error)}") from None
    for word in rest:
        if _is_flag(word):
            raise Usage(f"{prog}: {_no_flag(word, parser.flags, name)}")
    for flag in command.required_flags:
        if getattr(args, flag) is None:
            raise Usage(f"{prog}: --{flag} is missing; {_example(command)}")
    _assign_words(command, prog, rest + after, args)
    return args


def _assign_words(command: Command, prog: str, given: list[str], args: argparse.Namespace) -> None:
    """Assign positional arguments to the namespace.  Raises: Usage."""
    left = list(given)
    value: list[str] | str | None
    for word in command.words:
        if word.name == "model" and args.model_path and len(left) < len(command.words):
            value = None  # the model is in --model-path
        elif word.many:
            value, left = left, []
        else:
            value = left.pop(0) if left else None
        if word.required and not value:
            raise Usage(f"{prog}: {word.shown} is missing; {_example(command)}")
        setattr(args, word.name, value)
    if not left:
        return
    last = command.words[-1].name if command.words else ""
    if last == "prompt":
        prompt = " ".join(given[1:])
        raise Usage(
            f"{prog}: {left[0]!r} is one word too many; put the prompt in quotes: "
            f'{prog} {given[0]} "{prompt}"'
        )
    raise Usage(f"{prog}: {left[0]!r} is one word too many; {_example(command)}")


def _example(command: Command) -> str:
    return f"for example: {command.examples[0]}"


# -- errors ---------------------------------------------------------------------------------------

_NUMBER = re.compile(r"^-\d+$|^-\d*\.\d+$")


def _is_flag(word: str) -> bool:
    """Whether a word that argparse did not take is a flag.

    A single dash is stdin; negative numbers and texts with a space are words.
    """
    return len(word) > 1 and word[0] == "-" and " " not in word and not _NUMBER.match(word)


def _wrong_value(error: argparse.ArgumentError) -> str:
    """The error in one sentence that begins with the flag."""
    name = str(error.argument_name)
    if isinstance(error.__context__, argparse.ArgumentTypeError):
        return f"{name} {error.message}"  # values.py writes the rest of the sentence
    if error.message.startswith("expected"):
        return f"{name} needs a value; see --help."
    return f"{name}: {error.message}."


def _no_flag(word: str, known: Sequence[str], command: str) -> str:
    flag = word.partition("=")[0]
    names = {text.lstrip("-"): text for text in known}
    name = flag.lstrip("-")
    longer = [text for text in names if len(name) > 2 and text.startswith(name)]
    near = [names[text] for text in longer or difflib.get_close_matches(name, names, 1, 0.6)]
    for other, fix in (("--no-", "--"), ("--", "--no-")):
        if flag.startswith(other) and flag.replace(other, fix, 1) in known:
            near = [flag.replace(other, fix, 1)]
    if near:
        return f"there is no flag {flag}; did you mean {near[0]}?"
    return f"there is no flag {flag}; `osmium {command} --help` lists them."


_OTHER_NAMES = {
    "ls": "list", "models": "list", "remove": "rm", "delete": "rm", "download": "pull",
    "ask": "run", "generate": "run", "talk": "chat", "start": "serve", "server": "serve",
    "benchmark": "bench", "quantize": "pack", "convert": "pack", "ppl": "perplexity",
    "check": "doctor", "info": "doctor", "show": "plan", "version": "--version",
}  # fmt: skip


def _no_command(name: str, rest: Sequence[str]) -> str:
    if name.startswith("-"):
        for word in rest:
            if word in COMMANDS:
                return f"osmium: flags come after the command: osmium {word} {name} ..."
        return f"osmium: there is no flag {name} without a command; `osmium --help` lists commands."
    near = _OTHER_NAMES.get(name.lower()) or next(
        iter(difflib.get_close_matches(name.lower(), COMMANDS, 1, 0.6)), None
    )
    if near:
        return f"osmium: there is no command {name!r}; did you mean `osmium {near}`?"
    if "/" in name or name == "demo" or os.path.exists(name):
        return f"osmium: {name!r} is no command; to talk to a model: osmium run {name}"
    return f"osmium: there is no command {name!r}; `osmium --help` lists them."


# -- help -----------------------------------------------------------------------------------------


def _width() -> int:
    return max(50, min(100, shutil.get_terminal_size((80, 24)).columns) - 2)


class _Parser(argparse.ArgumentParser):
    """Flags only; argparse neither prints nor exits."""

    def __init__(self, name: str) -> None:
        super().__init__(
            prog=f"osmium {name}",
            add_help=False,
            allow_abbrev=False,
            exit_on_error=False,
            formatter_class=lambda prog: argparse.HelpFormatter(
                prog, max_help_position=26, width=_width()
            ),
        )

    @property
    def flags(self) -> list[str]:
        """All spellings of all flags."""
        return [text for action in self._actions for text in action.option_strings] + ["--help"]

    def flag_help(self) -> str:
        """The groups of flags, the engine's last."""
        groups = sorted(self._action_groups, key=lambda group: group.title == "engine")
        formatter = self._get_formatter()
        for group in groups:
            formatter.start_section(group.title)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        return formatter.format_help()

    def error(self, message: str) -> object:  # type: ignore[override]
        """Called by argparse for some errors even with exit_on_error=False."""
        raise Usage(f"{self.prog}: {message}")


def _parser(name: str) -> _Parser:
    parser = _Parser(name)
    COMMANDS[name].flags(parser)
    return parser


def _help(name: str) -> str:
    command, parser = COMMANDS[name], _parser(name)
    shown = [word.shown + " ..." * word.many for word in command.words]
    words = [
        text if word.required else f"[{text}]"
        for text, word in zip(shown, command.words, strict=True)
    ]
    lines = [command.summary, "", *(f"  {example}" for example in command.examples), ""]
    lines += [" ".join(["usage: osmium", name, *words, "[flags]"]), ""]
    for word in command.words:
        lines += [*_two_columns(word.shown, word.help), ""]
    return "\n".join(lines) + "\n" + parser.flag_help().rstrip()


def _two_columns(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, _width(), initial_indent=f"  {name:22}  ", subsequent_indent=" " * 26,
        break_on_hyphens=False,
    )  # fmt: skip


def main_help() -> str:
    """The text of `osmium` without arguments."""
    lines = [
        "Osmium runs Mixture-of-Experts models that are larger than the GPU's memory.",
        "",
        "  osmium run demo                               chat with the bundled demo model",
        '  osmium run demo "What is an isotope?"         one answer on stdout',
        "  osmium plan Qwen/Qwen3.5-35B-A3B              will it run here, and how fast",
        "  osmium serve Qwen/Qwen3.5-35B-A3B             the OpenAI API on port 8012",
        "",
        "commands (details: osmium COMMAND --help):",
    ]
    lines += [f"  {name:12}{command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "  --version   print the version"]
    return "\n".join(lines)
