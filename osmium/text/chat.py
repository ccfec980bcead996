"""Chat templates: messages to the text that the model was trained on.

The template is the model's own, Jinja in a sandbox, with what transformers gives it.  Before that,
messages are put into the one form that templates agree on.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from osmium.errors import CheckpointError, RequestError

__all__ = ["ChatTemplate", "normalise"]

_FAULTS = (
    jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError,
    RecursionError,
)  # fmt: skip
"""What a template raises when messages are not what it expects."""

_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class _Generation(Extension):
    """{% generation %} marks what an assistant says, for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class ChatTemplate:
    """One template."""

    def __init__(
        self,
        source: str,
        tokens: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """`tokens` are bos_token, eos_token and the like; `defaults` are switches such as
        enable_thinking, for those that `render` is not given.  Raises: CheckpointError."""
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise
        env.globals["strftime_now"] = _now
        self._tokens, self._defaults = dict(tokens or {}), dict(defaults or {})
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
        """From chat_template.jinja, else from tokenizer_config.json: a text, or a list of named
        ones of which `default` counts.  None where there is neither.  Raises: CheckpointError."""
        config = config or {}
        try:
            source: Any = jinja.decode() if jinja is not None else config.get("chat_template")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"chat_template.jinja is not UTF-8: {error}.") from None
        if isinstance(source, list):
            named = [one for one in source if isinstance(one, Mapping)]
            source = next((o.get("template") for o in named if o.get("name") == "default"), source)
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError(
                "chat_template in tokenizer_config.json is neither a text nor a list with one "
                "that is named default."
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
        **more: Any,
    ) -> str:
        """The prompt.  `more` are the template's own switches, such as enable_thinking.

        Raises: RequestError where the template refuses the messages.
        """
        try:
            return self._template.render(
                {
                    **self._tokens,
                    **self._defaults,
                    **more,
                    "messages": normalise(messages),
                    "tools": list(tools) if tools else None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except _FAULTS as error:
            raise RequestError(
                f"The model's chat template refuses these messages: {error}",
                param="messages",
                code="template_error",
            ) from None


def normalise(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them.

    Leading system and developer messages become one; a later one is told as a user's.  Contents in
    parts become text.  A tool call's arguments become an object.  `reasoning` becomes
    `reasoning_content`.  Raises: RequestError naming the message.
    """
    if not messages:
        raise RequestError("messages is empty; it needs at least one.", param="messages",
                           code="invalid_value")  # fmt: skip
    found: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        one = {key: value for key, value in message.items() if value is not None}
        role = str(one.get("role", ""))
        one["content"] = _text(one.get("content", ""), f"messages[{i}].content")
        if role == "developer":
            role = "system"
        if role == "system":
            if len(found) == 1 and found[0]["role"] == "system":
                found[0]["content"] += "\n\n" + one["content"]
                continue
            if found:
                role = "user"
        one["role"] = role
        if "reasoning" in one and "reasoning_content" not in one:
            one["reasoning_content"] = one["reasoning"]
        if "tool_calls" in one:
            one["tool_calls"] = [_call(call, i) for call in one["tool_calls"]]
        found.append(one)
    return found


def _text(content: Any, where: str) -> str:
    """A content's text.  Raises: RequestError for parts that are not text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RequestError(f"{where} is {type(content).__name__}; it must be a text or parts.",
                           param=where, code="invalid_type")  # fmt: skip
    pieces = []
    for j, part in enumerate(content):
        at = f"{where}[{j}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind in (None, "text", "input_text", "output_text") and isinstance(text, str):
            pieces.append(text)
        elif kind == "refusal":
            pieces.append(str(part.get("refusal", "")))
        else:
            raise RequestError(
                f"{at} has type {kind!r}; this model reads text alone.",
                param=at,
                code="unsupported_content",
            )
    return "".join(pieces)


def _call(call: Any, i: int) -> dict[str, Any]:
    """A tool call with its arguments as an object."""
    if not isinstance(call, Mapping):
        raise RequestError(f"messages[{i}].tool_calls holds {call!r}; calls are objects.",
                           param=f"messages[{i}].tool_calls", code="invalid_type")  # fmt: skip
    one = dict(call)
    function = dict(one.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            parsed = None
        # What a model once wrote wrongly must not end the conversation.
        function["arguments"] = parsed if isinstance(parsed, dict) else {"arguments": arguments}
    one["function"] = function
    return one


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes what HTML would not like."""
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
