"""Tokens that tokenizer_config.json adds to those of tokenizer.json, as transformers adds them.

`added_tokens_decoder` lists tokens by id with their flags.  `eos_token` and the other named tokens,
and `extra_special_tokens`, are special tokens; they are added where neither file lists them.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import tokenizers

from osmium.errors import CheckpointError

__all__ = ["add_tokens", "content_of", "merged", "special_names"]

MAX_TOKENS = 1 << 17
"""Most tokens that a tokenizer_config.json may list; the family's lists 33."""

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
          "mask_token")  # fmt: skip

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class _AddedTokens(msgspec.Struct):
    """The part of tokenizer.json that lists added tokens."""

    added_tokens: list[dict[str, Any]] | None = None


def merged(raw: bytes, config: Mapping[str, Any]) -> bytes:
    """tokenizer.json with the tokens of `added_tokens_decoder` that it lacks, by ascending id.

    The tokenizers package numbers added tokens by their order, so a token in the middle has to be
    there before the file is read.  Raises: CheckpointError.
    """
    listed = _listed(config)
    if not listed:
        return raw
    try:
        present = msgspec.json.decode(raw, type=_AddedTokens).added_tokens or []
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return raw  # the tokenizers package says what is wrong with the file
    contents = {token.get("content") for token in present}
    lacking = {i: token for i, token in listed.items() if token["content"] not in contents}
    if not lacking or not all(isinstance(token.get("id"), int) for token in present):
        return raw
    flags = dict.fromkeys(_FLAGS, False)
    added = [{**flags, "normalized": not token.get("special"), **token, "id": i}
             for i, token in lacking.items()]  # fmt: skip
    tokenizer = json.loads(raw)
    tokenizer["added_tokens"] = sorted([*present, *added], key=lambda token: int(token["id"]))
    return json.dumps(tokenizer).encode()


def add_tokens(
    inner: tokenizers.Tokenizer, config: Mapping[str, Any]
) -> dict[str, tuple[int, int]]:
    """Add the tokens of a tokenizer_config.json; flags that differ are the configuration's.

    Returns the tokens whose id differs from the listed one: (listed, actual) by content.
    Raises: CheckpointError for a list that cannot be used.
    """
    listed, named = _listed(config), dict(special_names(config))
    flags: dict[str, Any]
    tokens = []
    for _, token in sorted(listed.items()):
        flags = {**token, "special": True} if token["content"] in named else token
        tokens.append(tokenizers.AddedToken(**flags))
    present = {token.content for token in inner.get_added_tokens_decoder().values()}
    present.update(token["content"] for token in listed.values())
    for content, named_flags in named.items():
        if content not in present:
            flags = {**named_flags, "content": content, "special": True}
            tokens.append(tokenizers.AddedToken(**flags))
    if tokens:
        inner.add_tokens(tokens)
    ids = {
        token["content"]: (i, inner.token_to_id(token["content"])) for i, token in listed.items()
    }
    return {
        content: (wanted, actual)
        for content, (wanted, actual) in ids.items()
        if actual is not None and wanted != actual
    }


def content_of(token: Any) -> str | None:
    """The text of a token, given as text or as an object with flags; None if there is none."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) and content else None


def special_names(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, bool]]]:
    """Contents and flags of the special tokens that have a name, and of the extra ones."""
    own = [key for key in config if key.endswith("_token") and key not in _NAMED]
    values = [config.get(key) for key in _NAMED]
    values += [config[key] for key in own if isinstance(config[key], str)]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    if isinstance(extra, Mapping):
        values += extra.values()
    elif isinstance(extra, list):
        values += extra
    for value in values:
        content = content_of(value)
        if content is not None:
            yield content, _flags(value) if isinstance(value, Mapping) else {}


def _flags(token: Mapping[str, Any]) -> dict[str, bool]:
    return {name: token[name] for name in _FLAGS if isinstance(token.get(name), bool)}


def _listed(config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The tokens of `added_tokens_decoder` by id: content and flags.  Raises: CheckpointError."""
    listed = config.get("added_tokens_decoder")
    if listed is None:
        return {}
    if not isinstance(listed, Mapping) or len(listed) > MAX_TOKENS:
        raise CheckpointError(
            "added_tokens_decoder in tokenizer_config.json must be an object of at most "
            f"{MAX_TOKENS} tokens."
        )
    tokens: dict[int, dict[str, Any]] = {}
    for key, token in listed.items():
        content = content_of(token)
        if not (key.isascii() and key.isdecimal() and len(key) < 10) or content is None:
            raise CheckpointError(
                f"added_tokens_decoder in tokenizer_config.json has {key[:40]!r}: "
                f"{str(token)[:80]!r}; a key is a token id and a value has its content."
            )
        tokens[int(key)] = {
            "content": content,
            **(_flags(token) if isinstance(token, Mapping) else {}),
        }
    return tokens
