"""`osmium serve`: opens the port, loads the model, runs a benchmark if requested, serves."""

import argparse
import gc
import json
import sys
from typing import Any

from osmium.cli.api_keys import api_keys, key_password
from osmium.cli.benchmark import DEFAULTS, bench, measure_and_show
from osmium.cli.commands import print_resumable
from osmium.cli.flags import BENCH_DEFAULTS, engine_options
from osmium.cli.local import named_model
from osmium.cli.progress import progress_bar
from osmium.cli.timing import enable_timing
from osmium.config import EngineConfig, Progress
from osmium.engine.engine import Engine
from osmium.loader import Loader
from osmium.server.app import BackgroundLoader
from osmium.server.app import serve as serve_http
from osmium.server.limits import Limits
from osmium.server.tls import tls_context

__all__ = ["serve_model"]


def serve_model(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C.  Raises: ConfigError, CheckpointError, DeviceError, EngineStopped."""
    if args.benchmark_only:
        for name, value in BENCH_DEFAULTS.items():
            setattr(args, name, value)
        args.kv_cache_mb = None if args.kv_cache_mb is None else (args.kv_cache_mb,)
        bench(args)
        return
    keys = api_keys(args.api_key, args.api_key_file)
    password = key_password(args.ssl_keyfile_password, args.ssl_keyfile_password_file)
    tls = tls_context(args.ssl_certfile, args.ssl_keyfile, password, args.ssl_ca_certs)
    model, options = engine_options(args)
    EngineConfig(**options)  # raises for an invalid flag before the port opens
    model = named_model(model, args.cache_dir)

    def loading(progress: Progress) -> Engine:
        """Load the engine, with progress on the terminal and in /health."""
        with progress_bar() as bar:

            def both(stage: str, done: int, total: int) -> None:
                progress(stage, done, total)
                bar(stage, done, total)

            engine = _load(model, options, both, args.benchmark)
        print(engine.plan.table(), file=sys.stderr, flush=True)
        if args.timing:
            enable_timing(engine)
        return engine

    loader = BackgroundLoader(loading)
    try:
        serve_http(
            loader,
            address=args.host,
            port=args.port,
            api_key=keys,
            cors_origin=args.cors_origin,
            allowed_host=args.allowed_host,
            served_model_name=args.served_model_name,
            limits=Limits(
                max_body_bytes=args.max_body_mb << 20,
                max_connections=args.max_connections,
                max_queued_requests=args.max_queued_requests,
            ),
            tls=tls,
            log_requests=args.log_requests,
        )
    except KeyboardInterrupt:
        if loader.engine is None:
            print_resumable(loader.progress)
        raise


def _load(
    model: str | None, options: dict[str, Any], progress: Progress, benchmark: bool
) -> Engine:
    """Load the engine to serve.

    `benchmark` first measures a separate engine, so that random tokens do not change the served
    engine's expert cache and usage counts.
    """
    config = dict(options)
    device = config.pop("device", "auto")
    loader = Loader(model, device, progress=progress, needs=["tokenizer"], **config)
    try:
        if benchmark:
            progress("benchmark", 0, 0)
            engine = loader.engine()
            try:
                result = measure_and_show(engine, DEFAULTS, loader.memory_rate(), {})
            finally:
                engine.close()
                del engine
                gc.collect()  # frees its VRAM before the next engine allocates
            print(json.dumps(result), flush=True)
        return loader.engine(owns_loader=True)
    except BaseException:
        loader.close()
        raise
