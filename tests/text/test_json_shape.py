"""The size of JSON before it is decoded."""

import json
import random
import time
from typing import Any

import pytest

from osmium.errors import RequestError
from osmium.text.json_shape import MAX_DEPTH, MAX_VALUES, check_json_shape

TEXTS = ["", "a", "[", "{,", '"', '\\"', "\\", "\\\\", '\\\\"', "é,🙂", '","', "]}", "\n"]


def some_json(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(5 if depth else 3)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind < 3:
        return rng.choice([1, None, True, 1.5])
    items = [some_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    return items if kind == 3 else dict(zip(rng.sample(TEXTS, len(items)), items, strict=True))


def values_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(values_of, inner))


def depth_of(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


@pytest.mark.parametrize("seed", range(20))
def test_values_and_depth_of_any_json_are_measured(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        value = [some_json(rng, 5) for _ in range(4)]
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()
        # An empty list counts as a value more, and the first item of a list needs no comma.
        count, depth = values_of(value), depth_of(value)
        assert check_json_shape(text, 2 * count, depth) >= count
        with pytest.raises(RequestError) as caught:
            check_json_shape(text, 2 * count, depth - 1)
        assert caught.value.code == "json_too_deep"
        with pytest.raises(RequestError) as caught:
            check_json_shape(text, count // 2, depth)
        assert caught.value.code == "too_many_values"


def test_brackets_and_commas_in_texts_do_not_count() -> None:
    prose = json.dumps({"a": 'One, two, "three", {four}, [five], \\"six\\".\n' * 20_000}).encode()
    assert prose.count(b",") > MAX_VALUES // 2
    assert check_json_shape(prose, 4) == 2
    assert check_json_shape(json.dumps(["[" * 500] * 60).encode(), 100) < 150


def test_many_texts_are_too_many_values() -> None:
    with pytest.raises(RequestError, match=f"at most {MAX_VALUES}"):
        check_json_shape(b"[" + b'"",' * (2 * MAX_VALUES) + b'""]')


@pytest.mark.parametrize(
    "text",
    [b"[[]," * (1 << 20), b'{"a":' * (1 << 20), b"[" * (4 << 20), b'"' * (4 << 20),
     b"\\" * (4 << 20), b'\\"' * (2 << 20), b'{"":0},' * (1 << 19)],
)  # fmt: skip
def test_four_mib_are_measured_quickly(text: bytes) -> None:
    start = time.perf_counter()
    try:
        check_json_shape(text)
    except RequestError:
        pass
    assert time.perf_counter() - start < 1


def test_the_error_names_what_has_the_shape() -> None:
    with pytest.raises(RequestError) as caught:
        check_json_shape(b"[" * (MAX_DEPTH + 1), name="arguments")
    assert str(caught.value).startswith(f"arguments has {MAX_DEPTH + 1} lists")
    check_json_shape(b"[" * MAX_DEPTH)
