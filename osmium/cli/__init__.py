"""The command line: osmium serve | run | chat | plan | pack | perplexity | logits | doctor | bench.

The answer goes to stdout and everything else to stderr.  What Osmium refuses is one line and exit
code 2; Ctrl-C is 130.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from osmium.cli.flags import add_bench_flags, add_engine_flags, add_server_flags
from osmium.cli.planning import add_plan_flags
from osmium.errors import OsmiumError

__all__ = ["main", "serve"]

Command = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.  Returns the exit code."""
    args = _parser().parse_args(argv)
    from osmium.cli import commands  # here, so that --help does not wait for NumPy

    command: Command = getattr(commands, args.command)
    try:
        command(args)
    except OsmiumError as error:
        print(f"osmium: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def serve() -> int:
    """`osmium-serve ...` is `osmium serve ...`."""
    return main(["serve", *sys.argv[1:]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="osmium", description="A Mixture-of-Experts engine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, text: str, *, engine: bool = True, many: bool = False
    ) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        if engine:
            add_engine_flags(one, many)
        return one

    serving = add("serve", "Serve the OpenAI API.")
    add_server_flags(serving)
    _timing(serving)
    run = add("run", "Answer one prompt on stdout.")
    run.add_argument("prompt", help="the prompt, or - for stdin")
    run.add_argument("--raw", action="store_true", help="no chat template: continue the text")
    _sampling(run)
    _recording(run)
    _timing(run)
    chat = add("chat", "Talk on the terminal.")
    chat.add_argument("--system", metavar="TEXT", help="the system message (none)")
    _sampling(chat)
    _timing(chat)
    add_plan_flags(add("plan", "Print what a model needs and does, before it is downloaded."))
    add("pack", "Quantise a model into a packed file; prints its path.")
    perplexity = add("perplexity", "Perplexity of a text; ends with one JSON line.")
    perplexity.add_argument("--text", required=True, metavar="FILE", help="a UTF-8 text file")
    perplexity.add_argument("--window", type=int, default=512, help="tokens per window (512)")
    perplexity.add_argument(
        "--path",
        choices=("prefill", "decode"),
        default="prefill",
        help="compute by prefill in chunks, or by decoding one token at a time (prefill)",
    )
    _recording(perplexity)
    logits = add("logits", "Teacher-forced logits; ends with one JSON line.")
    logits.add_argument("--ids", required=True, metavar="FILE", help="a JSON list of token ids")
    logits.add_argument("--out", required=True, metavar="FILE", help=".npy, float32 [T, vocab]")
    add("doctor", "Report what this machine has and what to fix.", engine=False)
    measured = (
        "Measure decode and prefill, or (`bench kernels`) each kernel; ends with one JSON line."
    )
    bench = add("bench", measured, many=True)
    add_bench_flags(bench)
    _timing(bench)
    return parser


def _recording(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--record-routing",
        metavar="FILE",
        help="record the experts of each token, routed and predicted, to an .npz for "
        "tools/simulate_cache (slower)",
    )


def _timing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timing",
        action="store_true",
        help="print tok/s, hit rate, MB per token and times of each response on stderr (off)",
    )


def _sampling(parser: argparse.ArgumentParser) -> None:
    flags = parser.add_argument_group("sampling (the model's own defaults)")
    flags.add_argument("--temperature", type=float, help="0 always takes the most likely token")
    flags.add_argument(
        "--top-p", type=float, help="keep the most likely tokens up to this probability"
    )
    flags.add_argument("--top-k", type=int, help="keep this many most likely tokens (0: all)")
    flags.add_argument("--seed", type=int, help="the same seed gives the same text")
    flags.add_argument("--max-tokens", type=int, help="stop after this many tokens (the context)")
    flags.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="enable or disable thinking (the template's default)",
    )
