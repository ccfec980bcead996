"""`osmium bench`: a row on stderr after each measurement, one JSON line on stdout."""

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

from osmium.bench.kernels import bench_kernels
from osmium.bench.profile import profile, profile_table
from osmium.bench.report import compare, header, row_line, summary
from osmium.bench.throughput import BenchConfig, measure
from osmium.cli.flags import BENCH_DEFAULTS, engine_options
from osmium.cli.local import named_model
from osmium.cli.progress import progress_bar
from osmium.cli.timing import enable_timing
from osmium.engine.engine import Engine
from osmium.errors import ConfigError
from osmium.loader import Loader

__all__ = ["DEFAULTS", "bench", "measure_and_show"]

DEFAULTS = BenchConfig(
    depths=(BENCH_DEFAULTS["depth"],), tokens=BENCH_DEFAULTS["tokens"],
    repeats=BENCH_DEFAULTS["repeats"],
    warm_up=BENCH_DEFAULTS["warm_up"], parallel=BENCH_DEFAULTS["parallel"],
    prompts=BENCH_DEFAULTS["prompt_tokens"], turns=BENCH_DEFAULTS["turns"],
    beside=BENCH_DEFAULTS["prompt_beside"],
)  # fmt: skip
"""The measurements of `serve --benchmark`."""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def bench(args: argparse.Namespace) -> None:
    """Measure decode and prefill, or kernels, or compare two results."""
    if args.compare:
        print(compare(*(_json_file(path) for path in args.compare)))
        return
    if args.model == "kernels":  # a folder of that name is ./kernels
        print(json.dumps(bench_kernels(args.filter, _say)))
        return
    model, options = engine_options(args)
    budgets = options.pop("kv_cache_mb", None) or (None,)
    settings = BenchConfig(
        tuple(args.depth.split(",")), args.tokens, args.repeats, args.warm_up, args.parallel,
        args.prompt_tokens, args.turns, args.prompt_beside, args.temperature,
    )  # fmt: skip
    device = options.pop("device", "auto")
    results = []
    with progress_bar() as show:
        loader = Loader(named_model(model, args.cache_dir), device, progress=show, **options)
    try:
        for budget in budgets:
            with progress_bar() as show:
                loader.progress = show
                engine = loader.engine(**_context(loader, budget, args.depth))
            try:
                if args.timing:
                    enable_timing(engine)
                labels = {"kv_cache_mb": budget}
                results.append(measure_and_show(engine, settings, loader.memory_rate(), labels))
                if args.profile:
                    depth = results[-1]["rows"][-1].get("depth", 1024)
                    results[-1]["profile"] = profile(engine, depth)
                    _say(profile_table(results[-1]["profile"]))
            finally:
                engine.close()
                del engine
                gc.collect()  # frees its VRAM before the next engine allocates
    finally:
        loader.close()
    print(json.dumps(results if len(results) > 1 else results[0]))


def measure_and_show(
    engine: Engine, settings: BenchConfig, memory_gb_s: float, labels: dict[str, Any]
) -> dict[str, Any]:
    """`labels` and the measurements, for JSON.  Prints each row and the remaining time on stderr.

    Raises: ConfigError if the sizes do not fit the engine.
    """
    prompts = len(settings.prompts) + len(settings.turns) + len(settings.beside)
    rows = prompts + len(settings.parallel) * len(settings.depths)
    _say(f"{engine.name}: measuring {rows} row{'s' * (rows != 1)}")
    columns = ""

    def on_row(row: dict[str, Any], left: int, seconds: float | None) -> None:
        nonlocal columns
        if header(row) != columns:
            columns = header(row)
            _say(columns)
        _say(row_line(row))
        if left:
            estimate = "" if seconds is None else f", about {_duration(seconds)}"
            _say(f"  ({left} row{'s' * (left != 1)} left{estimate})")

    document = {**labels, **measure(engine, settings, memory_gb_s, on_row)}
    _say(summary(document))
    return document


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _context(loader: Loader, budget: int | None, depth: str) -> dict[str, Any]:
    """Options of one KV budget.  For a depth in percent, the context is the whole KV cache."""
    if budget is None:
        return {}
    if "%" not in depth:
        return {"kv_cache_mb": budget}
    return {"kv_cache_mb": budget, "context": loader.kv_tokens(budget)}


def _json_file(path: str) -> Any:
    """Parse the last line of a file as JSON.  Raises: ConfigError."""
    try:
        return json.loads(Path(path).read_text().strip().splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"{path} is no result of osmium bench: {error}") from None
