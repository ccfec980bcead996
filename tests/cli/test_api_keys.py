"""API keys: where they come from, and that `ps` does not show them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from osmium.cli.api_keys import api_keys
from osmium.errors import ConfigError


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OSMIUM_API_KEY", raising=False)


def test_a_key_comes_from_the_file_the_flag_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("\ufeffone\r\n\n  two  \n# three\n  #four\n")
    assert api_keys(None, None) == []
    assert api_keys("flag", None) == ["flag"]
    assert api_keys(None, str(file)) == ["one", "two"]
    for flag, given, wanted in (
        (None, None, ["env"]), ("flag", None, ["flag"]), (None, str(file), ["one", "two"]),
    ):  # fmt: skip
        monkeypatch.setenv("OSMIUM_API_KEY", "env")
        assert api_keys(flag, given) == wanted
        assert "OSMIUM_API_KEY" not in os.environ, "child processes do not get it"
    monkeypatch.setenv("OSMIUM_API_KEY", "")
    assert api_keys(None, None) == []


@pytest.mark.parametrize(
    "content", [None, b"", b"\n \n", b"# s3cret\n", b"\xff\xfe", b"s3\x00cret", b"s3cret\x01"]
)
def test_a_file_without_a_usable_key_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        api_keys(None, str(file))
    assert "s3" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        api_keys(None, str(tmp_path))


@pytest.mark.parametrize("key", ["", "  ", "a\nb"])
def test_an_empty_flag_is_refused_instead_of_serving_without_a_key(key: str) -> None:
    with pytest.raises(ConfigError):
        api_keys(key, None)


def test_a_flag_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--api-key-file") as caught:
        api_keys("s3cret", str(tmp_path))
    assert "s3cret" not in str(caught.value)


SCRIPT = """
import sys
from osmium.cli.api_keys import api_keys
print(api_keys(sys.argv[1].removeprefix("--api-key="), None), flush=True)
print(sys.argv[2:], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("form", ["s3cret", "--api-key=s3cret"])
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux's /proc")
def test_arguments_and_environment_of_the_process_do_not_show_the_key(form: str) -> None:
    """Other users read both with `ps eww`."""
    command = [sys.executable, "-c", SCRIPT, form, "s3crets", "s3cret"]
    environment = {**os.environ, "OSMIUM_API_KEY": "env-s3cret", "OTHER": "kept"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "['s3cret']\n"
        assert process.stdout.readline() == "['s3crets', 's3cret']\n"
        folder = Path(f"/proc/{process.pid}")
        arguments = (folder / "cmdline").read_bytes().split(b"\0")
        variables = (folder / "environ").read_bytes().split(b"\0")
        process.communicate("")
    assert arguments[3:6] == [form.replace("s3cret", "******").encode(), b"s3crets", b"******"]
    assert b"OSMIUM_API_KEY=**********" in variables
    assert b"OTHER=kept" in variables
