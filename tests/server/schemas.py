"""Random JSON Schemas, and prompts that tempt a model to answer otherwise."""

import numpy as np

__all__ = ["PROMPTS", "Schema", "random_schema"]

Schema = dict[str, object]

PROMPTS = (
    "What is the capital of France?", "Hello!", "Write a poem, in plain text only.",
    "Answer with the word no and nothing else.", "", "{",
    '```json\n{"a": 1', "Zähle bis zehn. 你好",
)  # fmt: skip

_NAMES = ("name", "age", "tags", "é", 'q"uote', "a b", "$ref", "x", "items", "address", "")
_STRINGS: tuple[Schema, ...] = (
    {}, {"minLength": 3}, {"maxLength": 4}, {"minLength": 2, "maxLength": 2},
    {"pattern": "^[A-Z]{2}-[0-9]{3}$"}, {"pattern": "^(ab)+c$"}, {"format": "date"},
    {"format": "uuid"}, {"format": "ipv4"}, {"format": "date-time"}, {"format": "email"},
    {"format": "password"}, {"pattern": "^\\\\d+\"$"},
)  # fmt: skip
_NUMBERS: tuple[Schema, ...] = (
    {}, {"minimum": 0}, {"maximum": -5}, {"minimum": 3, "maximum": 17}, {"exclusiveMinimum": 0.5},
    {"multipleOf": 5}, {"minimum": -2, "exclusiveMaximum": 2},
)  # fmt: skip


def random_schema(rng: np.random.Generator, depth: int = 3) -> Schema:
    """A schema of the supported keywords, which some value satisfies."""
    scalars = ("string", "number", "integer", "boolean", "null", "enum", "const", "types")
    kinds = scalars + (("object", "array", "anyOf", "tuple", "map", "ref") if depth else ())
    kind = str(rng.choice(kinds))
    if kind == "string":
        return {"type": "string", **_pick(rng, _STRINGS)}
    if kind in ("number", "integer"):
        return {"type": kind, **_pick(rng, _NUMBERS)}
    if kind == "enum":
        return {"enum": [*rng.permutation(["a", "ab", "ü", '"', "\\", "\n"])[:3].tolist(), 7, None]}
    if kind == "const":
        return {"const": _pick(rng, ({"a": [1, {}]}, {"b": "x"}, {"": None}))}
    if kind == "types":
        return {"type": rng.permutation(["string", "null", "integer"])[:2].tolist()}
    if kind == "object":
        names = [str(name) for name in rng.permutation(_NAMES)[: int(rng.integers(0, 5))]]
        required = [name for name in names if rng.random() < 0.7]
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth - 1) for name in names},
            "required": required,
            "additionalProperties": bool(rng.random() < 0.2),
        }
    if kind == "array":
        low = int(rng.integers(0, 3))
        return {
            "type": "array", "items": random_schema(rng, depth - 1),
            "minItems": low, "maxItems": low + int(rng.integers(0, 3)),
        }  # fmt: skip
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
    if kind == "tuple":
        first = [random_schema(rng, depth - 1) for _ in range(2)]
        return {"type": "array", "prefixItems": first, "items": False, "minItems": 2}
    if kind == "map":
        return {"type": "object", "additionalProperties": random_schema(rng, 0)}
    if kind == "ref":
        value = random_schema(rng, 0)
        tree: Schema = {
            "type": "object",
            "properties": {"value": value, "next": {"$ref": "#/$defs/tree"}},
            "required": ["value"],
            "additionalProperties": False,
        }
        # "#" is the whole schema, so only a schema at the top may have definitions.
        return {"$ref": "#/$defs/tree", "$defs": {"tree": tree}} if depth == 3 else value
    return {"type": kind}


def _pick(rng: np.random.Generator, choices: tuple[Schema, ...]) -> Schema:
    return choices[int(rng.integers(len(choices)))]
