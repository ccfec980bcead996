"""Whether and how much a model thinks: the fields of several APIs as variables of the template."""

from collections.abc import Mapping
from typing import Any, Protocol

from osmium.errors import RequestError
from osmium.server.limits import shown

__all__ = [
    "EFFORTS", "MIN_BUDGET", "REASONING_KEYS", "THINKING_KEYS", "THINKING_TYPES",
    "ThinkingFields", "efforts_to_try", "shows_reasoning", "thinking_budget", "thinking_options",
]  # fmt: skip

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""Values of reasoning_effort, least first."""

MIN_BUDGET = -1
"""The least budget of reasoning tokens, which sets no limit; 0 is no reasoning."""

THINKING_KEYS = ("type", "budget_tokens", "display", "clear_thinking", "keep")
THINKING_TYPES = ("enabled", "adaptive", "auto", "disabled")
"""Keys of `thinking`, and values of its type."""

REASONING_KEYS = ("effort", "enabled", "exclude", "max_tokens", "summary", "generate_summary")
"""Keys of `reasoning`."""


class ThinkingFields(Protocol):
    """Fields of a chat about its reasoning."""

    chat_template_kwargs: dict[str, Any] | None
    enable_thinking: bool | None
    reasoning_effort: str | None
    thinking: dict[str, Any] | bool | None
    reasoning: dict[str, Any] | None
    thinking_token_budget: int | None
    reasoning_budget_tokens: int | None
    thinking_budget: int | None
    include_reasoning: bool | None


def thinking_options(fields: ThinkingFields) -> dict[str, Any]:
    """Variables of the chat template.  The more specific field counts.  Raises: RequestError."""
    options = _template_kwargs(fields.chat_template_kwargs or {})
    switch, effort = _switch(fields), _effort(fields)
    if switch is not None:
        options["enable_thinking"] = switch
    if effort is not None:
        options["reasoning_effort"] = effort
        if effort == "none":
            options.setdefault("enable_thinking", False)
    return options


def _template_kwargs(given: Mapping[str, Any]) -> dict[str, Any]:
    """A copy.  Raises: RequestError for variables that are fields of the request itself."""
    for name in ("messages", "tools", "documents"):
        if name in given:
            path = f"chat_template_kwargs.{name}"
            raise RequestError(
                f"{path} has no effect: the template gets the field {name} of the request.",
                param=path,
                code="unsupported_value",
            )
    switch = given.get("enable_thinking")
    if not isinstance(switch, bool | None):
        raise _invalid("chat_template_kwargs.enable_thinking", switch, "true or false")
    return dict(given)


def shows_reasoning(fields: ThinkingFields) -> bool:
    """Whether the response contains the reasoning."""
    return fields.include_reasoning is not False and not (fields.reasoning or {}).get("exclude")


def efforts_to_try(effort: Any) -> list[str]:
    """Other efforts for a template that refuses `effort`, nearest first."""
    if effort not in EFFORTS:
        return []
    at = EFFORTS.index(effort)
    others = [other for other in EFFORTS[1:] if other != effort]
    return sorted(others, key=lambda other: (abs(EFFORTS.index(other) - at), other))


def thinking_budget(fields: ThinkingFields) -> int | None:
    """Most tokens of the reasoning: the least budget of the request; None for no limit.

    Raises: RequestError.
    """
    budgets = _budgets(fields)
    if isinstance(fields.thinking, Mapping) and fields.thinking.get("type") != "disabled":
        budgets.append(
            _checked_budget("thinking.budget_tokens", fields.thinking.get("budget_tokens"))
        )
    if fields.reasoning is not None:
        budgets.append(_checked_budget("reasoning.max_tokens", fields.reasoning.get("max_tokens")))
    return min((budget for budget in budgets if budget is not None), default=None)


def _switch(fields: ThinkingFields) -> bool | None:
    """enable_thinking by the first field that sets it."""
    given = [fields.enable_thinking, _thinking(fields.thinking), _reasoning(fields.reasoning)]
    given += [False for budget in _budgets(fields) if budget == 0]
    return next((value for value in given if value is not None), None)


_BUDGETS = ("thinking_token_budget", "reasoning_budget_tokens", "thinking_budget")
_BUDGET_VARIABLE = "chat_template_kwargs.thinking_budget"


def _budgets(fields: ThinkingFields) -> list[int | None]:
    """The budgets of the fields, and of the template's variable.  Raises: RequestError."""
    given = {name: getattr(fields, name) for name in _BUDGETS}
    given[_BUDGET_VARIABLE] = (fields.chat_template_kwargs or {}).get("thinking_budget")
    return [_checked_budget(name, value) for name, value in given.items()]


def _checked_budget(name: str, value: Any) -> int | None:
    """The most tokens of the reasoning; None without a limit.  Raises: RequestError."""
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < MIN_BUDGET:
        rule = "a number of tokens, 0 for no reasoning, or -1 for no limit"
        raise _invalid(name, value, rule)
    return None if value == MIN_BUDGET else value


def _thinking(value: Mapping[str, Any] | bool | None) -> bool | None:
    """The switch of `thinking`.  Raises: RequestError."""
    if value is None or isinstance(value, bool):
        return value
    _check_keys("thinking", value, THINKING_KEYS)
    kind = value.get("type")
    if kind not in THINKING_TYPES:
        raise _invalid("thinking.type", kind, f"one of {', '.join(THINKING_TYPES)}")
    if kind == "disabled":
        return False
    if _checked_budget("thinking.budget_tokens", value.get("budget_tokens")) == 0:
        return False
    return None if kind == "auto" else True


def _reasoning(value: Mapping[str, Any] | None) -> bool | None:
    """The switch of `reasoning`.  Raises: RequestError."""
    if value is None:
        return None
    _check_keys("reasoning", value, REASONING_KEYS)
    for name in ("enabled", "exclude"):
        if not isinstance(value.get(name), bool | None):
            raise _invalid(f"reasoning.{name}", value[name], "true or false")
    if _checked_budget("reasoning.max_tokens", value.get("max_tokens")) == 0:
        return False
    enabled: bool | None = value.get("enabled")
    return enabled


def _effort(fields: ThinkingFields) -> str | None:
    """The effort of reasoning_effort, or of `reasoning`.  Raises: RequestError."""
    for name, value in (
        ("reasoning_effort", fields.reasoning_effort),
        ("reasoning.effort", (fields.reasoning or {}).get("effort")),
    ):
        if value is None:
            continue
        if value not in EFFORTS:
            raise _invalid(name, value, f"one of {', '.join(EFFORTS)}")
        return str(value)
    return None


def _check_keys(name: str, value: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in value:
        if key not in known:
            path = f"{name}.{key[:64]}"
            raise RequestError(
                f"{path} is not known; {name} has {', '.join(known)}. Omit it.",
                param=path,
                code="unknown_field",
            )


def _invalid(name: str, value: object, rule: str) -> RequestError:
    return RequestError(
        f"{name} is {shown(value)}; it must be {rule}.", param=name, code="invalid_value"
    )
