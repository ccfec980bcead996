"""Grammars of tool calls: compiled from the tools of a request, in the model's format."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from osmium.errors import RequestError
from osmium.text.call_schema import callable_tool
from osmium.text.grammar import Grammar, GrammarCompiler, short_reason
from osmium.text.grammar_ending import EndHints
from osmium.text.lark import LarkRules
from osmium.text.tool_formats import ToolFormat

__all__ = ["CallableEntry", "compile_calls"]


@dataclass(frozen=True)
class CallableEntry:
    """A tool of a request that may be called."""

    entry: Mapping[str, Any]
    """In OpenAI's form, checked."""
    path: str
    """Where the request has it."""
    is_free: bool = False
    """Whether its arguments are any text."""


def compile_calls(
    compiler: GrammarCompiler,
    tool_format: ToolFormat,
    tools: Sequence[CallableEntry],
    param: str,
    *,
    several: bool = False,
) -> Grammar:
    """Compile the grammar of one call of one of these tools, or with `several` of one or more.

    Raises: RequestError for a strict tool that cannot be enforced, with its path, else for `param`.
    """
    ids = {tag: compiler.tag_token(tag) for tag in tool_format.tags}

    def job() -> LLMatcher:
        reason = ""
        for check in (None, lambda source: compiler.matcher(_lark(source))[1]):
            rules = LarkRules(ids, check)
            found = [callable_tool(one.entry, one.path, one.is_free) for one in tools]
            call = rules.rule(" | ".join(tool_format.call_rule(one, rules) for one in found))
            start = f'{call} ("\\n" {call})*' if several else call
            matcher, reason = compiler.matcher(_lark(rules.source(start)))
            if not reason:
                return matcher
        raise RequestError(
            f"{param}: the calls of these tools cannot be used as a grammar: "
            f"{short_reason(reason)}. Offer fewer or simpler tools.",
            param=param,
            code="unsupported_schema",
        )

    entries = [[one.entry, one.path, one.is_free] for one in tools]
    key = ("calls", tool_format.name, json.dumps(entries), str(several))
    opening, end = (ids[tag] for tag in tool_format.tags)
    ends = tuple(text.encode() for text in tool_format.value_ends)
    hints = EndHints(ends, () if end is None else (end,))
    return Grammar(compiler, compiler.cached(key, job, param), hints, opening)


def _lark(source: str) -> str:
    grammar: str = LLMatcher.grammar_from_lark(source)
    return grammar
