"""What each command does, with the arguments that cli/__init__.py has parsed."""

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from osmium.bench.kernels import bench_kernels
from osmium.bench.profile import profile, profile_table
from osmium.bench.report import compare, table
from osmium.bench.speed import Settings, measure
from osmium.cli.doctor import examine
from osmium.cli.flags import BENCH, engine_options
from osmium.cli.planning import plan
from osmium.cli.progress import progress_bar
from osmium.cli.timing import tell_timing
from osmium.config import EngineConfig, Progress
from osmium.engine.engine import Engine
from osmium.engine.perplexity import perplexity as measure_perplexity
from osmium.engine.request import SamplingParams
from osmium.errors import CheckpointError, ConfigError
from osmium.loader import Loader, load
from osmium.loader import pack as pack_model
from osmium.server.app import ModelHost
from osmium.server.app import serve as serve_host
from osmium.text.files import Need
from osmium.text.tokenizer import Tokenizer

__all__ = ["bench", "chat", "doctor", "logits", "pack", "perplexity", "plan", "run", "serve"]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _engine(args: argparse.Namespace, *needs: Need) -> Engine:
    model, options = engine_options(args)
    with progress_bar() as progress:
        engine = load(model, progress=progress, needs=needs, **options)
    if getattr(args, "timing", False):
        tell_timing(engine)
    return engine


def _need_tokenizer(engine: Engine) -> Tokenizer:
    """The model's tokenizer.  Raises: CheckpointError where it came without one."""
    if engine.tokenizer is None:
        raise CheckpointError(
            f"{engine.name} has no tokenizer.json, so text has no ids; put the file beside the "
            "model's config.json."
        )
    found: Tokenizer = engine.tokenizer
    return found


@contextmanager
def _recorded(engine: Engine, path: str | None) -> Iterator[None]:
    """What is routed inside goes into a file, if one is named.  Raises: ConfigError."""
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


# -- talking --------------------------------------------------------------------------------------


def _params(args: argparse.Namespace, engine: Engine) -> SamplingParams:
    """The model's defaults, and over them what was given."""
    given = {
        name: getattr(args, name)
        for name in ("temperature", "top_p", "top_k", "seed", "max_tokens")
        if getattr(args, name) is not None
    }
    return SamplingParams(**{**engine.defaults, **given})


def _prompt(engine: Engine, messages: list[dict[str, Any]], think: bool | None) -> list[int]:
    tokenizer = _need_tokenizer(engine)
    if engine.template is None:
        raise ConfigError(f"{engine.name} has no chat template; use `osmium run --raw`.")
    more = {} if think is None else {"enable_thinking": think}
    return tokenizer.encode(engine.template.render(messages, **more))


def _answer(engine: Engine, ids: list[int], params: SamplingParams) -> str:
    text = ""
    for token in engine.generate(ids, params):
        text += token.text
        print(token.text, end="", flush=True)
    print()
    return text


def run(args: argparse.Namespace) -> None:
    """One prompt, its answer on stdout."""
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    needs: list[Need] = ["tokenizer"] if args.raw else ["tokenizer", "chat_template"]
    engine = _engine(args, *needs)
    try:
        if args.raw:
            ids = _need_tokenizer(engine).encode(text)
        else:
            ids = _prompt(engine, [{"role": "user", "content": text}], args.think)
        with _recorded(engine, args.record_routing):
            _answer(engine, ids, _params(args, engine))
    finally:
        engine.close()


def chat(args: argparse.Namespace) -> None:
    """A conversation; an empty line or Ctrl-D ends it."""
    engine = _engine(args, "tokenizer", "chat_template")
    system = [{"role": "system", "content": args.system}] if args.system else []
    messages: list[dict[str, Any]] = list(system)
    try:
        while text := input("> ").strip():
            messages.append({"role": "user", "content": text})
            reply = _answer(engine, _prompt(engine, messages, args.think), _params(args, engine))
            messages.append({"role": "assistant", "content": reply})
    except EOFError:
        pass
    finally:
        engine.close()


def serve(args: argparse.Namespace) -> None:
    """The HTTP server."""
    if args.benchmark:
        for name, value in BENCH.items():
            setattr(args, name, value)
        args.kv_cache_mb = None if args.kv_cache_mb is None else [args.kv_cache_mb]
        bench(args)
        return
    model, options = engine_options(args)
    EngineConfig(**options)  # a flag that cannot be is said before the port opens

    def loading(progress: Progress) -> Engine:
        """Shown on the terminal as well as by /health."""
        with progress_bar() as bar:

            def both(stage: str, done: int, total: int) -> None:
                progress(stage, done, total)
                bar(stage, done, total)

            engine = load(model, progress=both, needs=["tokenizer"], **options)
        _say(engine.plan.table())
        if args.timing:
            tell_timing(engine, while_serving=True)
        return engine

    host = ModelHost(loading)
    serve_host(
        host,
        address=args.host,
        port=args.port,
        api_key=args.api_key or os.environ.get("OSMIUM_API_KEY"),
        cors_origin=args.cors_origin,
        served_model_name=args.served_model_name,
    )


# -- looking and measuring ------------------------------------------------------------------------


def pack(args: argparse.Namespace) -> None:
    """Quantise once; prints the packed file's path."""
    model, options = engine_options(args)
    with progress_bar() as progress:
        path = pack_model(model, progress=progress, **options)
    print(path)


def doctor(args: argparse.Namespace) -> None:
    """Findings, with advice under those that need it."""
    for finding in examine():
        print(f"{finding.name:16}{finding.found}")
        if finding.advice:
            print(f"{'':16}-> {finding.advice}")


def perplexity(args: argparse.Namespace) -> None:
    """Windows from an empty state each, tokens 2 .. n scored."""
    text = _read(args.text)
    engine = _engine(args, "tokenizer")
    try:
        ids = _need_tokenizer(engine).encode(text, specials=False)
        with progress_bar() as progress, _recorded(engine, args.record_routing):
            found = measure_perplexity(
                engine, ids, window=args.window, path=args.path, progress=progress
            )
        print(json.dumps(found))
    finally:
        engine.close()


def logits(args: argparse.Namespace) -> None:
    """float32 [T, vocab] into a .npy file."""
    try:
        ids = json.loads(_read(args.ids))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{args.ids} is not JSON: {error}") from None
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise ConfigError(f"{args.ids} must hold one list of integers.")
    engine = _engine(args)
    try:
        found = engine.logits(ids)
        with open(args.out, "wb") as file:
            np.save(file, found)
        print(json.dumps({"out": args.out, "shape": list(found.shape), "dtype": str(found.dtype)}))
    except OSError as error:
        raise ConfigError(f"{args.out} cannot be written: {error}") from None
    finally:
        engine.close()


def bench(args: argparse.Namespace) -> None:
    """Decode and prefill, medians; the table on stderr, one JSON line on stdout."""
    if args.compare:
        print(compare(*(_json_file(path) for path in args.compare)))
        return
    if args.model == "kernels":  # a folder of that name is ./kernels
        print(json.dumps(bench_kernels(args.filter, _say)))
        return
    model, options = engine_options(args)
    budgets = options.pop("kv_cache_mb", None) or [None]
    settings = Settings(
        tuple(args.depth.split(",")) if args.depth else (),
        args.tokens, args.repeats, args.warm_up, args.parallel, args.prompt_tokens,
        args.temperature,
    )  # fmt: skip
    device = options.pop("device", "auto")
    found = []
    with progress_bar() as show:
        loader = Loader(model, device, progress=show, **options)
    try:
        rate = loader.memory_rate()
        for budget in budgets:
            with progress_bar() as show:
                loader.progress = show
                engine = loader.engine(**_context(loader, budget, args.depth))
            try:
                if args.timing:
                    tell_timing(engine, while_serving=True)
                found.append({"kv_cache_mb": budget, **measure(engine, settings, rate)})
                _say(table(found[-1]))
                if args.profile:
                    depth = found[-1]["rows"][-1].get("depth", 1024)
                    found[-1]["profile"] = profile(engine, depth)
                    _say(profile_table(found[-1]["profile"]))
            finally:
                engine.close()
                del engine
                gc.collect()  # its VRAM, before the next one asks for some
    finally:
        loader.close()
    print(json.dumps(found if len(found) > 1 else found[0]))


def _context(loader: Loader, budget: int | None, depth: str) -> dict[str, Any]:
    """Options of one KV budget; a depth in percent is of all that the KV holds."""
    if budget is None:
        return {}
    if "%" not in depth:
        return {"kv_cache_mb": budget}
    return {"kv_cache_mb": budget, "context": loader.kv_tokens(budget)}


def _json_file(path: str) -> Any:
    """The last line of a file as JSON.  Raises: ConfigError."""
    try:
        return json.loads(Path(path).read_text().strip().splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"{path} holds no result of osmium bench: {error}") from None
