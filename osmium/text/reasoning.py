"""Reasoning split from the answer, while the text streams.

If the prompt ends inside <think>, the response starts with reasoning, up to </think>.
"""

from osmium.text.marked import MarkedText

__all__ = ["END_OF_REASONING", "DisplayedResponse", "ReasoningParser", "starts_in_reasoning"]

_BEGIN, _END = "<think>", "</think>"

END_OF_REASONING = _END
"""The text between the reasoning and the answer of a response."""


def starts_in_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt leaves <think> open; in a message's text <think> is none."""
    end = prompt.rstrip()
    is_markup = not isinstance(end, MarkedText) or end.is_markup(len(end) - len(_BEGIN), len(end))
    return end.endswith(_BEGIN) and is_markup


class ReasoningParser:
    """Splits the text of one response into reasoning and answer."""

    def __init__(self, thinking: bool) -> None:
        self.thinking = thinking
        self._held = ""
        self._at_start = thinking
        """Whether the present part has no text yet: its leading newlines are the template's.

        A response that does not start with reasoning is all answer, and keeps its newlines."""

    def push(self, text: str) -> tuple[str, str]:
        """Add `text`; returns the (reasoning, answer) that no later text can change."""
        if not self.thinking:
            return "", self._trim(text)
        self._held += text
        at = self._held.find(_END)
        if at >= 0:
            reasoning, rest = self._held[:at].rstrip("\n"), self._held[at + len(_END) :]
            reasoning = self._trim(reasoning)
            self.thinking, self._at_start, self._held = False, True, ""
            return reasoning, self._trim(rest)
        keep = max((n for n in range(1, len(_END)) if self._held.endswith(_END[:n])), default=0)
        # Newlines before </think> are the template's.
        cut = len(self._held[: len(self._held) - keep].rstrip("\n"))
        out, self._held = self._held[:cut], self._held[cut:]
        return self._trim(out), ""

    def flush(self) -> tuple[str, str]:
        """The (reasoning, answer) still held back, at the end of the response."""
        held, self._held = self._held, ""
        return (self._trim(held), "") if self.thinking else ("", self._trim(held))

    def _trim(self, text: str) -> str:
        if self._at_start:
            text = text.lstrip("\n")
            self._at_start = not text
        return text


class DisplayedResponse:
    """Splits one response for display.

    Unlike ReasoningParser, it also splits a response that starts with <think>, and drops a </think>
    without its <think> from the answer.
    """

    def __init__(self, thinking: bool) -> None:
        self._parser = ReasoningParser(thinking)
        self._start: str | None = None if thinking else ""
        """The text so far, while it may be the beginning of <think>; None afterwards."""
        self._tag = ""
        """The end of the answer, while it may be the beginning of a tag."""
        self._open = 0
        """Number of <think> in the answer without a </think> so far."""

    @property
    def thinking(self) -> bool:
        return self._parser.thinking

    def push(self, text: str) -> tuple[str, str]:
        """Add `text`; returns the (reasoning, answer) that no later text can change."""
        if self._start is not None:
            text = self._start + text
            if _BEGIN.startswith(text.lstrip()):
                self._start = text
                return "", ""
            self._start = None
            if text.lstrip().startswith(_BEGIN):
                self._parser, text = ReasoningParser(True), text.lstrip()[len(_BEGIN) :]
        reasoning, answer = self._parser.push(text)
        return reasoning, self._paired(answer)

    def flush(self) -> tuple[str, str]:
        """The (reasoning, answer) still held back, at the end of the response."""
        start, self._start = self._start or "", None
        reasoning, answer = self._parser.flush()
        answer = self._paired(start + answer) + self._tag
        self._tag = ""
        return reasoning, answer

    def _paired(self, text: str) -> str:
        """The part of the answer that is certain, without an unpaired </think>."""
        text, out = self._tag + text, ""
        while tags := [(text.find(tag), tag) for tag in (_BEGIN, _END) if tag in text]:
            at, tag = min(tags)
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
