"""Sampling defaults of generation_config.json: good ones, repaired ones, ignored ones."""

import json
from typing import Any

import pytest

from osmium.engine.request import SamplingParams
from osmium.errors import RequestError
from osmium.text.defaults import sampling_defaults


def test_sampling_defaults_come_from_generation_config() -> None:
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "eos_token_id": [1],
    }
    wanted = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert sampling_defaults(config) == (wanted, [])
    assert sampling_defaults({"do_sample": False, "temperature": 9e9}) == ({"temperature": 0.0}, [])
    assert sampling_defaults(None) == ({}, [])
    assert sampling_defaults({"temperature": None}) == ({}, [])


@pytest.mark.parametrize(
    "name, given, repaired",
    [
        ("top_k", 20.0, 20),
        ("top_k", "20", 20),
        ("top_k", -1.0, -1),
        ("temperature", "0.7", 0.7),
        ("top_p", "0.9", 0.9),
    ],
)
def test_a_value_of_the_wrong_type_is_repaired_and_named(
    name: str, given: Any, repaired: float
) -> None:
    defaults, (note,) = sampling_defaults({name: given})
    assert defaults == {name: repaired}
    assert type(defaults[name]) is type(repaired)
    assert name in note and repr(given) in note and str(repaired) in note


IGNORED: list[tuple[str, Any]] = [
    ("temperature", 1e9), ("temperature", -0.1), ("temperature", float("nan")),
    ("temperature", float("inf")), ("temperature", "hot"), ("temperature", True),
    ("temperature", [0.7]), ("temperature", 10**400), ("top_p", 0), ("top_p", 0.0),
    ("top_p", 1.5), ("top_p", -1), ("top_p", "nan"), ("top_k", 20.5), ("top_k", -2),
    ("top_k", 1e300), ("top_k", 1 << 40), ("top_k", "many"), ("top_k", False), ("min_p", 2),
    ("min_p", {}), ("repetition_penalty", 0), ("repetition_penalty", -1),
    ("repetition_penalty", "9" * 5000),
]  # fmt: skip


@pytest.mark.parametrize("name, given", IGNORED)
def test_an_impossible_value_is_ignored_and_named(name: str, given: Any) -> None:
    defaults, (note,) = sampling_defaults({name: given, "top_k" if name != "top_k" else "top_p": 1})
    assert name not in defaults and len(defaults) == 1, "the others hold"
    assert note.startswith(f"{name} ") and "ignored" in note and len(note) < 150


@pytest.mark.parametrize("name, given", IGNORED)
def test_no_default_is_one_that_a_request_could_not_have(name: str, given: Any) -> None:
    SamplingParams(**sampling_defaults({name: given})[0])


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"])
def test_the_ends_of_each_range_are_those_of_a_request(name: str) -> None:
    for value in [-2, -1, -1e-9, 0, 0.009, 0.01, 0.5, 1, 1 + 1e-9, 2, 20, 100, 100.1, 1 << 30]:
        given: dict[str, Any] = {name: value}
        try:
            SamplingParams(**given)
            valid = True
        except RequestError:
            valid = False
        if name == "top_k" and isinstance(value, float):
            continue
        assert (name in sampling_defaults({name: value})[0]) == valid, value


@pytest.mark.parametrize("value", ["false", 0, 1, []])
def test_do_sample_of_another_type_is_ignored_and_named(value: Any) -> None:
    defaults, (note,) = sampling_defaults({"do_sample": value, "top_k": 5})
    assert defaults == {"top_k": 5}
    assert "do_sample" in note


def test_all_faults_of_a_file_are_in_the_notes_once() -> None:
    text = '{"top_k": 20.0, "temperature": 1e9, "top_p": NaN, "min_p": -1}'
    defaults, notes = sampling_defaults(json.loads(text))
    assert defaults == {"top_k": 20}
    assert [note.split()[0] for note in notes] == ["temperature", "top_p", "top_k", "min_p"]
