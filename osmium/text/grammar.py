"""Grammars of structured output: JSON Schemas, regular expressions, Lark, choices.

`GrammarCompiler` makes a `Grammar` from a request's text, with limits on its size and on the time
it takes.  What a grammar allows next is in grammar_mask.py.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from osmium.errors import RequestError
from osmium.text.call_mask import CallMask
from osmium.text.grammar_ending import EndHints, TextTokens
from osmium.text.grammar_mask import NO_HINTS, GrammarMask
from osmium.text.json_schema import ascii_classes, checked_schema
from osmium.text.lark import JSON_OPTIONS
from osmium.text.reasoning import END_OF_REASONING
from osmium.text.thinking_end import Thinking, ThinkingEnd
from osmium.text.tokenizer import Tokenizer

__all__ = ["Grammar", "GrammarCompiler", "GrammarKind", "short_reason"]

GrammarKind = Literal["json", "regex", "choice", "grammar"]
"""A JSON Schema, a regular expression, a list of texts, or a Lark or GBNF grammar."""

MAX_GRAMMAR_CHARS = 1 << 18
"""Most characters of a schema, as JSON, and of all choices together."""

MAX_RULE_CHARS = 1 << 15
"""Most characters of a regular expression or a grammar."""

COMPILE_TIMEOUT_S = 5.0
"""Seconds that compiling may take."""

MAX_COMPILING = 2
"""Grammars that compile at once; those that exceed the time count until they end."""

CACHED_GRAMMARS = 32
"""Compiled grammars that are kept for later requests."""

_LIMITS = LLParserLimits(
    max_lexer_states=50_000,  # about 1.5 KB each
    max_grammar_size=200_000,
)


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar."""

    compiler: "GrammarCompiler"
    matcher: LLMatcher
    """In its first state; each response has a copy."""

    hints: EndHints = NO_HINTS
    opening: int | None = None
    """The token that begins a call, if the text consists of calls of tools."""

    def mask(
        self,
        max_tokens: int,
        thinking: bool = False,
        call: int | None = None,
        calls: "Grammar | None" = None,
    ) -> GrammarMask:
        """The token mask of one response of at most `max_tokens` tokens.

        With `thinking` the grammar applies to the text after </think>.  With `call`, a token, the
        response may be tool calls instead, each in the grammar `calls` if that is given.
        """
        compiler = self.compiler
        return GrammarMask(
            self.matcher.deep_copy(),
            compiler.text,
            max_tokens,
            self._thinking(thinking, compiler.thinking_end.eos),
            hints=self.hints,
            call=call,
            calls=None if calls is None else calls.call_mask(max_tokens),
        )

    def call_mask(self, max_tokens: int, thinking: bool = False) -> CallMask:
        """The token mask of any text in which each call of a tool follows this grammar, of one."""
        assert self.opening is not None, "a grammar of calls whose tag is a token"
        return CallMask(
            self.mask, self.opening, self.compiler.text.tokens, max_tokens, self._thinking(thinking)
        )

    def _thinking(self, thinking: bool, forbidden: Sequence[int] = ()) -> Thinking | None:
        """In a thinking that calls follow, no call begins: the parser may take it as text."""
        if not thinking:
            return None
        opening = () if self.opening is None else (self.opening,)
        return Thinking(self.compiler.thinking_end, (*forbidden, *opening))


class _Vocabulary:
    """The vocabulary in the form that LLTokenizer reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos: Sequence[int]) -> None:
        self.eos_token_id = eos[0]
        self.special_token_ids = sorted(
            {*eos, *(token for token in tokenizer.added_ids if token < vocab)}
        )
        self.tokens = [
            tokenizer.token_bytes(token) if tokenizer.has_id(token) else b""
            for token in range(vocab)
        ]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text if isinstance(text, str) else text.decode(errors="replace")
        return self._tokenizer.encode(plain, specials=False)


class GrammarCompiler:
    """Compiles grammars for one tokenizer.  Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos: Sequence[int]) -> None:
        """`vocab` is the number of logits, `eos` the end tokens, at least one."""
        self.tokenizer = tokenizer
        words = _Vocabulary(tokenizer, vocab, eos)
        self._inner = LLTokenizer(cast(Any, words), n_vocab=vocab, eos_token=list(eos))
        special = frozenset(words.special_token_ids)
        tokens = [b"" if i in special else raw for i, raw in enumerate(words.tokens)]
        self.text = TextTokens(tokens, self._inner.tokenize_bytes)
        self.thinking_end = ThinkingEnd(
            tokens, tokenizer.id_of(END_OF_REASONING), END_OF_REASONING.encode(), eos
        )
        self._cache: OrderedDict[tuple[str, ...], LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._compiling = threading.Semaphore(MAX_COMPILING)

    def compile(self, kind: GrammarKind, value: Any, param: str) -> Grammar:
        """Compile `value`, which the request has as `param`.

        Raises: RequestError for one that is invalid, too large, too slow, or matches no text.
        """
        text = _source(kind, value, param)
        return Grammar(
            self, self.cached((kind, text), lambda: self._compiled(kind, text, param), param)
        )

    def tag_token(self, tag: str) -> int | None:
        """The token of a tag; None without one, and for one that decoding leaves out."""
        hidden = self.tokenizer.special_id(tag) is not None
        return None if hidden else self.tokenizer.control_tokens.id_of(tag)

    def cached(self, key: tuple[str, ...], job: Callable[[], LLMatcher], param: str) -> LLMatcher:
        """The result of an earlier `job` with the same key, or its own within the limits.

        Raises: RequestError.
        """
        with self._lock:
            matcher = self._cache.get(key)
            if matcher is not None:
                self._cache.move_to_end(key)
                return matcher
        matcher = self._within_limits(job, param)
        with self._lock:
            self._cache[key] = matcher
            while len(self._cache) > CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        return matcher

    def _compiled(self, kind: GrammarKind, text: str, param: str) -> LLMatcher:
        """Raises: RequestError."""
        try:
            if kind == "json":
                grammar = LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
            elif kind == "regex":
                grammar = LLMatcher.grammar_from_regex(ascii_classes(text))
            elif kind == "choice":
                grammar = LLMatcher.grammar_from_lark(text)
            else:
                grammar = LLMatcher.grammar_from_lark(any_to_lark(text))
        except Exception as error:  # the package's conversion raises plain Exception
            raise _invalid(kind, param, str(error)) from None
        matcher, reason = self.matcher(grammar)
        if reason:
            raise _invalid(kind, param, reason)
        return matcher

    def matcher(self, grammar: str) -> tuple[LLMatcher, str]:
        """A grammar's matcher, and the reason why it cannot be used, if there is one."""
        matcher = LLMatcher(self._inner, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            return matcher, matcher.get_error() or "it is empty"
        for _ in range(2):  # the second mask shows whether the limits suffice
            first = matcher.deep_copy()
            allowed = first.compute_bitmask()
            if first.is_error() or not any(allowed):
                return matcher, first.get_error() or "it matches no text"
        return matcher, ""

    def _within_limits(self, job: Callable[[], LLMatcher], param: str) -> LLMatcher:
        """The result of `job` on a thread of its own.  Raises: RequestError after the timeout."""
        if not self._compiling.acquire(timeout=COMPILE_TIMEOUT_S):
            raise RequestError(
                f"{MAX_COMPILING} other grammars are compiled, which is the limit. Try again "
                "later.",
                param=param,
                code="too_many_grammars",
                status=429,
            )
        outcome: list[LLMatcher | BaseException] = []

        def run() -> None:
            try:
                outcome.append(job())
            except BaseException as error:  # raised again below
                outcome.append(error)
            finally:
                self._compiling.release()

        thread = threading.Thread(target=run, name="osmium-grammar", daemon=True)
        thread.start()
        thread.join(COMPILE_TIMEOUT_S)
        if not outcome:
            raise RequestError(
                f"{param} takes more than {COMPILE_TIMEOUT_S:g} s to compile. Simplify it.",
                param=param,
                code="grammar_too_complex",
            )
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]


def _source(kind: GrammarKind, value: Any, param: str) -> str:
    """The text that is compiled.  Raises: RequestError for another type, or one too long."""
    if kind == "json":
        text = json.dumps(_schema(value, param))
        limit = MAX_GRAMMAR_CHARS
    elif kind == "choice":
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(item, str) for item in value)
        ):
            raise RequestError(
                f"{param} must be a list of one or more texts.", param=param, code="invalid_value"
            )
        text = "start: " + " | ".join(map(json.dumps, value))
        limit = MAX_GRAMMAR_CHARS
    else:
        if not isinstance(value, str):
            raise RequestError(
                f"{param} is {type(value).__name__}; it must be a text.",
                param=param,
                code="invalid_type",
            )
        text, limit = value, MAX_RULE_CHARS
    if len(text) > limit:
        raise RequestError(
            f"{param} has {len(text)} characters; at most {limit} are compiled. Shorten it.",
            param=param,
            code="grammar_too_large",
        )
    return text


def _schema(value: Any, param: str) -> dict[str, Any]:
    """A schema from an object or its JSON.  Raises: RequestError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"{param} is a text that is not JSON: {error}.", param=param, code="invalid_schema"
            ) from None
    return checked_schema(value, param)


_NAMES = {"json": "JSON Schema", "regex": "regular expression", "choice": "list of choices",
          "grammar": "grammar"}  # fmt: skip


def _invalid(kind: GrammarKind, param: str, reason: str) -> RequestError:
    return RequestError(
        f"{param} cannot be used as a {_NAMES[kind]}: {short_reason(reason) or 'it is empty'}.",
        param=param,
        code="invalid_schema" if kind == "json" else "invalid_grammar",
    )


def short_reason(reason: str) -> str:
    """The package's reason on one line, without the state of its parser."""
    summary, _, state = reason.partition("<state>")
    if state:  # a limit, or a grammar without a text
        summary = "it matches no text" if "NoExtension" in summary else "it is too complex"
    return " ".join(summary.split())[:500].rstrip(".")
