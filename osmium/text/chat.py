"""Chat templates: messages to the text that the model was trained on.

The template is the model's own, in Jinja's sandbox, with the filters and functions of transformers.
normalise() first converts messages to the form that templates expect.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jinja2
import jinja2.meta
import jinja2.nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from osmium.errors import CheckpointError, RequestError, shown
from osmium.text.added_tokens import content_of
from osmium.text.marked import MarkedText, TrackingEnvironment, concat, markup
from osmium.text.template_files import template_sources
from osmium.text.tool_formats import find_format

__all__ = ["ChatTemplate", "normalise"]

_TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError,
    RecursionError,
)  # fmt: skip
"""Exceptions of a template whose messages have an unexpected form."""

_ROLES = ("system", "user", "assistant", "tool")

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; the first that it has counts."""

_TEXT_PARTS = (None, "text", "input_text", "output_text")
"""Types of parts that have a text."""

_MAX_ENCODED = 4
"""How often a call's arguments may be encoded as JSON."""

_SURROGATE = re.compile("[\ud800-\udfff]")

MAX_DEPTH = 100
"""Deepest nesting of a template's statements and expressions; the demo's template has 15 levels."""

MAX_TEXT = 1 << 20
"""Most characters or items that a template's multiplication makes."""

MAX_BITS = 1 << 12
"""Most bits of a template's integers."""

_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


PRESERVE_THINKING = "preserve_thinking"
"""The variable with which Qwen3.6's template keeps the reasoning of all turns.

Without it, an earlier turn loses its reasoning once the user writes again.  Then its tokens are not
those that the model has computed."""


class _Generation(Extension):
    """{% generation %} marks the assistant's text for training; its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Sandbox(TrackingEnvironment):
    """Jinja's sandbox, in which arithmetic has bounded results; it is not computed at compiling."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Raises: OverflowError for a result of more than MAX_TEXT characters or MAX_BITS bits."""
        if operator == "*":
            size = max(_size(left) * _factor(right), _size(right) * _factor(left))
            bits = _bits(left) + _bits(right)
        elif operator == "**":
            size, bits = 0, _bits(left) * _factor(right)
        else:
            wide = isinstance(left, str) and re.search(r"%[^a-zA-Z%]*(\*|\d{5})", left)
            size, bits = (MAX_TEXT + 1 if wide else 0), 0
        if size > MAX_TEXT or bits > MAX_BITS:
            raise OverflowError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _factor(value: Any) -> int:
    return max(0, value) if isinstance(value, int) else 0


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


class ChatTemplate:
    """A model's chat template."""

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
        *,
        tool_source: str | None = None,
    ) -> None:
        """Compile the template, and with `tool_source` another one for requests with tools.

        `tokens` are bos_token, eos_token and others.  `defaults` are variables such as
        enable_thinking; arguments of `render` override them.  Raises: CheckpointError.
        """
        env = _Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise
        env.globals["strftime_now"] = _now
        self._tokens = {name: markup(token) for name, token in (tokens or {}).items()}
        self._defaults = dict(defaults or {})
        self.source = source
        """The template's text."""
        self.tool_format = find_format(tool_source, source)
        """How the model writes calls of tools; None if the template does not tell it."""
        self._tool_defaults = (
            {PRESERVE_THINKING: True} if PRESERVE_THINKING in (tool_source or source) else {}
        )
        """Defaults for requests with tools: the template keeps the reasoning of earlier turns."""
        try:
            self._template = _compiled(env, source)
            self._tool_template = self._template
            if tool_source is not None:
                self._tool_template = _compiled(env, tool_source)
            self.variables = _variables(env, source) | _variables(env, tool_source or "")
            """Names of the variables that the template may read."""
        except (*_TEMPLATE_ERRORS, SyntaxError, MemoryError) as error:
            raise CheckpointError(
                f"The chat template cannot be read: {str(error)[:500] or type(error).__name__}."
            ) from None

    @classmethod
    def find(
        cls,
        jinja: bytes | None,
        config: Mapping[str, Any] | None,
        defaults: Mapping[str, Any] | None = None,
        *,
        legacy: Mapping[str, Any] | None = None,
        tool_jinja: bytes | None = None,
    ) -> "ChatTemplate | None":
        """The template of a model's files (template_files.py), or None.

        Raises: CheckpointError for a template that cannot be read.
        """
        config = config or {}
        sources = template_sources(jinja, config, legacy, tool_jinja)
        if sources is None:
            return None
        tokens = {name: content for name in _TOKENS if (content := content_of(config.get(name)))}
        return cls(sources[0], tokens, defaults, tool_source=sources[1])

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        /,
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt, a MarkedText.  `variables` are the template's own, such as enable_thinking.

        Half a surrogate pair, which is not Unicode, becomes U+FFFD.
        Raises: RequestError if the template fails on the messages.
        """
        template = self._tool_template if tools else self._template
        try:
            text = template.render(
                {
                    **self._tokens,
                    **(self._tool_defaults if tools else {}),
                    **self._defaults,
                    **variables,
                    "messages": normalise(messages),
                    "tools": list(tools) if tools else None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except _TEMPLATE_ERRORS as error:
            raise RequestError(
                f"The model's chat template fails on these messages: {error}",
                param="messages",
                code="template_error",
            ) from None
        if not isinstance(text, MarkedText):
            text = MarkedText(text)
        if not text.isascii() and _SURROGATE.search(text):
            text = MarkedText(_SURROGATE.sub("\ufffd", text), text.mask)
        return text


def _compiled(env: _Sandbox, source: str) -> jinja2.Template:
    """The template.  Raises: ValueError for one that is nested deeper than MAX_DEPTH.

    Python takes seconds to refuse an expression in 200 parentheses.
    """
    tree = env.parse(source)
    level, depth = [cast(jinja2.nodes.Node, tree)], 0
    while level:
        level = [child for node in level for child in node.iter_child_nodes()]
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    return env.from_string(tree)


def _variables(env: _Sandbox, source: str) -> frozenset[str]:
    return frozenset(jinja2.meta.find_undeclared_variables(env.parse(source)))


def normalise(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them.

    Leading system and developer messages are merged into one; later ones get the role "user".
    Contents in parts become text; a refusal stands for a content that is empty.  A tool call's
    arguments become an object.  Reasoning has the name `reasoning_content`; without it, the tags of
    a think block that begins an assistant's content are markup.  So is a role, of which templates
    make tokens.  Raises: RequestError that names the message.
    """
    if not messages:
        raise RequestError("messages is empty; send at least one.", param="messages",
                           code="invalid_value")  # fmt: skip
    normalised: list[dict[str, Any]] = []
    for i, given in enumerate(messages):
        message = {key: value for key, value in given.items() if value is not None}
        role = str(message.get("role", ""))
        content = message.get("content", "")
        if content in ("", []):
            content = message.get("refusal", "")
        message["content"] = _text(content, f"messages[{i}].content")
        if role == "developer":
            role = "system"
        if role == "system":
            if len(normalised) == 1 and normalised[0]["role"] == "system":
                normalised[0]["content"] += "\n\n" + message["content"]
                continue
            if normalised:
                role = "user"
        message["role"] = markup(role) if role in _ROLES else role
        reasoning = next((message[name] for name in _REASONING if name in message), None)
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        elif role == "assistant":
            message["content"] = _think_block(message["content"])
        if "tool_calls" in message:
            message["tool_calls"] = [_tool_call(call, i) for call in message["tool_calls"]]
        normalised.append(message)
    return normalised


def _text(content: Any, param: str) -> str:
    """A content's text.  Raises: RequestError for parts that are not text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RequestError(f"{param} is {type(content).__name__}; it must be a text or parts.",
                           param=param, code="invalid_type")  # fmt: skip
    pieces = []
    for j, part in enumerate(content):
        part_param = f"{param}[{j}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else part
        name = "text"
        if kind == "refusal":
            kind, name = "text", "refusal"
            text = "" if part.get("refusal") is None else part["refusal"]
        if kind in _TEXT_PARTS and isinstance(text, str):
            pieces.append(text)
        elif kind in _TEXT_PARTS and isinstance(part, Mapping):
            raise RequestError(f"{part_param}.{name} is {shown(text)}; it must be a text.",
                               param=part_param, code="invalid_type")  # fmt: skip
        else:
            raise RequestError(
                f"{part_param} has type {kind!r}; this model supports only text.",
                param=part_param,
                code="unsupported_content",
            )
    return "".join(pieces)


def _think_block(content: str) -> str:
    """`content`, with the tags of a think block at its beginning as markup.

    A model wrote these tags as control tokens.  The template parts the block, if it does so.
    """
    block = re.match(r"\s*(<think>)(.*?)(</think>)", content, re.DOTALL)
    if block is None:
        return content
    return concat(
        [content[: block.start(1)], markup(block[1]), block[2], markup(block[3]),
         content[block.end() :]]
    )  # fmt: skip


def _tool_call(call: Any, i: int) -> dict[str, Any]:
    """A tool call as {"function": {"name", "arguments"}}, its arguments an object.

    Takes the flat form {"name", "arguments"}, too.  Raises: RequestError.
    """
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping | None):
        raise RequestError(f"messages[{i}].tool_calls holds {call!r}; calls are objects.",
                           param=f"messages[{i}].tool_calls", code="invalid_type")  # fmt: skip
    if function is None:
        function = {name: call[name] for name in ("name", "arguments") if name in call}
    name = function.get("name")
    function = {
        **function,
        "name": name if isinstance(name, str) else "",
        "arguments": _arguments(function.get("arguments")),
    }
    flat = {name: function[name] for name in ("name", "arguments") if name in call}
    return {**call, **flat, "function": function}


def _arguments(value: Any) -> dict[str, Any]:
    """A call's arguments; empty for all that is not an object, nor the JSON of one.

    Invalid arguments that a model generated earlier must not end the conversation.
    """
    for _ in range(_MAX_ENCODED):
        if not isinstance(value, str):
            break
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return dict(value) if isinstance(value, Mapping) else {}


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
