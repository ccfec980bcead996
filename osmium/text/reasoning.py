"""Thinking told apart from the answer, as the text comes.

A template that ends its prompt inside <think> makes the reply start in thought; </think> ends it.
"""

__all__ = ["Thought", "starts_in_thought"]

_END = "</think>"


def starts_in_thought(prompt: str) -> bool:
    """Whether a rendered prompt leaves <think> open."""
    return prompt.rstrip().endswith("<think>")


class Thought:
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
