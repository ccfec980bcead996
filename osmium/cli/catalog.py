"""The commands: summary, examples, positional arguments and flags of each.

This module parses and runs nothing, and imports nothing that loads slowly.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from osmium.cli.flags import (
    MODEL_HELP,
    add_bench_flags,
    add_engine_flags,
    add_sampling_flags,
    add_server_flags,
    add_timing_flag,
)
from osmium.cli.planning import add_plan_flags
from osmium.cli.values import choice, integer

__all__ = ["COMMANDS", "Command", "Word"]


@dataclass(frozen=True)
class Word:
    """A positional argument."""

    name: str
    """The name in the namespace."""
    help: str
    required: bool = False
    many: bool = False

    @property
    def shown(self) -> str:
        """The name in help and errors."""
        return self.name.removesuffix("s").upper()


@dataclass(frozen=True)
class Command:
    """One command."""

    summary: str
    examples: tuple[str, ...]
    entry_point: str
    """module:function of osmium.cli, imported when the command runs."""
    flags: Callable[[argparse.ArgumentParser], None]
    words: tuple[Word, ...] = ()
    required_flags: tuple[str, ...] = ()
    """Names of flags that must be given."""


MODEL = Word("model", MODEL_HELP)


def _engine(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser, model=False)


def _recording(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--record-routing",
        metavar="FILE",
        help="record the experts of each token, routed and predicted, to an .npz for "
        "tools/simulate_cache (slower)",
    )


def _conversation(parser: argparse.ArgumentParser) -> None:
    """Flags of both run and chat."""
    add = parser.add_argument
    add("--system", metavar="TEXT", help="the system message (none)")
    add("--hide-thinking", action="store_true", help="hide the model's reasoning (shown dim on a "
        "terminal, never in a pipe)")  # fmt: skip
    add("--plain", action="store_true", help="do not render Markdown")
    add_timing_flag(parser)


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the text")
    _conversation(parser)
    _recording(parser)
    add_sampling_flags(parser)
    _engine(parser)


def _chat(parser: argparse.ArgumentParser) -> None:
    _conversation(parser)
    add_sampling_flags(parser)
    _engine(parser)


def _serve(parser: argparse.ArgumentParser) -> None:
    add_timing_flag(add_server_flags(parser))
    _engine(parser)


def _plan(parser: argparse.ArgumentParser) -> None:
    add_plan_flags(parser)
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
        "Print the answer to one prompt; without a prompt, chat.",
        (
            'osmium run demo "What is an isotope?"',
            "osmium run Qwen/Qwen3.5-35B-A3B",
            "osmium run demo - < prompt.txt",
        ),
        "commands:run",
        _run,
        (MODEL, Word("prompt", "the prompt in quotes, or - for stdin (none: chat on the terminal, "
                     "or read a piped stdin)")),
    ),
    "chat": Command(
        "Chat on the terminal; /help lists its commands.",
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
        "Print what a model needs and how fast it will run.",
        (
            "osmium plan Qwen/Qwen3.5-35B-A3B",
            "osmium plan Qwen/Qwen3.5-122B-A10B --gpu 'RTX 4090' --ram 64G",
        ),
        "planning:plan",
        _plan,
        (MODEL,),
    ),
    "pull": Command(
        "Download a model from the hub and pack it; prints the path.",
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
        "List packed models: size, formats, last use.",
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
        "Measure speed, or each kernel; ends with a JSON line.",
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
