"""The prompt of a chat, from its messages and the model's template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from osmium.engine.engine import Engine
from osmium.errors import RequestError
from osmium.server.limits import shown
from osmium.server.schema import ChatRequest
from osmium.server.thinking import efforts_to_try, thinking_options
from osmium.text.reasoning import starts_in_reasoning

__all__ = ["ChatPrompt", "render_chat", "unused_variables"]

_END_MARK = "\ufdd0\ufdd1\ufdd0"
"""Noncharacters that mark the end of the message to continue; a template renders them as text."""

_SWITCHES = ("add_generation_prompt", "continue_final_message")

_HONOURED = (*_SWITCHES, "thinking_budget")
"""Keys of chat_template_kwargs that have an effect with any template."""


@dataclass
class ChatPrompt:
    """A rendered prompt, a MarkedText."""

    text: str
    thinking: bool
    """Whether the response starts with reasoning."""
    tools: Sequence[Any] | None
    """The tools that the prompt offers."""
    num_tokens: int = 0
    """The prompt's tokens, once it is tokenized."""


def render_chat(engine: Engine, body: ChatRequest) -> ChatPrompt:
    """Render the messages; with continue_final_message the prompt ends in the last one.

    Raises: RequestError.
    """
    if engine.tokenizer is None or engine.template is None:
        raise RequestError(f"{engine.name} has no chat template; use /v1/completions.",
                           param="messages", code="no_chat_template")  # fmt: skip
    options = thinking_options(body)
    begins, continues = _switches(body, options)
    tools = None if body.tool_choice == "none" else body.tools
    messages: Sequence[Any] = body.messages
    in_reasoning = False
    if continues:
        messages, in_reasoning = _marked(messages)
    text = _render(engine, messages, tools, begins, options)
    if not continues:
        return ChatPrompt(text, starts_in_reasoning(text), tools)
    at = text.rfind(_END_MARK)
    if at < 0:
        raise _cannot_continue("the chat template leaves out its text")
    text = text[:at]
    return ChatPrompt(text, in_reasoning or starts_in_reasoning(text), tools)


def unused_variables(engine: Engine, body: ChatRequest) -> tuple[str, ...]:
    """The paths of chat_template_kwargs that the template does not read; null is absent."""
    read = {*engine.template.variables, *_HONOURED} if engine.template is not None else set()
    given = (body.chat_template_kwargs or {}).items()
    return tuple(
        f"chat_template_kwargs.{name}"
        for name, value in given
        if value is not None and name not in read
    )


def _render(
    engine: Engine,
    messages: Sequence[Any],
    tools: Sequence[Any] | None,
    begins: bool,
    options: dict[str, Any],
) -> str:
    """Render, with the nearest effort that the template takes.  Raises: RequestError."""
    render = engine.template.render
    try:
        return str(render(messages, tools, add_generation_prompt=begins, **options))
    except RequestError as error:
        for effort in efforts_to_try(options.get("reasoning_effort")):
            other = {**options, "reasoning_effort": effort}
            try:
                return str(render(messages, tools, add_generation_prompt=begins, **other))
            except RequestError:
                continue
        raise error


def _switches(body: ChatRequest, options: dict[str, Any]) -> tuple[bool, bool]:
    """add_generation_prompt and continue_final_message, also of chat_template_kwargs.

    Raises: RequestError if both are true.
    """
    given = []
    for name in _SWITCHES:
        value = options.pop(name, None)
        if not isinstance(value, bool | None):
            path = f"chat_template_kwargs.{name}"
            raise RequestError(f"{path} is {shown(value)}; it must be true or false.",
                               param=path, code="invalid_value")  # fmt: skip
        own = getattr(body, name)
        given.append(value if own is None else own)
    begins, continues = given
    if begins and continues:
        raise RequestError(
            "continue_final_message and add_generation_prompt are both true; a prompt ends in the "
            "last message or begins another one. Omit add_generation_prompt.",
            param="continue_final_message",
            code="invalid_value",
        )
    return begins is not False and not continues, bool(continues)


def _marked(messages: Sequence[Any]) -> tuple[list[Any], bool]:
    """The messages with a mark at the end of the last one, and whether that is in its reasoning.

    Raises: RequestError for a message that cannot be continued.
    """
    last = dict(messages[-1])
    if last.get("role") != "assistant":
        raise _cannot_continue(f"its role is {shown(last.get('role'))}, not 'assistant'")
    if last.get("tool_calls"):
        raise _cannot_continue("it has tool_calls")
    content = last.get("content")
    for name in ("reasoning_content", "thinking", "reasoning"):
        if not content and isinstance(last.get(name), str) and last[name]:
            last[name] += _END_MARK
            return [*messages[:-1], last], True
    if isinstance(content, list):
        last["content"] = [*content, {"type": "text", "text": _END_MARK}]
    elif isinstance(content, str | None):
        last["content"] = (content or "") + _END_MARK
    return [*messages[:-1], last], False


def _cannot_continue(reason: str) -> RequestError:
    return RequestError(
        f"continue_final_message is true, but the last message cannot be continued: {reason}.",
        param="continue_final_message",
        code="invalid_value",
    )
