"""Where a response starts: in its reasoning, if the prompt ends inside <think>, or in the answer.

response_parser.py splits the response.
"""

from osmium.text.marked import MarkedText

__all__ = ["END_OF_REASONING", "starts_in_reasoning"]

_BEGIN = "<think>"

END_OF_REASONING = "</think>"
"""The text between the reasoning and the answer of a response."""


def starts_in_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt leaves <think> open; in a message's text <think> is none."""
    end = prompt.rstrip()
    is_markup = not isinstance(end, MarkedText) or end.is_markup(len(end) - len(_BEGIN), len(end))
    return end.endswith(_BEGIN) and is_markup
