"""The commands, called with the arguments that parser.py has parsed."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from osmium.cli.answer import Rendered, render, respond, tokenizer_of
from osmium.cli.chat import COMMANDS, Chat, banner, talk
from osmium.cli.editor import reader_for
from osmium.cli.flags import engine_options
from osmium.cli.local import named_model
from osmium.cli.progress import amount, progress_bar, stopped_stage
from osmium.cli.render import Display, display_for
from osmium.cli.timing import ResponseTimes
from osmium.config import Progress
from osmium.engine.engine import Engine
from osmium.engine.perplexity import perplexity as measure_perplexity
from osmium.engine.request import SamplingParams
from osmium.errors import ConfigError
from osmium.loader import load
from osmium.loader import pack as pack_model
from osmium.text.files import Need

__all__ = ["chat", "doctor", "logits", "pack", "perplexity", "pull", "run", "serve"]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _note(text: str) -> None:
    """Print a note on stderr, wrapped between words on a terminal."""
    console = Console(stderr=True, highlight=False)
    console.print(Text(text), soft_wrap=not console.is_terminal)


@contextmanager
def resumable() -> Iterator[Progress]:
    """Progress of loading; Ctrl-C during a download or packing prints how to continue."""
    try:
        with progress_bar() as progress:
            yield progress
    except KeyboardInterrupt:
        print_resumable(stopped_stage())
        raise


def print_resumable(stage: tuple[str, int, int] | None) -> None:
    """After Ctrl-C: print the amount done of a stage that the next start continues."""
    name, done, total = stage or ("", 0, 0)
    if name.startswith(("packing", "download")):
        _say(
            f"osmium: stopped while {name.replace('download ', 'downloading ')}, at "
            f"{amount(name, done, total)}. The finished part is kept; the same command continues "
            "from there."
        )


def _engine(args: argparse.Namespace, *needs: Need) -> Engine:
    model, options = engine_options(args)
    model = named_model(model, args.cache_dir)
    with resumable() as progress:
        return load(model, progress=progress, needs=needs, **options)


@contextmanager
def _recorded(engine: Engine, path: str | None) -> Iterator[None]:
    """Record the routing inside to `path`, if it is given.  Raises: ConfigError."""
    if path is None:
        yield
        return
    recorder = engine.record_routing()
    yield
    recorder.save(path)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from None


# -- prompts and conversations --------------------------------------------------------------------


def _params(args: argparse.Namespace, engine: Engine) -> SamplingParams:
    """Sampling parameters: the flags, else the model's defaults."""
    given = {
        name: getattr(args, name)
        for name in ("temperature", "top_p", "top_k", "seed", "max_tokens")
        if getattr(args, name) is not None
    }
    return SamplingParams(**{**engine.defaults, **given})


def _stdin() -> str:
    """All of stdin.  Raises: ConfigError if it is not UTF-8."""
    if sys.stdin is None:
        return ""
    try:
        raw = sys.stdin.buffer.read()
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is not UTF-8 text: {error.reason} at {error.start}.") from None


def _prompt_of(args: argparse.Namespace) -> str | None:
    """The prompt, from the command line or stdin; None for a conversation.

    Raises: ConfigError if it is empty.
    """
    text: str | None = args.prompt
    if text == "-" or (text is None and (sys.stdin is None or not sys.stdin.isatty())):
        text = _stdin()
        text = text if args.raw else text.removesuffix("\n")
    if text is not None and not text.strip():
        raise ConfigError(
            'The prompt is empty; run osmium run MODEL "PROMPT", or pipe the prompt in.'
        )
    if text is None and args.raw:
        raise ConfigError('--raw needs a prompt: osmium run MODEL --raw "PROMPT".')
    return text


def run(args: argparse.Namespace) -> None:
    """Print the answer to one prompt on stdout; without a prompt, start a conversation."""
    named_model(engine_options(args)[0], args.cache_dir)  # raises for a prompt in MODEL's place
    text = _prompt_of(args)
    if text is None:
        if args.record_routing:
            raise ConfigError("--record-routing needs a prompt.")
        chat(args)
        return
    needs: list[Need] = ["tokenizer"] if args.raw else ["tokenizer", "chat_template"]
    engine = _engine(args, *needs)
    try:
        timing = ResponseTimes(engine) if args.timing else None
        if args.raw:
            prompt = Rendered(tokenizer_of(engine).encode(text), thinking=False, raw=True)
        else:
            system = [{"role": "system", "content": args.system}] if args.system else []
            prompt = render(engine, [*system, {"role": "user", "content": text}], args.think)
        params = _params(args, engine)
        with _recorded(engine, args.record_routing):
            display = display_for(markdown=False, thinking=not args.hide_thinking)
            response = respond(engine, prompt, params, display)
        if timing is not None:
            timing.print_next()
        if response.reasoning and not response.answer:
            _say(
                f"osmium: the response ended within its reasoning, after "
                f"{response.finish.completion_tokens} tokens; --no-think answers at once."
            )
    finally:
        engine.close()


def chat(args: argparse.Namespace) -> None:
    """A conversation, until Ctrl-D or /exit."""
    engine = _engine(args, "tokenizer", "chat_template")
    try:

        def display() -> Display:
            return display_for(markdown=not args.plain, thinking=not args.hide_thinking)

        timing = ResponseTimes(engine) if args.timing else None
        conversation = Chat(
            engine, _params(args, engine), display, _note, system=args.system, think=args.think,
            timing=timing,
        )  # fmt: skip
        if sys.stdin is not None and sys.stdin.isatty():
            _note(banner(engine))
        talk(conversation, reader_for([*COMMANDS]), _note)
    finally:
        engine.close()


def serve(args: argparse.Namespace) -> None:
    """The HTTP server."""
    from osmium.cli.serving import (
        serve_model,  # takes a third of a second; only this command needs it
    )

    serve_model(args)


# -- packing, reports and measurements -------------------------------------------------------------


def pack(args: argparse.Namespace) -> None:
    """Quantise a model into a packed file; prints its path."""
    model, options = engine_options(args)
    with resumable() as progress:
        path = pack_model(model, progress=progress, **options)
    print(path)


def pull(args: argparse.Namespace) -> None:
    """Download and pack a hub model; prints the packed file's path."""
    model, _ = engine_options(args)
    if model is None or model.count("/") != 1 or os.path.exists(model):
        raise ConfigError(
            f"pull takes a hub id, as owner/name, not {model!r}; `osmium pack` packs a folder."
        )
    pack(args)


def doctor(args: argparse.Namespace) -> None:
    """Print the findings, each with its advice."""
    from osmium.cli.doctor import run_checks

    for finding in run_checks():
        print(f"{finding.name:16}{finding.value}")
        if finding.advice:
            print(f"{'':16}-> {finding.advice}")


def perplexity(args: argparse.Namespace) -> None:
    """Print the perplexity of a text: windows of n tokens, each from an empty state.

    Tokens 2 to n of a window are scored.
    """
    text = _read(args.text)
    engine = _engine(args, "tokenizer")
    try:
        ids = tokenizer_of(engine).encode(text, specials=False)
        with progress_bar() as progress, _recorded(engine, args.record_routing):
            result = measure_perplexity(
                engine, ids, window=args.window, path=args.path, progress=progress
            )
        print(json.dumps(result))
    finally:
        engine.close()


def logits(args: argparse.Namespace) -> None:
    """Write teacher-forced logits, float32 [T, vocab], to a .npy file."""
    try:
        ids = json.loads(_read(args.ids))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{args.ids} is not JSON: {error}") from None
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ConfigError(f"{args.ids} must hold one list of integers.")
    engine = _engine(args)
    try:
        values = engine.logits(ids)
        with open(args.out, "wb") as file:
            np.save(file, values)
        shape = list(values.shape)
        print(json.dumps({"out": args.out, "shape": shape, "dtype": str(values.dtype)}))
    except OSError as error:
        raise ConfigError(f"{args.out} cannot be written: {error}") from None
    finally:
        engine.close()
