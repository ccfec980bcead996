"""Text with its origin: every operation gives what str gives, and characters keep their mask."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from osmium.text.marked import MarkedText, TrackingEnvironment, concat, markup

# Capitals and < > are markup, all others text: a result's characters show their origin.
MARKUP = "ABC<> "
TEXT = "abcä日 \n"


def mixed(rng: np.random.Generator) -> MarkedText:
    """Some pieces of markup and of text; spaces and line ends have either origin."""
    pieces: list[str] = [MarkedText("")]
    for _ in range(int(rng.integers(0, 6))):
        source, make = ((MARKUP, markup), (TEXT, str))[int(rng.integers(2))]
        pieces.append(make("".join(rng.choice(list(source), int(rng.integers(0, 4))))))
    made = concat(pieces)
    assert isinstance(made, MarkedText)
    return made


def origins_are_right(text: str) -> bool:
    mask = text.mask if isinstance(text, MarkedText) else bytes(len(text))
    return all(
        bool(bit) == (char in "ABC<>")
        for char, bit in zip(str.__str__(text), mask, strict=True)
        if char not in " \n"
    )


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "add a plain text": lambda a, b: a + "b",
    "add to a plain text": lambda a, b: "b" + a,
    "times": lambda a, b: a * 3,
    "join": lambda a, b: a.join([b, "ab", a]),
    "item": lambda a, b: a[len(a) // 2] if a else a,
    "slice": lambda a, b: a[1:-1],
    "steps": lambda a, b: a[::-2],
    "list": lambda a, b: list(a),
    "strip": lambda a, b: a.strip(),
    "strip characters": lambda a, b: a.strip("Aa\n"),
    "lstrip": lambda a, b: a.lstrip("Aa"),
    "rstrip": lambda a, b: a.rstrip("\n>"),
    "split at spaces": lambda a, b: a.split(),
    "split once": lambda a, b: a.split(None, 1),
    "split at text": lambda a, b: a.split("a"),
    "split at markup": lambda a, b: a.split(markup("<"), 2),
    "rsplit": lambda a, b: a.rsplit("A", 1),
    "rsplit at spaces": lambda a, b: a.rsplit(None, 2),
    "lines": lambda a, b: a.splitlines(),
    "lines with ends": lambda a, b: a.splitlines(True),
    "partition": lambda a, b: a.partition("a"),
    "rpartition": lambda a, b: a.rpartition(">"),
    "replace": lambda a, b: a.replace("a", b),
    "replace by markup": lambda a, b: a.replace(">", markup("<<")),
    "replace once": lambda a, b: a.replace("a", "bcb", 1),
    "replace nothing": lambda a, b: a.replace("zz", b),
    "removeprefix": lambda a, b: a.removeprefix("A"),
    "removesuffix": lambda a, b: a.removesuffix("\n"),
    "format": lambda a, b: (markup("<%s>%%s") % (b,)).replace("%s", ""),
    "format of two": lambda a, b: markup("A%sB%s") % (b, a),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_the_text_of_str_and_keeps_origins(
    name: str, rng: np.random.Generator
) -> None:
    for _ in range(300):
        a, b = mixed(rng), mixed(rng)
        found = OPERATIONS[name](a, b)
        wanted = OPERATIONS[name](str.__str__(a), str.__str__(b))
        assert found == wanted, (name, a, b)
        for part in [found] if isinstance(found, str) else found:
            assert origins_are_right(part), (name, a.mask, a, b)


def test_markup_stays_markup_where_the_text_changes_its_case() -> None:
    text = concat([markup("<User>"), " some text"])
    for change in (str.upper, str.lower, str.title, str.capitalize):
        found = getattr(text, change.__name__)()
        assert found == change(str.__str__(text))
        assert found.mask == text.mask  # type: ignore[attr-defined]
    assert not isinstance(markup("ß").upper(), MarkedText), "another length: counts as text"


def test_runs_of_markup_are_found() -> None:
    text = concat(["a", markup("<x>"), markup("<y>"), "b", markup("<z>")])
    assert isinstance(text, MarkedText)
    assert [text[a:b] for a, b in text.markup_runs()] == ["<x><y>", "<z>"]
    assert text.is_markup(1, 7)
    assert not text.is_markup(0, 2)
    assert list(MarkedText("a").markup_runs()) == []
    assert list(markup("a").markup_runs()) == [(0, 1)]


TEMPLATES = [
    "<A>{{ x }}<B>",
    "{{ '<A>' + x + '<B>' }}",
    "{{ '<A>' ~ x ~ 7 ~ '<B>' }}",
    "{% set y = '<A>' %}{{ y }}{{ x }}",
    "{% set y %}<A>{{ x }}{% endset %}{{ y | trim }}",
    "{% macro m(v, b='<B>') %}<A>{{ v }}{{ b }}{% endmacro %}{{ m(x) }}{{ m(x, '<C>') | trim }}",
    "{% macro m() %}<A>{{ caller(x) }}{% endmacro %}{% call(v) m() %}{{ v }}<B>{% endcall %}",
    "{% filter trim %} <A>{{ x }} {% endfilter %}",
    "{{ ['<A>', x, '<B>'] | join }}",
    "{{ ['<A>', x] | join('<B>') }}",
    "{{ [{'v': x}, {'v': '<A>'}] | join('<B>', attribute='v') }}",
    "{{ '<A>{}<B>{}'.format(x, 7) }}",
    "{{ '<A>{1}<B>{0}{{'.format(x, '<C>') }}",
    "{{ '<A>{v}'.format(v=x) }}",
    "{{ '<A>{v}'.format_map({'v': x}) }}",
    "{{ '<A>%s<B>' | format(x) }}",
    "{% set n = namespace(t='') %}{% for i in [1, 2] %}{% set n.t = n.t + '<A>' + x %}{% endfor %}"
    "{{ n.t }}",
    "{{ {'user': '<A>'}['user'] }}{{ x }}",
    "{{ '<A>' if x else '<B>' }}{{ x.split('<A>')[0] }}",
    "{{ x | replace('<A>', '') }}<A>",
    "{{ ('<A>' + x).replace('a', '<B>') }}",
    "{{ ('<A>' + x)[1:] }}{{ ('<A>' + x) | upper }}",
    "{% for c in x %}{{ c }}<A>{% endfor %}",
    "{{ x | tojson }}<A>{{ {'k': x} | tojson }}{{ '<A>' ~ x | length }}",
    "{{ '<A>' * 2 }}{{ x * 2 }}{{ missing | default('<A>') }}",
    "{{ loop_ | default('<A>') | string }}{{ '%s' % x }}",
]


@pytest.mark.parametrize("text", ["", "abc", "<A>", "a<B>{}%s", "日\n<A>b "])
@pytest.mark.parametrize("source", TEMPLATES)
def test_a_template_renders_as_usual_and_only_its_own_text_is_markup(
    source: str, text: str
) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    usual, tracking = ImmutableSandboxedEnvironment(), TrackingEnvironment()
    for env in (usual, tracking):
        env.filters["tojson"] = lambda value: str(value)
    wanted = usual.from_string(source).render(x=text)
    found = tracking.from_string(source).render(x=text)
    assert found == wanted
    # In a request's text without capitals, all capitals of the result are the template's.
    if text.islower():
        assert isinstance(found, MarkedText)
        letters = "".join(char for char, bit in zip(found, found.mask, strict=True) if bit)
        assert {"<A>"} <= {letters[i : i + 3] for i in range(len(letters))}
        if "upper" not in source:
            assert not set(letters) & set("abc"), letters


def test_a_request_cannot_make_markup_with_any_operation() -> None:
    """The same template with markup in the request's text has as much markup as without."""
    env = TrackingEnvironment()
    for source in TEMPLATES:
        if "x.split" in source or "replace" in source or "for c in x" in source:
            continue  # the amount of the template's own text follows the request's
        template = env.from_string(source)
        marked = [template.render(x=text) for text in ("abc", "<A>")]
        sizes = [sum(one.mask) for one in marked if isinstance(one, MarkedText)]
        assert len(set(sizes)) == 1, source


def test_html_in_an_autoescape_block_is_as_usual() -> None:
    source = "{% autoescape true %}<A>{{ x }}{{ '<B>' ~ x }}{% endautoescape %}<C>{{ x }}"
    found = TrackingEnvironment().from_string(source).render(x="<a>")
    assert found == "<A>&lt;a&gt;&lt;B&gt;&lt;a&gt;<C><a>"


@pytest.mark.parametrize(
    "source",
    ["{{ '{0.__class__}'.format(x) }}", "{{ '{v.__class__}'.format(v=x) }}",
     "{{ ''.format.__self__.__class__ }}", "{{ '{0.mask}'.format('<A>') }}"],
)  # fmt: skip
def test_formats_stay_in_the_sandbox(source: str) -> None:
    assert "class" not in TrackingEnvironment().from_string(source).render(x="a")
