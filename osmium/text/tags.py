"""Tags in text that is still arriving: what is certain, and what a longer text decides."""

__all__ = ["MAX_SPACE", "skip_space", "tag_at"]

MAX_SPACE = 256
"""White space between two tags that belong together."""


def skip_space(text: str, at: int) -> int:
    """The position after white space, at most MAX_SPACE characters of it."""
    piece = text[at : at + MAX_SPACE]
    return at + len(piece) - len(piece.lstrip(" \t\r\n"))


def tag_at(text: str, at: int, tags: tuple[str, ...], final: bool) -> str | None:
    """The one of `tags` at `at`; "" if there is none, None if a longer text decides."""
    for tag in tags:
        if text.startswith(tag, at):
            return tag
    rest = text[at : at + max(map(len, tags))]
    if not final and any(tag.startswith(rest) for tag in tags):
        return None
    return ""
