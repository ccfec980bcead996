"""Sizes from users: a unit is required, so that 64 never means 64 bytes."""

from typing import Any

import pytest

from osmium.cli import main
from osmium.config import EngineConfig, parse_count, parse_size
from osmium.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("18G", 18 << 30), ("18g", 18 << 30), ("18GB", 18 << 30), ("18 GiB", 18 << 30),
        ("18Gi", 18 << 30), ("512M", 512 << 20), ("1.5T", 3 << 39), ("64K", 64 << 10),
        ("4096B", 4096), ("4096b", 4096),
    ],
)  # fmt: skip
def test_a_size_is_a_number_and_a_binary_unit(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    ("text", "hint"),
    [("64", "write 64G"), ("32", "write 32G"), ("1.5", "write 1.5G"), ("68719476736", "32G")],
)
def test_a_size_without_a_unit_is_refused_with_a_suggestion(text: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_size(text)
    assert repr(text) in str(refused.value) and hint in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "G", "much", "-3G", "0G", "nanG", "infG", "1e999G", "3X", "B"]
)
def test_a_malformed_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


def test_tokens_need_no_unit() -> None:
    assert [parse_count(text) for text in ("32", "32k", "32768")] == [32, 32768, 32768]
    for text in ("", "k", "-3", "many", "nan", "32q"):
        with pytest.raises(ConfigError, match="is not a number of tokens"):
            parse_count(text)


@pytest.mark.parametrize("flag", ["--vram", "--ram", "--min-free-ram"])
def test_every_size_flag_refuses_a_bare_number(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--device", "cpu", flag, "64"]) == 2
    assert "write 64G" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vram", "ram", "min_free_ram"])
def test_the_api_refuses_byte_counts_too_small_for_memory(name: str) -> None:
    small: dict[str, Any] = {name: 64}
    with pytest.raises(ConfigError, match=r"is 64 bytes.*64G.*64 << 30"):
        EngineConfig(**small)
    enough: dict[str, Any] = {name: 1 << 20}
    EngineConfig(**enough)
