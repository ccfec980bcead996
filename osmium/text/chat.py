"""Chat templates: messages to the text that the model was trained on.

The template is the model's own, in Jinja's sandbox, with the filters and functions of transformers.
normalise() first converts messages to the form that templates expect.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from osmium.errors import CheckpointError, RequestError
from osmium.text.marked import MarkedText, TrackingEnvironment, concat, markup

__all__ = ["ChatTemplate", "normalise"]

_TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError,
    RecursionError,
)  # fmt: skip
"""Exceptions of a template whose messages have an unexpected form."""

_ROLES = ("system", "user", "assistant", "tool")

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; the first that it has counts."""

_MAX_ENCODED = 4
"""How often a call's arguments may be encoded as JSON."""

_SURROGATE = re.compile("[\ud800-\udfff]")

_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class _Generation(Extension):
    """{% generation %} marks the assistant's text for training; its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class ChatTemplate:
    """A model's chat template."""

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Compile the template.

        `tokens` are bos_token, eos_token and others.  `defaults` are variables such as
        enable_thinking; arguments of `render` override them.  Raises: CheckpointError.
        """
        env = TrackingEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise
        env.globals["strftime_now"] = _now
        self._tokens = {name: markup(token) for name, token in (tokens or {}).items()}
        self._defaults = dict(defaults or {})
        try:
            self._template = env.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"The chat template cannot be read: {error}") from None

    @classmethod
    def find(
        cls,
        jinja: bytes | None,
        config: Mapping[str, Any] | None,
        defaults: Mapping[str, Any] | None = None,
    ) -> "ChatTemplate | None":
        """The template of chat_template.jinja, else of tokenizer_config.json, else None.

        The latter holds a text, or a list of named templates, of which `default` is used.
        Raises: CheckpointError for a template that cannot be read.
        """
        config = config or {}
        try:
            source: Any = jinja.decode() if jinja is not None else config.get("chat_template")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"chat_template.jinja is not UTF-8: {error}.") from None
        if isinstance(source, list):
            named = [item for item in source if isinstance(item, Mapping)]
            source = next((t.get("template") for t in named if t.get("name") == "default"), source)
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError(
                "chat_template in tokenizer_config.json is neither a text nor a list with a "
                "template named default."
            )
        tokens = {}
        for name in _TOKENS:
            value = config.get(name)
            if isinstance(value, Mapping):
                value = value.get("content")
            if isinstance(value, str):
                tokens[name] = value
        return cls(source, tokens, defaults)

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
        try:
            text = self._template.render(
                {
                    **self._tokens,
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


def normalise(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them.

    Leading system and developer messages are merged into one; later ones get the role "user".
    Contents in parts become text.  A tool call's arguments become an object.  Reasoning has the
    name `reasoning_content`; without it, the tags of a think block that begins an assistant's
    content are markup.  So is a role, of which templates make tokens.  Raises: RequestError that
    names the message.
    """
    if not messages:
        raise RequestError("messages is empty; send at least one.", param="messages",
                           code="invalid_value")  # fmt: skip
    normalised: list[dict[str, Any]] = []
    for i, given in enumerate(messages):
        message = {key: value for key, value in given.items() if value is not None}
        role = str(message.get("role", ""))
        message["content"] = _text(message.get("content", ""), f"messages[{i}].content")
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
        if kind in (None, "text", "input_text", "output_text") and isinstance(text, str):
            pieces.append(text)
        elif kind == "refusal":
            pieces.append(str(part.get("refusal", "")))
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
