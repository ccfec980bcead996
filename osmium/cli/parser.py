"""Command lines to arguments: the list of commands, their help, and one-line errors.

argparse reads the flags; words without a dash are taken here, so that they may stand before,
between and behind flags.  Nothing heavy is imported.
"""

import argparse
import difflib
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from osmium.cli import legacy
from osmium.cli.flags import (
    MODEL_HELP,
    add_bench_flags,
    add_engine_flags,
    add_sampling_flags,
    add_server_flags,
    add_timing_flag,
)
from osmium.cli.values import choice, integer
from osmium.errors import ConfigError

__all__ = ["COMMANDS", "Command", "Help", "Usage", "main_help", "parse"]


class Usage(ConfigError):
    """A command line that cannot be read; the message is one line and begins with the command."""


class Help(Exception):
    """The command line asks for this text."""


@dataclass(frozen=True)
class Word:
    """A positional argument."""

    name: str
    """Its name in the namespace."""
    help: str
    required: bool = False
    many: bool = False

    @property
    def shown(self) -> str:
        """Its name in help and errors."""
        return self.name.removesuffix("s").upper()


@dataclass(frozen=True)
class Command:
    """One command."""

    summary: str
    examples: tuple[str, ...]
    where: str
    """module:function of osmium.cli, imported when the command runs."""
    flags: Callable[[argparse.ArgumentParser], None]
    words: tuple[Word, ...] = ()
    needs: tuple[str, ...] = ()
    """Flags that must be given."""


MODEL = Word("model", MODEL_HELP)


def parse(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command and its arguments.  Raises: Usage; Help with the text to print."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        if len(argv) > 1 and argv[0] == "help" and argv[1] in COMMANDS:
            raise Help(_help(argv[1]))
        raise Help(main_help())
    if argv[0] in ("-V", "--version"):
        from osmium import __version__

        raise Help(f"osmium {__version__}")
    name = argv[0]
    if name not in COMMANDS:
        raise Usage(_no_command(name, argv[1:]))
    return COMMANDS[name], _arguments(name, list(argv[1:]))


def _arguments(name: str, argv: list[str]) -> argparse.Namespace:
    command, prog = COMMANDS[name], f"osmium {name}"
    at = argv.index("--") if "--" in argv else len(argv)
    before, after = argv[:at], argv[at + 1 :]
    if any(one in ("-h", "--help") for one in before):
        raise Help(_help(name))
    parser = _parser(name)
    for one in before:
        flag = one.partition("=")[0]
        told = legacy.instead(flag)
        if told is not None and flag not in parser.flags:
            raise Usage(f"{prog}: {flag} {told}")
    try:
        args, rest = parser.parse_known_args(before)
    except argparse.ArgumentError as error:
        raise Usage(f"{prog}: {_wrong_value(error)}") from None
    for one in rest:
        if _is_flag(one):
            raise Usage(f"{prog}: {_no_flag(one, parser.flags, name)}")
    for need in command.needs:
        if getattr(args, need) is None:
            raise Usage(f"{prog}: --{need} is missing; {_example(command)}")
    _take_words(command, prog, rest + after, args)
    return args


def _take_words(command: Command, prog: str, given: list[str], args: argparse.Namespace) -> None:
    """Positional arguments into the namespace.  Raises: Usage."""
    left = list(given)
    value: list[str] | str | None
    for word in command.words:
        if word.name == "model" and args.model_path and len(left) < len(command.words):
            value = None  # --model-path names it
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
    """Whether argparse left it over as a flag, not as a word: a dash is stdin, a negative number
    and a text with a space are words."""
    return len(word) > 1 and word[0] == "-" and " " not in word and not _NUMBER.match(word)


def _wrong_value(error: argparse.ArgumentError) -> str:
    """One sentence that begins with the flag."""
    name = str(error.argument_name)
    if isinstance(error.__context__, argparse.ArgumentTypeError):
        return f"{name} {error.message}"  # of osmium/cli/values.py: it goes on from the name
    if error.message.startswith("expected"):
        return f"{name} needs a value; see --help."
    return f"{name}: {error.message}."


def _no_flag(word: str, known: Sequence[str], command: str) -> str:
    flag = word.partition("=")[0]
    near = difflib.get_close_matches(flag, known, 1, 0.6) or [
        one for one in known if len(flag) > 3 and one.startswith(flag)
    ]
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
        for one in rest:
            if one in COMMANDS:
                return f"osmium: flags come after the command: osmium {one} {name} ..."
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
        """Every spelling."""
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
        """What argparse says although exit_on_error is false."""
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
    """What bare `osmium` prints."""
    lines = [
        "Osmium runs Mixture-of-Experts models that are larger than the GPU's memory.",
        "",
        "  osmium run demo                               talk to the bundled demo model",
        '  osmium run demo "What is an isotope?"         one answer on stdout',
        "  osmium plan Qwen/Qwen3.5-35B-A3B              will it run here, and how fast",
        "  osmium serve Qwen/Qwen3.5-35B-A3B             the OpenAI API on port 8012",
        "",
        "commands (osmium COMMAND --help says more):",
    ]
    lines += [f"  {name:12}{command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "  --version   print the version"]
    return "\n".join(lines)


# -- commands -------------------------------------------------------------------------------------


def _engine(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser, model=False)


def _recording(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--record-routing",
        metavar="FILE",
        help="record the experts of each token, routed and predicted, to an .npz for "
        "tools/simulate_cache (slower)",
    )


def _talking(parser: argparse.ArgumentParser) -> None:
    """What run and chat have in common."""
    add = parser.add_argument
    add("--system", metavar="TEXT", help="the system message (none)")
    add("--hide-thinking", action="store_true", help="do not show the model's thinking (a terminal "
        "shows it dim, a pipe never gets it)")  # fmt: skip
    add("--plain", action="store_true", help="do not render Markdown")
    add_timing_flag(parser)


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the text")
    _talking(parser)
    _recording(parser)
    add_sampling_flags(parser)
    _engine(parser)


def _chat(parser: argparse.ArgumentParser) -> None:
    _talking(parser)
    add_sampling_flags(parser)
    _engine(parser)


def _serve(parser: argparse.ArgumentParser) -> None:
    add_timing_flag(add_server_flags(parser))
    _engine(parser)


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as one JSON line")
    _engine(parser)


def _list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as one JSON line")
    _cache_dir(parser)


def _rm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    _cache_dir(parser)


def _cache_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="folder of packed models ($XDG_CACHE_HOME/osmium)"
    )


def _perplexity(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--text", metavar="FILE", help="a UTF-8 text file (required)")
    add("--window", type=integer(2), default=512, metavar="TOKENS", help="tokens per window (512)")
    add(
        "--path",
        type=choice("prefill", "decode"),
        default="prefill",
        metavar="PATH",
        help="compute by prefill in chunks, or by decode, one token at a time (prefill)",
    )
    _recording(parser)
    _engine(parser)


def _logits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ids", metavar="FILE", help="a JSON list of token ids (required)")
    add("--out", metavar="FILE", help="a .npy file, float32 [T, vocab] (required)")
    _engine(parser)


def _bench(parser: argparse.ArgumentParser) -> None:
    add_timing_flag(add_bench_flags(parser))
    add_engine_flags(parser, many=True, model=False)


def _none(parser: argparse.ArgumentParser) -> None:
    """No flags."""


COMMANDS: dict[str, Command] = {
    "run": Command(
        "Answer one prompt on stdout, or talk where none is given.",
        (
            'osmium run demo "What is an isotope?"',
            "osmium run Qwen/Qwen3.5-35B-A3B",
            "osmium run demo - < prompt.txt",
        ),
        "commands:run",
        _run,
        (MODEL, Word("prompt", "the prompt in quotes, or - for stdin (none: talk on the terminal, "
                     "or read a piped stdin)")),
    ),
    "chat": Command(
        "Talk on the terminal; /help in the chat lists its commands.",
        ("osmium chat demo", 'osmium chat Qwen/Qwen3.5-35B-A3B --system "Answer in French."'),
        "commands:chat",
        _chat,
        (MODEL,),
    ),
    "serve": Command(
        "Serve the OpenAI API.",
        ("osmium serve demo", "osmium serve Qwen/Qwen3.5-35B-A3B --context 32k --port 8012"),
        "commands:serve",
        _serve,
        (MODEL,),
    ),
    "plan": Command(
        "Print the memory plan without loading.",
        ("osmium plan demo", "osmium plan Qwen/Qwen3.5-35B-A3B --vram 12G --ram 64G"),
        "commands:plan",
        _plan,
        (MODEL,),
    ),
    "pull": Command(
        "Download a hub model and pack it; prints the packed file's path.",
        ("osmium pull Qwen/Qwen3.5-35B-A3B", "osmium pull Qwen/Qwen3.5-35B-A3B --cache-dir /data"),
        "commands:pull",
        _engine,
        (Word("model", "a hub id, as owner/name", required=True),),
    ),
    "pack": Command(
        "Quantise a model into a packed file; prints the file's path.",
        ("osmium pack ./Qwen3.5-35B-A3B", "osmium pack ./Qwen3.5-35B-A3B --gpu-expert-bits 8"),
        "commands:pack",
        _engine,
        (MODEL,),
    ),
    "list": Command(
        "List packed models: size, formats, when they were last used.",
        ("osmium list", "osmium list --json"),
        "local:list_models",
        _list,
    ),
    "rm": Command(
        "Remove packed models from the cache folder.",
        ("osmium rm Qwen3.5-35B-A3B", "osmium rm Qwen3.5-35B-A3B -y"),
        "local:remove_models",
        _rm,
        (Word("names", "NAME as `osmium list` prints it", required=True, many=True),),
    ),
    "bench": Command(
        "Measure speed, or each kernel (bench kernels); ends with a JSON line.",
        (
            "osmium bench demo --depth 1k",
            "osmium bench Qwen/Qwen3.5-35B-A3B --depth 1k,16k --parallel 1,4",
        ),
        "benchmark:bench",
        _bench,
        (MODEL,),
    ),
    "perplexity": Command(
        "Perplexity of a text; ends with a JSON line.",
        ("osmium perplexity demo --text book.txt",
         "osmium perplexity demo --text book.txt --window 2048"),
        "commands:perplexity",
        _perplexity,
        (MODEL,),
        ("text",),
    ),
    "logits": Command(
        "Teacher-forced logits; ends with a JSON line.",
        ("osmium logits demo --ids ids.json --out logits.npy",
         "osmium logits ./checkpoint --ids ids.json --out logits.npy --device cpu"),
        "commands:logits",
        _logits,
        (MODEL,),
        ("ids", "out"),
    ),
    "doctor": Command(
        "Report what this machine has and what to fix.",
        ("osmium doctor", "osmium doctor > report.txt"),
        "commands:doctor",
        _none,
    ),
}  # fmt: skip
