"""The command line's flags, and EngineConfig's options from them.

This module runs no command and does not import NumPy.
"""

import argparse
from typing import Any

from osmium.cli.legacy import VALUES
from osmium.cli.values import (
    choice,
    depths,
    integer,
    integers,
    number,
    parsed,
    token_counts,
    turns,
)
from osmium.config import parse_count, parse_size
from osmium.errors import ConfigError

__all__ = [
    "BENCH_DEFAULTS", "add_bench_flags", "add_engine_flags", "add_sampling_flags",
    "add_server_flags",
    "add_timing_flag", "engine_options",
]  # fmt: skip

BENCH_DEFAULTS: dict[str, Any] = {
    "depth": "1k", "tokens": 256, "repeats": 3, "warm_up": 256, "parallel": (1,),
    "temperature": 0.0, "prompt_tokens": (512,), "turns": (), "prompt_beside": (), "profile": False,
    "compare": None, "filter": None,
}  # fmt: skip
"""Defaults of `osmium bench` and of `osmium serve --benchmark`."""

MODEL_HELP = (
    "a checkpoint folder, a packed file, a hub id (owner/name), a NAME of `osmium list`, demo (the "
    "bundled model, the default), or synthetic:NAME[:LAYERS]: random weights in the shape of "
    "qwen3.5-35b-a3b, -122b-a10b or -397b-a17b"
)


def add_engine_flags(
    parser: argparse.ArgumentParser, many: bool = False, *, model: bool = True
) -> None:
    """Add all options of EngineConfig.

    With `model`, also the model as a positional argument; with `many`, --kv-cache-mb takes a list.
    """
    if model:
        parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    flags = parser.add_argument_group("engine")
    add = flags.add_argument
    add("--model-path", metavar="MODEL", help="the model, as a flag")
    add(
        "--device",
        metavar="NAME",
        type=choice("auto", "cpu", "gpu", otherwise=VALUES["--device"]),
        help="auto, cpu or gpu (auto: a GPU if there is one)",
    )
    add(
        "--context",
        type=parsed(parse_count),
        metavar="TOKENS",
        help="longest sequence in tokens, as 32k (the model's, at most 32k and what the KV cache "
        "holds)",
    )
    add(
        "--vram",
        type=parsed(parse_size),
        metavar="SIZE",
        help="use this much VRAM, as 32G, CUDA context included (all that is free)",
    )
    add(
        "--ram",
        type=parsed(parse_size),
        metavar="SIZE",
        help="use this much host memory, as 64G (what the system reports as available)",
    )
    _format_flags(add)
    add(
        "--kv-cache-mb",
        type=integers(1) if many else integer(1),
        metavar="MIB",
        help="size of the KV cache in MiB (follows --context)"
        + ("; with a list, one run each" * many),
    )
    add("--max-num-seqs", type=integer(1), metavar="N", help="most sequences at once (4)")
    add(
        "--expert-slots",
        type=integer(1),
        metavar="N",
        help="most expert slots per layer (what fits)",
    )
    _switch(add, "--hcs", "enable_expert_cache", "cache frequently used experts in VRAM (on)")
    _switch(
        add,
        "--prefetch",
        "prefetch",
        "copy an expert that the next layer is predicted to "
        "need while the link is idle (on, from compute capability 9.0)",
    )
    _switch(
        add,
        "--wc-alloc",
        "write_combined",
        "allow write-combined host memory for experts (on; tools/dma_bandwidth.py measures)",
    )
    add(
        "--prefill-chunk",
        type=integer(1),
        metavar="TOKENS",
        help="most tokens of a prompt per pass over the layers; each missing expert crosses the "
        "link once per pass (10240; 8192 with all experts in VRAM; less on small GPUs)",
    )
    add(
        "--decode-gap-ms",
        type=integer(1),
        metavar="MS",
        help="longest time between two tokens of a running response while a prompt is read (100)",
    )
    add("--page-size", type=integer(1), metavar="TOKENS", help="tokens per KV page (64)")
    add(
        "--min-free-ram",
        type=parsed(parse_size),
        metavar="SIZE",
        help="stop when less host memory than this is available (0.5 %%, at least 512M)",
    )
    add("--replay-routing", metavar="FILE", help="replay this routing trace, for benchmarks (off)")
    add("--cache-dir", metavar="DIR", help="folder of packed models ($XDG_CACHE_HOME/osmium)")


def _format_flags(add: Any) -> None:
    """Add the formats of weights and of the KV cache."""
    matrix = ("bf16", "int8", "int4")

    def format_of(name: str, *known: str) -> dict[str, Any]:
        return {"type": choice(*known, otherwise=VALUES[name]), "metavar": "FORMAT"}

    bits = choice("16", "8", "4", otherwise=VALUES["--gpu-expert-bits"])
    add(
        "--gpu-expert-bits",
        type=lambda text: int(bits(text)),
        metavar="BITS",
        help="bits of a routed expert's weights: 16, 8 or 4 (4)",
    )
    add(
        "--attention-quant",
        **format_of("--attention-quant", *matrix),
        help="format of attention and delta net: bf16, int8 or int4 (bf16)",
    )
    add(
        "--shared-expert-quant",
        **format_of("--shared-expert-quant", "auto", *matrix),
        help="format of the shared expert: auto, bf16, int8 or int4 (auto: int8, bf16 beside "
        "16-bit experts)",
    )
    add(
        "--lm-head-quant",
        **format_of("--lm-head-quant", "auto", *matrix),
        help="format of the LM head, as for the shared expert (auto)",
    )
    add(
        "--kv-dtype",
        **format_of("--kv-dtype", "auto", "fp8_e4m3", "bf16", "f32"),
        help="format of the KV cache: auto, fp8_e4m3, bf16 or f32 (auto: fp8_e4m3 on a GPU, f32 on "
        "a CPU)",
    )


def _switch(add: Any, flag: str, dest: str, text: str) -> None:
    add(flag, dest=dest, action=argparse.BooleanOptionalAction, default=None, help=text)


def add_bench_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags of `osmium bench`; returns the group."""
    flags = parser.add_argument_group("bench")
    add = flags.add_argument
    add(
        "--depth",
        type=depths,
        metavar="TOKENS",
        help="context length of decode rows, as 1k,16k, or 90%% of the KV cache (1k)",
    )
    add(
        "--prompt-tokens",
        type=token_counts,
        metavar="TOKENS",
        help="prompt lengths of prefill rows, as 1k,4k; 0: none (512)",
    )
    add(
        "--turns",
        type=turns,
        metavar="TURNS",
        help="rows of new tokens behind a random state, as 32k+256; 0: none (0)",
    )
    add(
        "--prompt-beside",
        type=token_counts,
        metavar="TOKENS",
        help="prompt lengths of rows with a decode stream beside, as 20k; 0: none (0)",
    )
    add(
        "--parallel",
        type=integers(1),
        metavar="N",
        help="numbers of concurrent sequences, as 1,4 (1)",
    )
    add("--tokens", type=integer(2), metavar="N", help="generated tokens per measurement (256)")
    add(
        "--repeats",
        type=integer(1),
        metavar="N",
        help="measurements per row; the result is their median (3)",
    )
    add("--warm-up", type=integer(1), metavar="N", help="untimed warm-up tokens (256)")
    add(
        "--temperature",
        type=number(0, 100),
        metavar="T",
        help="above 0: sample with top-k 20, top-p .95 (0: greedy)",
    )
    add("--profile", action="store_true", help="then time one decoded token kernel by kernel")
    add("--filter", metavar="NAME", help="of `bench kernels`: operations whose name contains this")
    add("--compare", nargs=2, metavar="FILE", help="compare two result files instead")
    parser.set_defaults(**BENCH_DEFAULTS)
    return flags


def _tls_flags(add: Any) -> None:
    """Add the flags of HTTPS, with the names that uvicorn has."""
    add("--ssl-certfile", metavar="FILE", help="serve HTTPS with this PEM certificate (HTTP)")
    add("--ssl-keyfile", metavar="FILE", help="its key (in the file of the certificate)")
    add(
        "--ssl-keyfile-password-file",
        metavar="FILE",
        help="file with the password of an encrypted key (none)",
    )
    add(
        "--ssl-keyfile-password",
        metavar="TEXT",
        help="the password itself; other users may see it in `ps` at start (none)",
    )
    add(
        "--ssl-ca-certs",
        metavar="FILE",
        help="require certificates of clients that one of these CA certificates signed (none)",
    )


def add_server_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags of `osmium serve`; returns the group."""
    flags = parser.add_argument_group("server")
    add = flags.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (127.0.0.1)")
    add(
        "--port",
        type=integer(0, 65535),
        default=8012,
        metavar="PORT",
        help="port to listen on (8012; 0: any free port)",
    )
    add(
        "--api-key-file",
        metavar="FILE",
        help="require a key from clients, one of the lines of FILE (none)",
    )
    add(
        "--api-key",
        metavar="KEY",
        help="require this key; other users may see it in `ps` at start ($OSMIUM_API_KEY; none)",
    )
    _tls_flags(add)
    add(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name by which clients reach the server, as box.lan or *.lan; may be repeated "
        "(localhost and literal addresses)",
    )
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages that may use the server, as https://app.example, or * for all; may be "
        "repeated (those of this machine)",
    )
    add(
        "--max-body-mb",
        type=integer(1, 1024),
        default=16,
        metavar="MIB",
        help="largest body of a request in MiB (16)",
    )
    add(
        "--max-connections",
        type=integer(1),
        default=512,
        metavar="N",
        help="most open connections; further ones get 503 (512)",
    )
    add(
        "--max-queued-requests",
        type=integer(1),
        default=256,
        metavar="N",
        help="most requests that wait for others; further ones get 429 (256)",
    )
    add(
        "--log-requests",
        action="count",
        default=0,
        help="a line per request on stderr: method, path, status, tokens, time; twice: bodies, too",
    )
    add("--served-model-name", metavar="NAME", help="model id in responses (the model's name)")
    add("--benchmark", action="store_true", help="run `osmium bench` after loading, then serve")
    add("--benchmark-only", action="store_true", help="run `osmium bench` after loading, then exit")
    return flags


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the sampling flags."""
    flags = parser.add_argument_group("sampling (defaults: the model's own)")
    add = flags.add_argument
    add(
        "--temperature",
        type=number(0, 100),
        metavar="T",
        help="0 always takes the most likely token",
    )
    add(
        "--top-p",
        type=number(0, 1, above=True),
        metavar="P",
        help="keep the most likely tokens up to this probability",
    )
    add("--top-k", type=integer(0), metavar="N", help="keep this many most likely tokens (0: all)")
    add("--seed", type=integer(0), metavar="N", help="the same seed gives the same text")
    add(
        "--max-tokens",
        type=integer(1),
        metavar="N",
        help="stop after this many tokens (the context)",
    )
    _switch(add, "--think", "think", "enable or disable thinking (the template's default)")


def add_timing_flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add --timing."""
    parser.add_argument(
        "--timing",
        action="store_true",
        help="print tok/s, hit rate, MB per token and times of each response on stderr (off)",
    )


_NAMES = (
    "device", "gpu_expert_bits", "attention_quant", "shared_expert_quant", "lm_head_quant",
    "kv_dtype", "kv_cache_mb", "context", "vram", "ram", "min_free_ram", "expert_slots",
    "enable_expert_cache", "prefetch", "write_combined", "prefill_chunk", "decode_gap_ms",
    "page_size", "max_num_seqs", "replay_routing", "cache_dir",
)  # fmt: skip


def engine_options(args: argparse.Namespace) -> tuple[str | None, dict[str, Any]]:
    """The model and the given options; other options keep EngineConfig's defaults.

    Raises: ConfigError if MODEL and --model-path differ.
    """
    if args.model and args.model_path and args.model != args.model_path:
        raise ConfigError(
            f"The model is given twice: {args.model} and --model-path {args.model_path}; keep one."
        )
    given = {name: getattr(args, name) for name in _NAMES if getattr(args, name) is not None}
    return args.model or args.model_path, given
