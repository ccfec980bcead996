"""The command line's flags: one list, from which EngineConfig's options are read.

Knows argparse and the options; knows nothing of what the commands do with them.
"""

import argparse
from typing import Any

from osmium.config import parse_count, parse_size
from osmium.errors import ConfigError

__all__ = ["BENCH", "add_bench_flags", "add_engine_flags", "add_server_flags", "engine_options"]

BENCH: dict[str, Any] = {
    "depth": "1k", "tokens": 256, "repeats": 3, "warm_up": 256, "parallel": (1,),
    "temperature": 0.0, "prompt_tokens": (512,), "profile": False, "compare": None, "only": None,
}  # fmt: skip
"""What `osmium bench` measures if it is not told otherwise, and `--benchmark` of the server."""


def _parsed(parse: Any) -> Any:
    """A parser of ours as argparse wants it: its complaint becomes argparse's."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _integers(text: str) -> tuple[int, ...]:
    """ "1,4" as (1, 4); "0" as ()."""
    return tuple(int(one) for one in text.split(",") if int(one))


def add_engine_flags(parser: argparse.ArgumentParser, many: bool = False) -> None:
    """Every option of EngineConfig, and the model to load; with `many` some take lists."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a checkpoint folder, a packed file, a hub id, or synthetic:NAME[:LAYERS], made up in "
        "the shape of qwen3.5-35b-a3b, -122b-a10b or -397b-a17b; the bundled demo model if absent",
    )
    parser.add_argument("--model-path", metavar="MODEL", help="the same, as a flag")
    flags = parser.add_argument_group("engine")
    matrix = ("bf16", "int8", "int4")
    add = flags.add_argument
    add("--device", choices=("auto", "cpu", "gpu"), help="where to compute (auto: a GPU if any)")
    add(
        "--gpu-expert-bits",
        type=int,
        choices=(16, 8, 4),
        help="bits of a routed expert's weights (4)",
    )
    add("--attention-quant", choices=matrix, help="format of attention and delta-net (bf16)")
    add("--shared-expert-quant", choices=("auto", *matrix), help="shared expert (auto: int8)")
    add("--lm-head-quant", choices=("auto", *matrix), help="format of the head (auto: int8)")
    kept = ("auto", "fp8_e4m3", "bf16", "f32")
    add("--kv-dtype", choices=kept, help="KV (auto: GPU fp8_e4m3, CPU f32; f32 is for CPUs)")
    add(
        "--kv-cache-mb",
        type=_integers if many else int,
        metavar="MIB",
        help="memory for KV in MiB (from --context)" + ("; a list runs once each" * many),
    )
    add(
        "--context",
        type=_parsed(parse_count),
        metavar="TOKENS",
        help="most tokens of a sequence, as 32k (the model's, up to 32k and to what KV holds)",
    )
    add(
        "--vram",
        type=_parsed(parse_size),
        metavar="SIZE",
        help="plan for this much VRAM, as 32G, the CUDA context included (what is free)",
    )
    add(
        "--ram",
        type=_parsed(parse_size),
        metavar="SIZE",
        help="plan for this much host memory, as 64G (what the system reports)",
    )
    add(
        "--ram-floor",
        type=_parsed(parse_size),
        metavar="SIZE",
        help="stop when less host memory than this is left (0.5 %%, at least 512M)",
    )
    add("--slots", type=int, metavar="N", help="most expert slots a layer (what fits)")
    add(
        "--hcs",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep hot experts in VRAM (on)",
    )
    add(
        "--prefetch",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="fetch an expert that the next layer may need while the link idles (on, from compute "
        "capability 9.0)",
    )
    add(
        "--wc-alloc",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="write-combined host memory for experts (on; tools/dma_bandwidth.py measures)",
    )
    add("--chunk", type=int, metavar="TOKENS", help="most tokens of a prefill step (512)")
    add("--page", type=int, metavar="TOKENS", help="tokens a page of KV (64)")
    add("--sequences", type=int, metavar="N", help="most requests held at once (4)")
    add("--routing", metavar="FILE", help="replay this routing trace (benchmarks; none)")
    add("--cache-dir", metavar="DIR", help="where packed files go ($XDG_CACHE_HOME/osmium)")


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    """What to measure."""
    flags = parser.add_argument_group("bench")
    add = flags.add_argument
    add("--depth", help="tokens of context, as 1k,16k or 90%% of the KV (1k)")
    add("--tokens", type=int, help="tokens of a reply (256)")
    add("--repeats", type=int, help="medians of this many (3)")
    add("--warm-up", type=int, help="tokens before that do not count (256)")
    add("--parallel", type=_integers, help="sequences at once, as 1,4 (1)")
    add("--temperature", type=float, help="of a reply, with top-k 20, top-p .95 (0: greedy)")
    add("--prompt-tokens", type=_integers, help="tokens of prefill; 0: none (512)")
    add("--profile", action="store_true", help="then time a token kernel by kernel")
    add("--only", metavar="NAME", help="of `bench kernels`: operations whose name holds this")
    add("--compare", nargs=2, metavar="FILE", help="compare two results instead")
    parser.set_defaults(**BENCH)


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Where and how the server listens."""
    flags = parser.add_argument_group("server")
    add = flags.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=int, default=8012, help="port to listen on (8012)")
    add("--api-key", metavar="KEY", help="ask clients for this key ($OSMIUM_API_KEY; none)")
    add("--cors-origin", default="*", metavar="ORIGIN", help="origin that browsers may use (*)")
    add("--served-name", metavar="NAME", help="model id to answer with (the model's name)")
    add(
        "--benchmark",
        action="store_true",
        help="print `osmium bench` for this model, then exit",
    )


_NAMES = (
    "device", "gpu_expert_bits", "attention_quant", "shared_expert_quant", "lm_head_quant",
    "kv_dtype", "kv_cache_mb", "context", "vram", "ram", "ram_floor", "slots", "hcs", "prefetch",
    "wc_alloc", "chunk", "page", "sequences", "routing", "cache_dir",
)  # fmt: skip


def engine_options(args: argparse.Namespace) -> tuple[str | None, dict[str, Any]]:
    """The model and the options that were given; what was not given keeps EngineConfig's default.

    Raises: ConfigError if the model is named twice, differently.
    """
    if args.model and args.model_path and args.model != args.model_path:
        raise ConfigError(
            f"The model is given twice: {args.model} and --model-path {args.model_path}; keep one."
        )
    given = {name: getattr(args, name) for name in _NAMES if getattr(args, name) is not None}
    return args.model or args.model_path, given
