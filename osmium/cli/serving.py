"""`osmium serve`: load while the port is open, measure where that is wanted, serve."""

import argparse
import gc
import json
import os
import sys
from typing import Any

from osmium.cli.benchmark import DEFAULTS, bench, measure_and_show
from osmium.cli.commands import say_what_is_kept
from osmium.cli.flags import BENCH_DEFAULTS, engine_options
from osmium.cli.local import named_model
from osmium.cli.progress import progress_bar
from osmium.cli.timing import enable_timing
from osmium.config import EngineConfig, Progress
from osmium.engine.engine import Engine
from osmium.loader import Loader
from osmium.server.app import BackgroundLoader
from osmium.server.app import serve as serve_host

__all__ = ["serve_model"]


def serve_model(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C.  Raises: ConfigError, CheckpointError, DeviceError, EngineStopped."""
    if args.benchmark_only:
        for name, value in BENCH_DEFAULTS.items():
            setattr(args, name, value)
        args.kv_cache_mb = None if args.kv_cache_mb is None else (args.kv_cache_mb,)
        bench(args)
        return
    model, options = engine_options(args)
    EngineConfig(**options)  # a flag that cannot be is refused before the port opens
    model = named_model(model, args.cache_dir)

    def loading(progress: Progress) -> Engine:
        """Shown on the terminal as well as by /health."""
        with progress_bar() as bar:

            def both(stage: str, done: int, total: int) -> None:
                progress(stage, done, total)
                bar(stage, done, total)

            engine = _load(model, options, both, args.benchmark)
        print(engine.plan.table(), file=sys.stderr, flush=True)
        if args.timing:
            enable_timing(engine)
        return engine

    host = BackgroundLoader(loading)
    try:
        serve_host(
            host,
            address=args.host,
            port=args.port,
            api_key=args.api_key or os.environ.get("OSMIUM_API_KEY"),
            cors_origin=args.cors_origin,
            served_model_name=args.served_model_name,
        )
    except KeyboardInterrupt:
        if host.engine is None:
            say_what_is_kept(host.progress)
        raise


def _load(
    model: str | None, options: dict[str, Any], progress: Progress, benchmark: bool
) -> Engine:
    """The engine to serve; with `benchmark`, after an engine of its own has been measured, so that
    neither its cache nor its usage counts are those of random tokens."""
    rest = dict(options)
    device = rest.pop("device", "auto")
    loader = Loader(model, device, progress=progress, needs=["tokenizer"], **rest)
    try:
        if benchmark:
            progress("benchmark", 0, 0)
            engine = loader.engine()
            try:
                found = measure_and_show(engine, DEFAULTS, loader.memory_rate(), {})
            finally:
                engine.close()
                del engine
                gc.collect()  # its VRAM, before the next one allocates
            print(json.dumps(found), flush=True)
        return loader.engine(owns_loader=True)
    except BaseException:
        loader.close()
        raise
