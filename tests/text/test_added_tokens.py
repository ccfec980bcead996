"""Tokens that only tokenizer_config.json lists: ids and flags as transformers gives them."""

import json
from pathlib import Path
from typing import Any

import pytest

from osmium.errors import CheckpointError
from osmium.text.added_tokens import MAX_TOKENS
from osmium.text.files import read_text_files
from osmium.text.tokenizer import Tokenizer
from osmium.weights import CheckpointFiles
from tests.text.byte_level import byte_level_json

FIRST = 262
"""The id of `<|im_start|>`; then come `<|im_end|>`, `<think>` and `</think>`."""

NEXT = FIRST + 4

TEXTS = (
    "a <new> b<new>c new <new>", "anewb <NEW>", "x <|im_end|> y", "x<think>y", "a <think> b",
    "the<pad>end<x1>in <x2> a",
)  # fmt: skip

FLAGS: list[dict[str, Any]] = [
    {}, {"special": True}, {"lstrip": True}, {"rstrip": True}, {"normalized": True},
    {"normalized": False}, {"single_word": True}, {"special": True, "lstrip": True, "rstrip": True},
    {"special": False, "__type": "AddedToken", "lstrip": True},
]  # fmt: skip


def edited(**changes: Any) -> bytes:
    """The byte-level tokenizer with other contents."""
    return json.dumps({**json.loads(byte_level_json()), **changes}).encode()


def without(*contents: str) -> bytes:
    added = json.loads(byte_level_json())["added_tokens"]
    return edited(added_tokens=[token for token in added if token["content"] not in contents])


def decoder(**tokens: dict[str, Any]) -> dict[str, Any]:
    """`added_tokens_decoder` of tokens whose keys are `id262` and so on."""
    return {"added_tokens_decoder": {key[2:]: token for key, token in tokens.items()}}


def standard() -> dict[str, Any]:
    """`added_tokens_decoder` as transformers writes it for this tokenizer."""
    added = json.loads(byte_level_json())["added_tokens"]
    return {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added}


def by_transformers(
    folder: Path, raw: bytes, config: dict[str, Any], texts: tuple[str, ...]
) -> list[tuple[list[int], str]]:
    """Ids and their text without special tokens."""
    transformers = pytest.importorskip("transformers", reason="transformers is in the dev extra")
    (folder / "tokenizer.json").write_bytes(raw)
    for token in config.get("added_tokens_decoder", {}).values():
        token.pop("__type", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    made = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    encoded = [made.encode(text, add_special_tokens=False) for text in texts]
    return [(ids, made.decode(ids, skip_special_tokens=True)) for ids in encoded]


CONFIGS: dict[str, dict[str, Any]] = {
    **{f"new, {flags}": decoder(id266={"content": "<new>", **flags}) for flags in FLAGS},
    **{f"special, {flags}": decoder(id263={"content": "<|im_end|>", **flags}) for flags in FLAGS},
    **{f"plain, {flags}": decoder(id264={"content": "<think>", **flags}) for flags in FLAGS},
    "later id": decoder(id300={"content": "<new>"}),
    "two": decoder(id267={"content": "<new>"}, id266={"content": "<x1>"}),
    "a word of the vocabulary": decoder(id266={"content": "the"}),
    "named": {"pad_token": "<pad>", "eos_token": "<|im_end|>"},
    "named with flags": {"pad_token": {"__type": "AddedToken", "content": "<pad>", "lstrip": True}},
    "named differently": {"image_token": "<x2>", "pad_token": "<pad>"},
    "named and plain": {"eos_token": "<think>", **decoder(id264={"content": "<think>"})},
    "extra": {"extra_special_tokens": ["<x1>", "<x2>"]},
    "additional": {"additional_special_tokens": ["<x2>", "<|im_end|>", "<x1>"]},
    "extra by name": {"extra_special_tokens": {"a_token": "<x2>"}, "pad_token": "<pad>"},
    "none": {},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_ids_and_texts_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    config = json.loads(json.dumps(CONFIGS[name]))
    tokenizer = Tokenizer(byte_level_json(), config=config)
    found = [(ids, tokenizer.decode(ids)) for ids in map(tokenizer.encode, TEXTS)]
    assert found == by_transformers(tmp_path, byte_level_json(), config, TEXTS)


def test_a_token_that_only_the_configuration_lists_has_its_id() -> None:
    tokenizer = Tokenizer(
        byte_level_json(), config=decoder(id266={"content": "<new>", "special": True})
    )
    assert tokenizer.encode("<new>") == [NEXT]
    assert tokenizer.decode([NEXT]) == ""
    assert tokenizer.decode([NEXT], specials=True) == "<new>"
    assert len(tokenizer.encode("<new>", specials=False)) == 5
    assert tokenizer.token_bytes(NEXT) == b"<new>"
    assert not tokenizer.notes


@pytest.mark.parametrize(
    "lacking",
    [("<|im_end|>",), ("<|im_start|>", "<think>"),
     ("<|im_start|>", "<|im_end|>", "<think>", "</think>")],
)  # fmt: skip
def test_a_token_that_tokenizer_json_lacks_in_the_middle_keeps_all_ids(
    lacking: tuple[str, ...],
) -> None:
    """The package numbers tokens by their order, so that the later ones would move."""
    tokenizer = Tokenizer(without(*lacking), config={"added_tokens_decoder": standard()})
    text = "<|im_start|><|im_end|><think></think>"
    assert tokenizer.encode(text) == [FIRST, FIRST + 1, FIRST + 2, FIRST + 3]
    assert tokenizer.decode(tokenizer.encode(text)) == "<think></think>"
    assert not tokenizer.notes


def test_a_token_that_gets_another_id_than_the_listed_one_is_noted() -> None:
    config = decoder(id300={"content": "<new>"}, id301={"content": "<x1>"})
    (note,) = Tokenizer(byte_level_json(), config=config).notes
    assert "'<new>'" in note and "300" in note and "266" in note and "1 other" in note


@pytest.mark.parametrize(
    "listed",
    [[], 7, "x", {"x": {"content": "a"}}, {"-1": {"content": "a"}}, {"1": 7}, {"1": {}},
     {"1": None}, {"1": {"content": 7}}, {"1" * 400: {"content": "a"}}, {"1": {"content": ""}},
     {"²": {"content": "a"}}],
)  # fmt: skip
def test_a_list_that_cannot_be_used_is_refused_by_name(listed: Any) -> None:
    with pytest.raises(CheckpointError, match="added_tokens_decoder") as found:
        Tokenizer(byte_level_json(), config={"added_tokens_decoder": listed})
    assert len(str(found.value)) < 300


def test_an_endless_list_is_refused() -> None:
    listed = {str(i): {"content": f"<{i}>"} for i in range(MAX_TOKENS + 1)}
    with pytest.raises(CheckpointError, match="added_tokens_decoder"):
        Tokenizer(byte_level_json(), config={"added_tokens_decoder": listed})


@pytest.mark.parametrize("content", ["\ud800", "a\udfff"])
def test_half_a_surrogate_pair_as_a_token_is_refused(content: str) -> None:
    for config in (decoder(id266={"content": content}), {"pad_token": content}):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            Tokenizer(byte_level_json(), config=config)


@pytest.mark.parametrize("flag", ["lstrip", "special", "normalized"])
def test_a_flag_of_another_type_is_not_used(flag: str) -> None:
    token = {"content": "<new>", flag: "yes"}
    plain = Tokenizer(byte_level_json(), config=decoder(id266={"content": "<new>"}))
    tokenizer = Tokenizer(byte_level_json(), config=decoder(id266=token))
    text = "a <new> b"
    assert tokenizer.encode(text) == plain.encode(text)
    assert tokenizer.decode([NEXT]) == plain.decode([NEXT]) == "<new>"


# -- the end token ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "eos_token, ids",
    [
        ("<|im_end|>", (FIRST + 1,)),
        ({"content": "<|im_end|>", "special": True}, (FIRST + 1,)),
        (["<|im_end|>", {"content": "<|im_start|>"}], (FIRST + 1, FIRST)),
        ("the", (258,)),
        ("<eos>", (NEXT,)),
        (None, ()),
        ("", ()),
        (7, ()),
        ({}, ()),
    ],
)
def test_the_end_token_is_that_of_the_configuration(
    eos_token: Any, ids: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level_json())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    found = read_text_files(CheckpointFiles(tmp_path)).end_ids
    if eos_token == "the":
        ids = (Tokenizer(byte_level_json()).encode("the")[0],)
    assert found == ids
    assert read_text_files(CheckpointFiles(tmp_path), synthetic=True).end_ids == ()


def test_an_end_token_that_only_the_configuration_lists_ends_a_response(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(without("<|im_end|>"))
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": standard()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_text_files(CheckpointFiles(tmp_path)).end_ids == (FIRST + 1,)


def test_without_a_tokenizer_there_is_no_end_token(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    assert read_text_files(CheckpointFiles(tmp_path)).end_ids == ()
