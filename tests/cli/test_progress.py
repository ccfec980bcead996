"""Progress output: units, one line per tenth, and no output for short stages."""

import time

import pytest

from osmium.cli import progress
from osmium.cli.progress import amount, byte_amount, progress_bar, stopped_stage


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (("packing", 1_200_000_000, 63_000_000_000), "1.2 of 63.0 GB"),
        (("download x.safetensors", 5_000_000, 9_000_000), "5.0 of 9.0 MB"),
        (("prompt", 1024, 6000), "1,024 of 6,000 tokens"),
        (("experts", 12, 48), "12 of 48 layers"),
        (("weights", 3, 700), "3 of 700 parts"),
        (("thinking", 1500, 0), "1,500 tokens"),
        (("another thing", 3, 4), "3 of 4"),
    ],
)
def test_each_stage_has_its_own_unit(report: tuple[str, int, int], text: str) -> None:
    assert amount(*report) == text


def test_bytes_are_shown_in_the_largest_unit_that_fits() -> None:
    assert [byte_amount(n) for n in (900, 22_000_000, 3 * 10**9)] == ["0.9 kB", "22.0 MB", "3.0 GB"]


def test_a_short_stage_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as report:
        for done in range(101):
            report("packing", done, 100)
    assert capsys.readouterr().err == ""


def test_without_a_terminal_there_is_one_line_per_tenth(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", 0.0)
    with progress_bar() as report:
        for done in range(1001):
            report("prompt", done, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[5] == "prompt: 50 % (500 of 1,000 tokens)"


def test_a_silent_stage_is_shown_after_the_delay(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", 0.05)
    with progress_bar() as report:
        report("packing", 0, 1000)
        report("waiting for process 7", 0, 0)
        deadline = time.monotonic() + 5
        shown = ""
        while not shown and time.monotonic() < deadline:
            time.sleep(0.01)
            shown = capsys.readouterr().err
    assert shown == "waiting for process 7\n"


def test_the_interrupted_stage_is_available_afterwards() -> None:
    with pytest.raises(KeyboardInterrupt), progress_bar() as report:
        report("packing", 3, 7)
        raise KeyboardInterrupt
    assert stopped_stage() == ("packing", 3, 7)
