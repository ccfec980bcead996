"""Structured output in requests: response_format, guided_*, structured_outputs, grammar.

A request has at most one of them.  OpenAI's names, vLLM's and llama-server's are accepted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from osmium.errors import RequestError
from osmium.server.limits import shown
from osmium.text.grammar import GrammarKind

__all__ = ["OUTPUT_OPTIONS", "Constraint", "StructuredFields", "constraint"]

ANY_OBJECT = {"type": "object"}
"""The schema of json_object."""


class StructuredFields(Protocol):
    """The fields of a request that this module reads."""

    response_format: dict[str, Any] | None
    guided_json: Any
    guided_regex: Any
    guided_choice: Any
    guided_grammar: Any
    structured_outputs: Any
    grammar: Any
    json_schema: Any
    regex: Any
    ebnf: Any
    ignore_eos: bool | None


@dataclass(frozen=True)
class Constraint:
    """What a response must match, and the field that says so."""

    kind: GrammarKind
    value: Any
    param: str


_FIELDS: tuple[tuple[str, GrammarKind], ...] = (
    ("guided_json", "json"), ("guided_regex", "regex"), ("guided_choice", "choice"),
    ("guided_grammar", "grammar"), ("grammar", "grammar"), ("json_schema", "json"),
    ("regex", "regex"), ("ebnf", "grammar"),
)  # fmt: skip

_OUTPUTS: dict[str, GrammarKind] = {
    "json": "json", "regex": "regex", "choice": "choice", "grammar": "grammar",
}  # fmt: skip
"""Keys of structured_outputs with a value to compile."""

OUTPUT_OPTIONS = ("disable_fallback", "disable_any_whitespace",
                   "disable_additional_properties", "whitespace_pattern")  # fmt: skip
"""Options of structured_outputs in vLLM; only values that change nothing are accepted."""


def constraint(request: StructuredFields) -> Constraint | None:
    """What the response must match; None for any text.

    Raises: RequestError for more than one, and for types that Osmium does not have.
    """
    found = [*_constraints(request)]
    if len(found) > 1:
        raise RequestError(
            f"{found[0].param} and {found[1].param} both restrict the response; send one of them.",
            param=found[1].param,
            code="invalid_value",
        )
    if found and request.ignore_eos:
        raise RequestError(
            f"ignore_eos is true beside {found[0].param}, whose text has an end. Omit one of them.",
            param="ignore_eos",
            code="unsupported_value",
        )
    return found[0] if found else None


def _constraints(request: StructuredFields) -> Iterator[Constraint]:
    if request.response_format is not None:
        yield from _response_format(request.response_format)
    for name, kind in _FIELDS:
        value = getattr(request, name)
        if value is not None and value != "":
            yield Constraint(kind, value, name)
    if request.structured_outputs is not None:
        yield from _structured_outputs(request.structured_outputs)


def _response_format(value: dict[str, Any]) -> Iterator[Constraint]:
    """OpenAI's response_format, and llama-server's `schema` in it."""
    kind = value.get("type")
    if kind == "text":
        return
    if kind == "json_object":
        schema = value.get("schema")
        if schema is None:
            yield Constraint("json", ANY_OBJECT, "response_format")
        else:
            yield Constraint("json", schema, "response_format.schema")
    elif kind == "json_schema":
        inner, param = value.get("json_schema"), "response_format.json_schema"
        if inner is None and "schema" in value:
            inner, param = value, "response_format"
        if not isinstance(inner, Mapping):
            raise RequestError(
                f"{param} is {_type(inner)}; it must be an object with `schema`.",
                param=param,
                code="invalid_type",
            )
        schema = inner.get("schema")
        if schema is None:
            raise RequestError(
                f"{param} has no `schema`; send a JSON Schema, or use type 'json_object'.",
                param=f"{param}.schema",
                code="invalid_schema",
            )
        for key, kind, rule in (("name", str, "a text"), ("strict", bool, "true or false")):
            if not isinstance(inner.get(key), kind | None):
                raise RequestError(
                    f"{param}.{key} is {shown(inner[key])}; it must be {rule}.",
                    param=f"{param}.{key}",
                    code="invalid_type",
                )
        yield Constraint("json", schema, f"{param}.schema")
    else:
        raise RequestError(
            f"response_format.type is {shown(kind)}; it must be 'text', 'json_object' or "
            "'json_schema'. For others use structured_outputs.",
            param="response_format.type",
            code="unsupported_value",
        )


def _structured_outputs(value: Any) -> Iterator[Constraint]:
    """vLLM's structured_outputs."""
    if not isinstance(value, Mapping):
        raise RequestError(
            f"structured_outputs is {_type(value)}; it must be an object with one of "
            f"{', '.join(_OUTPUTS)}, json_object.",
            param="structured_outputs",
            code="invalid_type",
        )
    for key, item in value.items():
        param = f"structured_outputs.{key}"
        if item is None:
            continue
        if key in _OUTPUTS:
            yield Constraint(_OUTPUTS[key], item, param)
        elif key == "json_object":
            if not isinstance(item, bool):
                raise RequestError(
                    f"{param} is {shown(item)}; it must be true or false.",
                    param=param,
                    code="invalid_type",
                )
            if item:
                yield Constraint("json", ANY_OBJECT, param)
        elif key not in OUTPUT_OPTIONS or item is not False:
            raise RequestError(
                f"{param} is {shown(item)}, which is not supported: use one of "
                f"{', '.join(_OUTPUTS)}, json_object.",
                param=param,
                code="unsupported_value",
            )


def _type(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
