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
    "temperature": 0.0, "prompt_tokens": (512,), "profile": False, "compare": None, "filter": None,
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
        help="a checkpoint folder, a packed file, a hub id, or synthetic:NAME[:LAYERS]: random "
        "weights in the shape of qwen3.5-35b-a3b, -122b-a10b or -397b-a17b (the bundled demo)",
    )
    parser.add_argument("--model-path", metavar="MODEL", help="the same, as a flag")
    flags = parser.add_argument_group("engine")
    matrix = ("bf16", "int8", "int4")
    add = flags.add_argument
    add("--device", choices=("auto", "cpu", "gpu"), help="compute on this device (a GPU if any)")
    add(
        "--gpu-expert-bits",
        type=int,
        choices=(16, 8, 4),
        help="bits of a routed expert's weights (4)",
    )
    add("--attention-quant", choices=matrix, help="format of attention and delta net (bf16)")
    add("--shared-expert-quant", choices=("auto", *matrix), help="of the shared expert (int8)")
    add("--lm-head-quant", choices=("auto", *matrix), help="format of the LM head (int8)")
    kept = ("auto", "fp8_e4m3", "bf16", "f32")
    add("--kv-dtype", choices=kept, help="format of the KV cache (GPU: fp8_e4m3, CPU: f32)")
    add(
        "--kv-cache-mb",
        type=_integers if many else int,
        metavar="MIB",
        help="size of the KV cache in MiB (follows --context)"
        + ("; with a list, one run each" * many),
    )
    add(
        "--context",
        type=_parsed(parse_count),
        metavar="TOKENS",
        help="longest sequence in tokens, as 32k (the model's, at most 32k and what the KV cache "
        "holds)",
    )
    add(
        "--vram",
        type=_parsed(parse_size),
        metavar="SIZE",
        help="use this much VRAM, as 32G, CUDA context included (all that is free)",
    )
    add(
        "--ram",
        type=_parsed(parse_size),
        metavar="SIZE",
        help="use this much host memory, as 64G (what the system reports as available)",
    )
    add(
        "--min-free-ram",
        type=_parsed(parse_size),
        metavar="SIZE",
        help="stop when less host memory than this is available (0.5 %%, at least 512M)",
    )
    add("--expert-slots", type=int, metavar="N", help="most expert slots per layer (what fits)")
    add(
        "--hcs",
        dest="enable_expert_cache",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="cache frequently used experts in VRAM (on)",
    )
    add(
        "--prefetch",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="copy an expert that the next layer is predicted to need while the link is idle (on, "
        "from compute capability 9.0)",
    )
    add(
        "--wc-alloc",
        dest="write_combined",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="allow write-combined host memory for experts (on; tools/dma_bandwidth.py measures)",
    )
    add("--prefill-chunk", type=int, metavar="TOKENS", help="most tokens per prefill step (512)")
    add("--page-size", type=int, metavar="TOKENS", help="tokens per KV page (64)")
    add("--max-num-seqs", type=int, metavar="N", help="most sequences at once (4)")
    add("--replay-routing", metavar="FILE", help="replay this routing trace, for benchmarks (off)")
    add("--cache-dir", metavar="DIR", help="folder of packed models ($XDG_CACHE_HOME/osmium)")


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    """What to measure."""
    flags = parser.add_argument_group("bench")
    add = flags.add_argument
    add("--depth", help="context length of decode rows, as 1k,16k, or 90%% of the KV cache (1k)")
    add("--tokens", type=int, help="generated tokens per measurement (256)")
    add("--repeats", type=int, help="measurements per row, of which the median counts (3)")
    add("--warm-up", type=int, help="untimed warm-up tokens (256)")
    add("--parallel", type=_integers, help="numbers of concurrent sequences, as 1,4 (1)")
    add("--temperature", type=float, help="above 0: sample with top-k 20, top-p .95 (0: greedy)")
    add("--prompt-tokens", type=_integers, help="prompt lengths of prefill rows; 0: none (512)")
    add("--profile", action="store_true", help="then time one decoded token kernel by kernel")
    add("--filter", metavar="NAME", help="of `bench kernels`: operations whose name contains this")
    add("--compare", nargs=2, metavar="FILE", help="compare two result files instead")
    parser.set_defaults(**BENCH)


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Where and how the server listens."""
    flags = parser.add_argument_group("server")
    add = flags.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=int, default=8012, help="port to listen on (8012)")
    add("--api-key", metavar="KEY", help="require this key from clients ($OSMIUM_API_KEY; none)")
    add("--cors-origin", default="*", metavar="ORIGIN", help="origin allowed in browsers (*)")
    add("--served-model-name", metavar="NAME", help="model id in responses (the model's name)")
    add(
        "--benchmark",
        action="store_true",
        help="print `osmium bench` for this model, then exit",
    )


_NAMES = (
    "device", "gpu_expert_bits", "attention_quant", "shared_expert_quant", "lm_head_quant",
    "kv_dtype", "kv_cache_mb", "context", "vram", "ram", "min_free_ram", "expert_slots",
    "enable_expert_cache", "prefetch", "write_combined", "prefill_chunk", "page_size",
    "max_num_seqs", "replay_routing", "cache_dir",
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
