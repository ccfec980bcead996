"""Text with its origin: which characters are a chat template's markup, and which are a request's.

`MarkedText` is a str with one mask byte per character.  String methods that templates use keep the
mask; all others return a plain str, which counts as a request's text.  So text of a request never
becomes markup by an operation that is not handled here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from string import Formatter
from typing import Any, SupportsIndex

from jinja2 import nodes, pass_eval_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["MarkedText", "TrackingEnvironment", "concat", "markup"]

TEXT, MARKUP = b"\0", b"\1"


class MarkedText(str):
    """A text and its mask, 1 for each character of the template's markup, else 0."""

    __slots__ = ("mask",)

    mask: bytes

    def __new__(cls, text: str = "", mask: bytes | None = None) -> "MarkedText":
        made = super().__new__(cls, text)
        made.mask = TEXT * len(text) if mask is None else mask
        assert len(made.mask) == len(text), "one mask byte per character"
        return made

    def is_markup(self, start: int, end: int) -> bool:
        """Whether all of text[start:end] is the template's markup."""
        return self.mask.find(TEXT, start, end) < 0

    def markup_runs(self) -> Iterator[tuple[int, int]]:
        """Start and end of each longest run of markup."""
        start = self.mask.find(MARKUP)
        while start >= 0:
            end = self.mask.find(TEXT, start)
            end = len(self) if end < 0 else end
            yield start, end
            start = self.mask.find(MARKUP, end)

    # -- joining -----------------------------------------------------------------------------------

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        if not isinstance(other, str) or hasattr(other, "__html__"):
            return NotImplemented
        return MarkedText(str.__add__(self, other), self.mask + _mask(other))

    def __radd__(self, other: str) -> str:
        if not isinstance(other, str):
            return NotImplemented
        return MarkedText(str.__add__(other, self), _mask(other) + self.mask)

    def __mul__(self, count: SupportsIndex) -> str:
        return MarkedText(str.__mul__(self, count), self.mask * int(count))

    __rmul__ = __mul__

    def join(self, parts: Iterable[str]) -> str:
        parts = list(parts)
        text = str.join(self, parts)
        return MarkedText(text, self.mask.join(_mask(part) for part in parts))

    def __mod__(self, values: Any) -> str:
        """Masks are kept for formats of %s and %% alone."""
        text = str.__mod__(self, values)
        given = list(values) if isinstance(values, tuple) else [values]
        made: list[str] = []
        at = 0
        while (found := self.find("%", at)) >= 0:
            made.append(self[at:found])
            kind, at = str.__getitem__(self, slice(found + 1, found + 2)), found + 2
            if kind == "%":
                made.append(self[found + 1 : at])
            elif kind == "s" and given:
                made.append(str(given.pop(0)))
            else:
                return text
        whole = concat([*made, self[at:]])
        return whole if whole == text else text

    # -- parts -------------------------------------------------------------------------------------

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        text = str.__getitem__(self, key)
        if isinstance(key, slice):
            return MarkedText(text, self.mask[key])
        return MarkedText(text, bytes([self.mask[key]]))

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def strip(self, chars: str | None = None, /) -> str:
        start = len(self) - len(str.lstrip(self, chars))
        return self[start : start + len(str.strip(self, chars))]

    def lstrip(self, chars: str | None = None, /) -> str:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> str:
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> str:
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> str:
        return self[: len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.rsplit(self, sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        whole = str.splitlines(self, True)
        kept = whole if keepends else str.splitlines(self)
        found, at = [], 0
        for line, part in zip(whole, kept, strict=True):
            found.append(self[at : at + len(part)])
            at += len(line)
        return found

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        at = self.find(sep)
        if at < 0:
            return self, "", ""
        return self[:at], self[at : at + len(sep)], self[at + len(sep) :]

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        at = self.rfind(sep)
        if at < 0:
            return "", "", self
        return self[:at], self[at : at + len(sep)], self[at + len(sep) :]

    def _located(self, parts: list[str], gap: int) -> list[str]:
        """The parts of a split, with their masks; `gap` is the separator's length, 0: spaces."""
        found, at = [], 0
        for part in parts:
            at = at if gap else self.find(part, at)
            found.append(self[at : at + len(part)])
            at += len(part) + gap
        return found

    # -- other characters --------------------------------------------------------------------------

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:  # between all characters; no template does that
            return str.replace(self, old, new, count)
        parts = str.split(self, old, count)
        return concat(
            piece
            for i, part in enumerate(self._located(parts, len(old)))
            for piece in ((new, part) if i else (part,))
        )

    def upper(self) -> str:
        return self._same_length(str.upper(self))

    def lower(self) -> str:
        return self._same_length(str.lower(self))

    def capitalize(self) -> str:
        return self._same_length(str.capitalize(self))

    def title(self) -> str:
        return self._same_length(str.title(self))

    def _same_length(self, text: str) -> str:
        return MarkedText(text, self.mask) if len(text) == len(self) else text


def markup(text: str) -> MarkedText:
    """A text that is the template's markup."""
    return MarkedText(text, MARKUP * len(text))


def concat(parts: Iterable[str]) -> str:
    """The joined parts, with their masks if any has one."""
    parts = list(parts)
    text = "".join(parts)
    if not any(isinstance(part, MarkedText) for part in parts):
        return text
    return MarkedText(text, b"".join(map(_mask, parts)))


def _mask(text: str) -> bytes:
    return text.mask if isinstance(text, MarkedText) else TEXT * len(text)


# -- templates -------------------------------------------------------------------------------------


class _Generator(CodeGenerator):
    """Compiles the template's constants to markup, and `~` to an operation that keeps masks."""

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return _literal("".join(map(str, group)))

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        value = node.as_const(frame.eval_ctx)
        if isinstance(value, str) and not _escapes(frame):
            self.write(_literal(value))
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:
        if _escapes(frame):
            super().visit_TemplateData(node, frame)
        else:
            self.write(_literal(node.data))

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        if _escapes(frame):
            super().visit_Concat(node, frame)
            return
        self.write("concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")


def _escapes(frame: Frame) -> bool:
    """Inside {% autoescape %}: HTML, which no chat template is; it has no masks."""
    return frame.eval_ctx.autoescape or frame.eval_ctx.volatile


def _literal(text: str) -> str:
    return f"environment.markup({text!r})"


class TrackingEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox; a template renders to a MarkedText equal to the usual text."""

    code_generator_class = _Generator
    concat = staticmethod(concat)
    markup = staticmethod(markup)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, optimized=False)  # a folded constant would be plain text
        self.filters["join"] = _join

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format in the sandbox, with masks."""
        wrapped = super().wrap_str_format(value)
        source = getattr(value, "__self__", None)
        if wrapped is None or not isinstance(source, MarkedText):
            return wrapped
        usual, is_map = wrapped, value.__name__ == "format_map"

        def tracked(*args: Any, **kwargs: Any) -> str:
            text = str.__str__(usual(*args, **kwargs))
            fields = args[0] if is_map else kwargs
            whole = _format(source, () if is_map else args, fields, usual)
            return whole if whole == text else text

        return tracked


def _format(
    source: MarkedText, args: tuple[Any, ...], fields: Mapping[str, Any], usual: Any
) -> str:
    """The parts of a format and its plain {fields}; a text without masks for other formats."""
    made: list[str] = []
    at = number = 0
    for literal, name, spec, conversion in Formatter().parse(source):
        found = source.find(literal, at) if literal else at
        if found < 0:
            return ""
        made.append(source[found : found + len(literal)])
        at = found + len(literal)
        if name is None:
            continue
        if spec or conversion:
            return ""
        key, number = (str(number), number + 1) if name == "" else (name, number)
        if key.isdecimal():
            made.append(str(args[int(key)]))
        elif key in fields:
            made.append(str(fields[key]))
        else:
            return ""
    return concat(made)


@pass_eval_context
def _join(context: EvalContext, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    """Jinja's filter `join`, with masks."""
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    return MarkedText(str(d), _mask(str(d))).join(map(str, value))
