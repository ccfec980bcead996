"""A byte-level tokenizer for tests: a token per byte, a few merges, special tokens."""

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from osmium.text.tokenizer import Tokenizer

__all__ = ["SPECIALS", "byte_level", "byte_level_json"]

SPECIALS = ("<|im_start|>", "<|im_end|>")
MERGES = ("th", "the", "in", "en", "er", "ab")
"""Letters that merge into one token."""


def byte_level(*, unknown_ids_as_text: bool = False) -> Tokenizer:
    """The tokenizer of `byte_level_json`."""
    return Tokenizer(byte_level_json(), unknown_ids_as_text)


def byte_level_json() -> bytes:
    """Ids 0 .. 255 are bytes in the order of their letters, then merges, special tokens and think
    tags."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    merges = []
    for word in MERGES:
        vocab[word] = len(vocab)
        merges.append((word[:-1], word[-1]))
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in SPECIALS])
    made.add_tokens(
        [AddedToken(one, special=False, normalized=False) for one in ("<think>", "</think>")]
    )
    return bytes(made.to_str().encode())
