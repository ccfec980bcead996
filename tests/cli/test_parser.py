"""Argument parsing: order of words, suggestions, errors and help."""

import re
import shlex
import subprocess
import sys

import pytest

from osmium.cli import legacy, main
from osmium.cli.catalog import COMMANDS
from osmium.cli.flags import _NAMES
from osmium.cli.parser import Help, Usage, parse
from osmium.config import EngineConfig


def error_of(*argv: str) -> str:
    """The error line for a refused command line."""
    with pytest.raises(Usage) as error:
        parse(argv)
    text = str(error.value)
    assert "\n" not in text and text.startswith("osmium")
    return text


def help_of(*argv: str) -> str:
    with pytest.raises(Help) as text:
        parse(argv)
    return str(text.value)


@pytest.mark.parametrize(
    "argv",
    [
        "run M hi --device cpu --top-k 3",
        "run M --device cpu hi --top-k 3",
        "run --device cpu M --top-k 3 hi",
        "run --device=cpu --top-k=3 -- M hi",
        "run M --device cpu --top-k 3 -- hi",
    ],
)
def test_words_may_come_before_between_and_after_flags(argv: str) -> None:
    _, args = parse(argv.split())
    assert (args.model, args.prompt, args.device, args.top_k) == ("M", "hi", "cpu", 3)


def test_a_prompt_may_begin_with_a_dash() -> None:
    for argv in (["run", "demo", "-5 + 3 ="], ["run", "demo", "--", "-x"], ["run", "demo", "-7"]):
        assert parse(argv)[1].prompt == argv[-1]
    assert parse(["run", "demo", "-"])[1].prompt == "-"


def test_with_model_path_the_first_word_is_the_prompt() -> None:
    _, args = parse(["run", "--model-path", "M", "hi"])
    assert (args.model, args.model_path, args.prompt) == (None, "M", "hi")


def test_an_unquoted_prompt_is_refused_with_the_quoted_command() -> None:
    assert 'osmium run demo "why is the sky blue"' in error_of(
        "run", "demo", "why", "is", "the", "sky", "blue"
    )
    assert "'b'" in error_of("serve", "a", "b")


@pytest.mark.parametrize(
    ("argv", "suggested"),
    [
        ("sreve", "osmium serve"),
        ("ls", "osmium list"),
        ("download", "osmium pull"),
        ("demo", "osmium run demo"),
        ("owner/name", "osmium run owner/name"),
        ("--device cpu run demo", "osmium run --device"),
        ("run --temprature 0", "--temperature?"),
        ("run --device=cpu --max-token=3", "--max-tokens?"),
        ("serve --no-timing", "--timing?"),
        ("serve --expert_slots 3", "--expert-slots?"),
        ("serve --temp 3", "--help"),
        ("run --temp 3", "--temperature?"),
        ("bench --xyz", "osmium bench --help"),
    ],
)
def test_a_misspelt_word_gets_a_suggestion(argv: str, suggested: str) -> None:
    assert suggested in error_of(*argv.split())


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("serve --port x", "--port is 'x'; it must be an integer from 0 to 65535."),
        ("serve --port 70000", "--port is '70000'"),
        ("run --top-p 0", "--top-p is '0'; it must be a number above 0 and at most 1."),
        ("run --temperature nan", "--temperature is 'nan'"),
        ("run --temperature -1", "--temperature is '-1'"),
        ("run --max-tokens 0", "--max-tokens is '0'; it must be an integer of at least 1."),
        ("run --seed 1.5", "--seed is '1.5'"),
        ("run --device tpu", "--device is 'tpu'; it must be one of auto, cpu, gpu."),
        ("run --device", "--device needs a value"),
        ("run --timing=yes", "--timing"),
        ("plan --vram much", "--vram"),
        ("plan --context -3", "--context"),
        ("plan --gpu-expert-bits 7", "--gpu-expert-bits is '7'; it must be one of 16, 8, 4."),
        ("plan --link x", "--link is 'x'; it must be a number above 0 and at most 10000."),
        ("plan --expert-slots 0", "--expert-slots is '0'"),
        ("serve --decode-gap-ms 0", "--decode-gap-ms is '0'; it must be an integer of at least 1."),
        ("bench --tokens 1", "--tokens is '1'; it must be an integer of at least 2."),
        ("bench --depth 1k,x", "--depth is '1k,x'"),
        ("bench --depth 110%", "--depth is '110%'"),
        ("bench --parallel 1,0", "--parallel is '1,0'"),
        ("bench --prompt-tokens -1", "--prompt-tokens is '-1'"),
        ("bench --prompt-tokens 1k,0.5", "--prompt-tokens is '1k,0.5'"),
        ("bench --prompt-beside 20q", "--prompt-beside is '20q'"),
        ("bench --turns 32k", "--turns is '32k'; it must be tokens in the state + new tokens"),
        ("bench --turns 1k+2k+3k", "--turns is '1k+2k+3k'"),
        ("bench --turns 8k+0", "--turns is '8k+0'"),
        ("bench --compare one", "--compare"),
        ("perplexity --text x --window 1", "--window is '1'"),
        ("perplexity --text x --path both", "--path is 'both'"),
        ("perplexity demo", "--text is missing"),
        ("logits demo --ids x", "--out is missing"),
        ("rm", "NAME is missing"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it_and_the_rule(argv: str, named: str) -> None:
    line = error_of(*argv.split())
    assert named in line and line.startswith(f"osmium {argv.split()[0]}: ")


def test_a_refused_command_line_is_printed_once_and_exits_with_two(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", "--port", "x"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1


@pytest.mark.parametrize("flag", legacy.FLAGS)
def test_a_flag_of_the_old_project_names_its_replacement(flag: str) -> None:
    line = error_of("serve", "demo", flag, "1")
    assert line.startswith(f"osmium serve: {flag} is ")
    for command in re.findall(r"osmium (\w+) ", line.partition(": ")[2]):
        assert command in COMMANDS


@pytest.mark.parametrize(
    ("flag", "value"), [(flag, value) for flag, values in legacy.VALUES.items() for value in values]
)
def test_a_value_of_the_old_project_names_a_valid_one(flag: str, value: str) -> None:
    line = error_of("serve", flag, value)
    assert line.startswith(f"osmium serve: {flag} {value} ")
    instead = re.search(rf"{flag} (\S+?)[.\s]", line.partition(value)[2])
    assert instead is not None
    parse(["serve", flag, instead.group(1)])


def test_the_kept_flags_of_the_old_project_are_accepted() -> None:
    kept = (
        "serve --model-path M --host 0.0.0.0 --port 8012 --kv-dtype fp8_e4m3 --kv-cache-mb 1000 "
        "--gpu-expert-bits 4 --attention-quant bf16 --shared-expert-quant int8 --no-hcs "
        "--lm-head-quant int8 --wc-alloc --benchmark --timing"
    )
    _, args = parse(kept.split())
    assert args.model_path == "M" and args.write_combined and not args.enable_expert_cache


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_examples_that_parse_and_ends_with_engine_flags(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(name, "--help")
    examples = COMMANDS[name].examples
    assert len(examples) >= 2
    for example in examples:
        assert text.index(example) < text.index("usage:")
        words = shlex.split(re.sub(r" [<>] .*", "", example))
        assert words[0] == "osmium" and parse(words[1:])[0] is COMMANDS[name]
    assert max(map(len, text.splitlines())) <= 80
    groups = re.findall(r"^(\S.*):$", text, re.M)
    assert "engine" not in groups or groups[-1] == "engine"


def test_bare_osmium_prints_help_with_examples_and_exits_with_zero(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["osmium"])
    assert main([]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and all(name in shown.out for name in COMMANDS)
    assert max(map(len, shown.out.splitlines())) <= 80
    assert help_of("help", "run") == help_of("run", "-h")


def test_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    import osmium

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"osmium {osmium.__version__}\n"
    assert re.match(r"\d", osmium.__version__)


def test_every_option_has_its_flag() -> None:
    assert set(_NAMES) == set(EngineConfig.__dataclass_fields__)


def test_help_needs_no_numpy() -> None:
    code = "import sys; from osmium.cli import main\nassert main(['serve', '--help']) == 0\n"
    code += "assert 'numpy' not in sys.modules and 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_osmium_serve_script_runs_osmium_serve() -> None:
    code = "import sys; from osmium.cli import serve; sys.exit(serve())"
    command = [sys.executable, "-c", code, "--port", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("osmium serve: --port is 'x'")
