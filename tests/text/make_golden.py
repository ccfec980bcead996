"""Regenerate tests/golden/chat: `python -m tests.text.make_golden`, with the dev extra."""

from tests.text.templates import CONVERSATIONS, SOURCES, by_transformers
from tests.text.test_chat import GOLDEN

if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for source, text in SOURCES.items():
        for case, (messages, options) in CONVERSATIONS.items():
            rendered = by_transformers(text(), messages, dict(options))
            (GOLDEN / f"{source}_{case}.txt").write_bytes(rendered.encode())
