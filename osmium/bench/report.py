"""Text of `osmium bench`: the table of one document, and the comparison of two."""

from typing import Any

__all__ = ["compare", "header", "notes", "row_line", "summary"]

_COLUMNS = {
    "decode": f"{'':8}{'depth':>8}{'seqs':>9}{'tok/s':>10}{'ms':>9}{'hit':>7}{'cold':>7}{'warm':>7}"
    f"{'MB/token':>10}{'prefetched':>12}{'link':>7}{'roofline':>10}",
    "prefill": f"{'':8}{'cached':>8}{'tokens':>9}{'tok/s':>10}{'ms':>9}{'hit':>7}{'GB':>9}"
    f"{'GB/s':>7}{'link':>7}{'TFLOP/s':>9}{'mma':>7}{'floor ms':>10}{'floor':>7}{'fresh':>7}",
    "beside": f"{'':16}{'tokens':>9}{'tok/s':>10}{'ms':>9}{'hit':>7}{'stream':>9}{'during':>9}"
    f"{'gap ms':>9}{'64 ms':>9}{'fresh':>7}",
}


def header(row: dict[str, Any]) -> str:
    """The header of row_line's columns."""
    return _COLUMNS["prefill" if row["what"] == "turn" else row["what"]]


def row_line(row: dict[str, Any]) -> str:
    """The text of one row of a document."""
    if row["what"] == "decode":
        return (
            f"decode  {row['depth']:8}{row['sequences']:9}{row['tokens_per_s']:10.1f}"
            f"{row['ms_per_token']:9.3f}{row['hit_rate']:7.3f}"
            f"{row['hit_rate_cold_64']:7.3f}{row['hit_rate_warm_64']:7.3f}"
            f"{row['mb_fetched_per_token']:10.1f}{row['mb_prefetched_per_token']:12.1f}"
            f"{row['link_utilization']:7.2f}"
            f"{row['roofline_fraction']:10.2f}"
        )
    speed = (
        f"{row['tokens']:9}{row['tokens_per_s']:10.1f}{row['ttft_ms']:9.1f}{row['hit_rate']:7.3f}"
    )
    fresh = row["trace_fresh"]
    last = f"{'-':>7}" if fresh is None else f"{fresh:7.2f}"
    if row["what"] == "beside":
        return (
            f"{'beside':16}{speed}{row['stream_before']:9.1f}{row['stream_during']:9.1f}"
            f"{row['longest_gap_ms']:9.1f}{row['short_ms']:9.1f}{last}"
        )
    return (
        f"{row['what']:8}{row.get('context', 0):8}{speed}{row['mb_fetched'] / 1e3:9.2f}"
        f"{row['link_gb_s']:7.1f}{row['link_utilization']:7.2f}{row['tflops']:9.1f}"
        f"{row['mma_utilization']:7.2f}{row['floor_ms']:10.1f}{row['floor_fraction']:7.2f}{last}"
    )


def notes(rows: list[dict[str, Any]], trace_tokens: int, taken: int) -> list[str]:
    """What limits the meaning of the rows: a trace of fewer tokens than the prompts have taken."""
    if all(row.get("trace_fresh") in (None, 1.0) for row in rows):
        return []
    return [
        f"The trace has {trace_tokens} tokens; the prompts take {taken}. Where fresh is below 1, a "
        "prompt replays tokens of earlier prompts, so its experts are more often in slots. "
        f"Make a longer trace: tools/make_trace.py OUT.npz --tokens {taken}"
    ]


def summary(document: dict[str, Any]) -> str:
    """Model, device, cache size and measured rates of a document."""
    rates, (slots, experts) = document["rates"], document["expert_slots"]
    lines = [
        f"{document['model']} on {document['device']} (driver {document['driver']}, "
        f"CUDA {document['cuda']}), commit {document['commit']}, {document['date']}",
        f"{slots} of {experts} experts per layer cached, KV {document['kv_dtype']}"
        + (f", {document['kv_cache_mb']} MiB" if document.get("kv_cache_mb") else ""),
    ]
    if rates["memory_gb_s"]:
        lines.append(
            f"link {rates['link_gb_s']:.1f} GB/s ({document['host_memory']}), VRAM "
            f"{rates['memory_gb_s']:.0f} GB/s; "
            f"{document['slots_verified']} slots verified"
        )
    if rates.get("mma_s8_tops"):
        lines.append(
            f"copy engine {rates['copy_gb_s']:.1f} GB/s, mma s8 {rates['mma_s8_tops']:.0f} TOPS, "
            f"bf16 {rates['mma_bf16_tflops']:.0f} TFLOP/s"
        )
    lines.extend(document.get("notes", ()))
    return "\n".join(lines)


def compare(first: Any, second: Any) -> str:
    """Rows of both documents side by side, and the ratio of their speeds."""
    lines = [f"{'':30}{'first':>10}{'second':>10}{'ratio':>8}"]
    before, after = _speeds(first), _speeds(second)
    for key, speed in before.items():
        if key in after:
            name = " ".join(str(part) for part in key if part is not None)
            lines.append(f"{name:30}{speed:10.1f}{after[key]:10.1f}{after[key] / speed:8.3f}")
    for key in before.keys() ^ after.keys():
        lines.append(f"{' '.join(str(part) for part in key if part is not None):30}  in one only")
    return "\n".join(lines)


def _speeds(documents: Any) -> dict[tuple[Any, ...], float]:
    """tok/s by KV budget, phase, size and temperature; calls/s for rows of `bench kernels`."""
    speeds: dict[tuple[Any, ...], float] = {}
    for document in documents if isinstance(documents, list) else [documents]:
        for row in document["rows"]:
            if "op" in row:
                speeds[row["model"], row["sequences"], row["op"]] = 1e6 / row["us"]
                continue
            size = row.get("depth", row["tokens"]), row.get("sequences", row.get("context"))
            temperature = f"at {row['temperature']}" if row.get("temperature") else None
            key = document.get("kv_cache_mb"), row["what"], *size, temperature
            speeds[key] = row["tokens_per_s"]
    return speeds
