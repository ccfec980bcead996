"""Thinking told apart from the answer, as the text comes.

A template that ends its prompt inside <think> makes the reply start in thought; </think> ends it.
"""

__all__ = ["ReasoningParser", "ShownReply", "starts_in_thought"]

_BEGIN, _END = "<think>", "</think>"


def starts_in_thought(prompt: str) -> bool:
    """Whether a rendered prompt leaves <think> open."""
    return prompt.rstrip().endswith("<think>")


class ReasoningParser:
    """Splits one reply."""

    def __init__(self, thinking: bool) -> None:
        self.thinking = thinking
        self._held = ""
        self._fresh = thinking
        """Nothing of this part has been given out: its leading newlines are the template's.  A
        reply that does not start in thought is all answer, and keeps its own."""

    def push(self, text: str) -> tuple[str, str]:
        """(thought, answer) that are certain once `text` is there."""
        if not self.thinking:
            return "", self._trim(text)
        self._held += text
        at = self._held.find(_END)
        if at >= 0:
            thought, rest = self._held[:at].rstrip("\n"), self._held[at + len(_END) :]
            thought = self._trim(thought)
            self.thinking, self._fresh, self._held = False, True, ""
            return thought, self._trim(rest)
        keep = max((n for n in range(1, len(_END)) if self._held.endswith(_END[:n])), default=0)
        cut = len(self._held) - keep
        while cut and self._held[cut - 1] == "\n":
            cut -= 1  # newlines before </think> are the template's
        out, self._held = self._held[:cut], self._held[cut:]
        return self._trim(out), ""

    def flush(self) -> tuple[str, str]:
        """What was held back, at the end of the reply."""
        held, self._held = self._held, ""
        return (self._trim(held), "") if self.thinking else ("", self._trim(held))

    def _trim(self, text: str) -> str:
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        return text


class ShownReply:
    """Splits one reply for people to read: a reply that opens <think> itself is split as well, and
    a </think> without its <think> is left out of the answer."""

    def __init__(self, thinking: bool) -> None:
        self._thought = ReasoningParser(thinking)
        self._start: str | None = None if thinking else ""
        """What came so far, while it may be the beginning of <think>; None afterwards."""
        self._tag = ""
        """The end of the answer, while it may be the beginning of a tag."""
        self._open = 0
        """<think> in the answer that have no </think> yet."""

    @property
    def thinking(self) -> bool:
        return self._thought.thinking

    def push(self, text: str) -> tuple[str, str]:
        """(thought, answer) that are certain once `text` is there."""
        if self._start is not None:
            text = self._start + text
            if _BEGIN.startswith(text.lstrip()):
                self._start = text
                return "", ""
            self._start = None
            if text.lstrip().startswith(_BEGIN):
                self._thought, text = ReasoningParser(True), text.lstrip()[len(_BEGIN) :]
        thought, answer = self._thought.push(text)
        return thought, self._paired(answer)

    def flush(self) -> tuple[str, str]:
        """What was held back, at the end of the reply."""
        start, self._start = self._start or "", None
        thought, answer = self._thought.flush()
        answer = self._paired(start + answer) + self._tag
        self._tag = ""
        return thought, answer

    def _paired(self, text: str) -> str:
        """The answer without an unpaired </think>."""
        text, out = self._tag + text, ""
        while found := [(text.find(tag), tag) for tag in (_BEGIN, _END) if tag in text]:
            at, tag = min(found)
            out += text[:at]
            if tag == _BEGIN or self._open:
                out += tag
                self._open += 1 if tag == _BEGIN else -1
            text = text[at + len(tag) :]
        keep = max(
            (n for tag in (_BEGIN, _END) for n in range(1, len(tag)) if text.endswith(tag[:n])),
            default=0,
        )
        self._tag = text[len(text) - keep :]
        return out + text[: len(text) - keep]
