"""The token mask of a request: structured output, calls of tools, the budget of the thinking."""

from collections.abc import Callable
from functools import partial

from osmium.engine.engine import Engine
from osmium.engine.request import SamplingParams, TokenMask
from osmium.errors import RequestError
from osmium.server.compilers import grammar_compiler
from osmium.server.schema import BaseRequest, ChatRequest
from osmium.server.structured import constraint
from osmium.server.thinking import thinking_budget
from osmium.server.tools import ToolChoice, tool_choice
from osmium.text.call_grammar import CallableEntry, compile_calls
from osmium.text.grammar import Grammar
from osmium.text.thinking_budget import ThinkingBudget

__all__ = ["token_masks"]

MakeMask = Callable[[], TokenMask]


def token_masks(
    engine: Engine, request: BaseRequest, params: SamplingParams, prompt_tokens: int, thinking: bool
) -> MakeMask | None:
    """A function that makes the mask of one choice; None if any token may come.

    `thinking`: the response starts with it.  Raises: RequestError.
    """
    left = engine.context - prompt_tokens
    if params.max_tokens is not None:
        left = min(left, params.max_tokens)
    make = _text_mask(engine, request, left, thinking)
    budget = thinking_budget(request) if isinstance(request, ChatRequest) else None
    if budget is None or engine.tokenizer is None:
        return make
    limit, tokenizer = budget, engine.tokenizer
    return lambda: ThinkingBudget(limit, tokenizer, thinking, make() if make else None)


def _text_mask(engine: Engine, request: BaseRequest, left: int, thinking: bool) -> MakeMask | None:
    """The mask of the text and its calls."""
    if isinstance(request, ChatRequest):
        choice = tool_choice(request.tool_choice, request.tools)
        if choice.required:
            grammar = _required_calls(engine, request, choice)
            return partial(grammar.mask, left, thinking)
        opening, calls = _optional_calls(engine, request, choice)
    else:
        opening, calls = None, None
    found = constraint(request)
    if found is not None:
        compiler = grammar_compiler(engine, found.param)
        grammar = compiler.compile(found.kind, found.value, found.param)
        return partial(grammar.mask, left, thinking, opening, calls)
    return None if calls is None else partial(calls.call_mask, left, thinking)


def _required_calls(engine: Engine, request: ChatRequest, choice: ToolChoice) -> Grammar:
    """The grammar of a response that is calls alone.  Raises: RequestError."""
    if engine.template.tool_format is None:
        raise RequestError(
            f"tool_choice requires a call, but the chat template of {engine.name} has no known "
            "format of calls. Use 'auto' or 'none'.",
            param="tool_choice",
            code="unsupported_value",
        )
    if request.ignore_eos:
        raise RequestError(
            "ignore_eos is true beside a tool_choice that requires a call, which has an end. Omit "
            "one of them.",
            param="ignore_eos",
            code="unsupported_value",
        )
    compiler = grammar_compiler(engine, "tool_choice")
    several = not choice.one and request.parallel_tool_calls is not False
    entries = _entries(request, choice)
    return compile_calls(
        compiler, engine.template.tool_format, entries, "tool_choice", several=several
    )


def _optional_calls(
    engine: Engine, request: ChatRequest, choice: ToolChoice
) -> tuple[int | None, Grammar | None]:
    """The token that begins a call, if there are tools, and the grammar of calls.

    Without strict tools, and where all may be called, calls are free.
    """
    tool_format = engine.template.tool_format
    constrained = constraint(request) is not None
    strict = any(tool["function"].get("strict") for tool in request.tools or ())
    if not request.tools or choice.none or tool_format is None:
        return None, None
    if not (constrained or strict or choice.names is not None):
        return None, None
    if engine.tokenizer is None or not engine.config.eos_token_ids:
        return None, None
    compiler = grammar_compiler(engine, "tools")
    opening = compiler.tag_token(tool_format.tags[0])
    if opening is None or not (strict or choice.names is not None):
        return opening, None
    entries = [
        CallableEntry(one.entry, one.path, not one.entry["function"].get("strict"))
        for one in _entries(request, choice)
    ]
    return opening, compile_calls(compiler, tool_format, entries, "tools")


def _entries(request: ChatRequest, choice: ToolChoice) -> list[CallableEntry]:
    """The tools that may be called."""
    return [
        CallableEntry(tool, f"tools[{i}]")
        for i, tool in enumerate(request.tools or ())
        if choice.names is None or tool["function"]["name"] in choice.names
    ]
