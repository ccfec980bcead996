"""The text of a plan's report: one screen, at most forty lines of at most WIDTH columns."""

import textwrap
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from osmium.engine.prefill_estimate import reading_speed_text, reading_vram_text
from osmium.engine.speed_estimate import ERROR, MEASURED, STANDARD_CONTEXT
from osmium.planning.report import DISK_GB_S, PlanReport
from osmium.weights.disk import free_text, gb

__all__ = ["report_text"]

GIB = 1 << 30

WIDTH = 96

INDENT = 11

LINKS = ((100e6, "100 Mbit/s"), (1e9, "1 Gbit/s"))
"""Bits per second for which the report gives a download's time."""

MIN_FREE_FRACTION = 0.12
"""Fraction of host memory that should stay free for other programs."""


def report_text(report: PlanReport) -> str:
    """The report of `osmium plan`."""
    parts = [
        _fit(report), _files(report), _memory(report), _changes(report), _assumed(report),
    ]  # fmt: skip
    lines = [_title(report)]
    for part in map(list, parts):
        if part:
            lines += ["", *part]
    return "\n".join(line.rstrip() for line in lines)


def _title(report: PlanReport) -> str:
    hardware = report.hardware
    ram = report.config.ram or hardware.ram_total
    return f"{report.model.name} on {hardware.name}, {ram / GIB:.1f} GiB of host memory"


def _entry(label: str, text: str) -> list[str]:
    """A label, and a text wrapped in the columns after it."""
    wrapped = textwrap.wrap(text, WIDTH - INDENT, break_on_hyphens=False) or [""]
    return [f"{label:{INDENT}}{wrapped[0]}", *(" " * INDENT + line for line in wrapped[1:])]


# -- memory fit and speed --------------------------------------------------------------------------


def _fit(report: PlanReport) -> Iterator[str]:
    plan = report.plan
    if plan is None:
        assert report.misfit is not None
        yield from _entry("runs", f"no. {report.misfit}")
        return
    if plan.device == "cpu":
        yield from _entry("runs", "yes, on the CPU with NumPy: for tests, not for speed")
    elif plan.expected_tokens_per_s is None:
        yield from _entry("runs", "yes; the speed is not known, as the GPU was not measured")
    else:
        yield from _entry("runs", _speed(report))
    longest = f"at most {report.max_context:,} fit"
    if report.max_context_tokens_per_s is not None:
        longest += f", with all of them in use about {report.max_context_tokens_per_s:.0f} tok/s"
    yield from _entry(
        "context", f"{plan.context:,} tokens per sequence, KV cache in {plan.kv_dtype}; {longest}"
    )
    if plan.vram:
        yield from _entry("experts", f"{_experts(report)}; {reading_vram_text(plan)}")
        yield from _entry("limit", _limit(report))
        if plan.prefill is not None:
            yield from _entry("reading", reading_speed_text(plan))


def _speed(report: PlanReport) -> str:
    plan = report.plan
    assert plan is not None and plan.expected_tokens_per_s is not None
    full = plan.tokens_per_s_at(plan.context)
    text = f"yes: about {plan.expected_tokens_per_s:.0f} tok/s of one sequence at "
    text += f"{STANDARD_CONTEXT:,} tokens of context"
    if plan.context > 2 * STANDARD_CONTEXT and full is not None:
        text += f", {full:.0f} at {plan.context:,}"
    gpus = " and ".join(MEASURED)
    if any(name in report.hardware.name for name in MEASURED):
        return f"{text} (an estimate, within {ERROR:.0%} of what was measured on {gpus})"
    return f"{text} (an estimate: within {ERROR:.0%} on {gpus}, not measured on this GPU)"


def _experts(report: PlanReport) -> str:
    plan = report.plan
    assert plan is not None
    if plan.resident:
        return f"all {plan.num_experts} per layer fit in VRAM; host memory holds none"
    text = (
        f"{plan.expert_slots} of {plan.num_experts} per layer fit in VRAM, all are in host memory; "
    )
    text += f"expected hit rate {plan.hit_rate:.2f}"
    time = plan.token_time()
    if time is not None:
        missed = (1 - plan.hit_rate) * plan.token_cost.expert_bytes / 1e6
        text += f", {missed:.0f} MB per token over the link"
    return text


def _limit(report: PlanReport) -> str:
    plan = report.plan
    assert plan is not None
    time = plan.token_time()
    sentences = []
    if time is not None:
        parts = {
            "link": f"the link, at {plan.link_gb_s:.0f} GB/s",
            "vram": f"the rate of VRAM, {plan.token_cost.memory_gb_s:.0f} GB/s",
            "overhead": "the starts and ends of kernels (overhead)",
        }
        text = f"{parts[report.binds]}. A token takes {time.total_ms:.1f} ms: "
        text += f"VRAM {time.vram_ms:.1f}, kernel overhead {time.overhead_ms:.1f}"
        if time.link_ms:
            text += f", link {time.link_ms:.1f}, of which {time.overlap_ms:.1f} overlap"
        sentences.append(text)
    left = plan.ram_limit - sum(plan.ram.values())
    total = report.config.ram or report.hardware.ram_total
    if report.config.ram is not None and left < MIN_FREE_FRACTION * total:
        sentences.append(f"Host memory is tight: {left / GIB:.1f} GiB are left")
    return ". ".join(sentences)


# -- files -----------------------------------------------------------------------------------------


def _files(report: PlanReport) -> Iterator[str]:
    model = report.model
    if model.kind == "synthetic":
        yield from _entry("files", "none: random weights are generated at load")
        return
    assert model.packed_path is not None
    folder = _short(model.packed_path.parent)
    if model.is_packed:
        yield from _entry(
            "files", f"packed already: {gb(model.packed_bytes)}, {_short(model.packed_path)}"
        )
    else:
        nbytes = model.download_bytes
        if nbytes is None:
            yield from _entry("download", "of unknown size: the hub cannot be reached")
        elif nbytes and model.download_to is not None:
            times = ", ".join(f"{_time(8 * nbytes / rate)} at {name}" for rate, name in LINKS)
            yield from _entry("download", f"{gb(nbytes)} to {_short(model.download_to)}: {times}")
        pack = f"once, {gb(model.packed_bytes)} into {folder}: about {_time(report.pack_s)}"
        yield from _entry("pack", f"{pack} (with a disk of {DISK_GB_S:.0f} GB/s)")
        yield from _entry("disk", _disk(report))
    yield from _entry("load", f"about {_time(report.load_s)} (with a disk of {DISK_GB_S:.0f} GB/s)")


def _disk(report: PlanReport) -> str:
    needs = report.model.disk_needs
    text = f"{gb(sum(need.nbytes for need in needs))} in all, {free_text(needs)} free"
    if not report.disk_fits:
        text += ": too little; " + " and ".join(need.setting for need in needs)
        text += " choose other disks" if len(needs) > 1 else " chooses another disk"
    if report.model.download_bytes:
        text += ". The download may be deleted once it is packed"
    return text


def _short(path: Path) -> str:
    """A path with ~ for the home folder."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# -- memory ----------------------------------------------------------------------------------------


def _memory(report: PlanReport) -> Iterator[str]:
    plan = report.plan
    if plan is None:
        return
    columns = []
    for name, parts, limit in (
        ("VRAM", plan.vram, plan.vram_limit), ("host memory", plan.ram, plan.ram_limit),
    ):  # fmt: skip
        if parts:
            rows = [f"{name:24}{'GiB':>6}"]
            rows += [f"  {what:22}{size / GIB:6.2f}" for what, size in parts.items()]
            total = sum(parts.values())
            columns.append([*rows, f"  {'in all':22}{total / GIB:6.2f} of {limit / GIB:.2f}"])
    for row in zip_longest(*columns, fillvalue=""):
        yield "      ".join(f"{cell:42}" for cell in row)


# -- changes ---------------------------------------------------------------------------------------


def _changes(report: PlanReport) -> Iterator[str]:
    plan = report.plan
    if not report.changes:
        if plan is None:
            yield "nothing runs here, with any option"
        return
    title = "what would run" if plan is None else "what would change"
    yield f"{title:73}{'slots':>6}{'hit rate':>9}{'tok/s':>7}"
    if plan is not None:
        yield _row("as planned", plan.expert_slots, plan.hit_rate, plan.expected_tokens_per_s)
    for change in report.changes:
        yield _row(change.name, change.expert_slots, change.hit_rate, change.tokens_per_s)
    if any(change.name.startswith("--") and "int" in change.name for change in report.changes):
        yield "Smaller formats cost some accuracy; `osmium perplexity` measures it."


def _row(name: str, slots: int, hit_rate: float, speed: float | None) -> str:
    return f"  {name:71}{slots:6}{hit_rate:9.2f}" + ("" if speed is None else f"{speed:7.0f}")


def _assumed(report: PlanReport) -> Iterator[str]:
    if report.assumptions:
        yield from _entry("assumed", "; ".join(report.assumptions))
