"""JSON schemas drawn at random, whose values have a bounded length."""

from __future__ import annotations

import random

WORDS = ("a", "name", "größe", "名前", "with space", "🙂", 'q"uote', "back\\slash", "x/y", "")
PATTERNS = ("^[a-z]{1,8}$", "^\\d{2}-[A-F]+x?$", "(foo|ba[rz])", "^日本{1,3}", "^ .{0,4}$")
FORMATS = ("date", "uuid", "ipv4")


def random_schema(seed: int) -> dict:
    """A schema of objects, arrays, enums, numbers, strings, choices and references."""
    draw = random.Random(seed)
    definitions = {f"d{i}": _schema(draw, 2, None) for i in range(draw.randint(1, 2))}
    node = {"value": _leaf(draw), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}
    definitions["node"] = {
        "type": "object",
        "properties": node,
        "required": list(node),
        "additionalProperties": False,
    }
    return {**_schema(draw, 3, definitions), "$defs": definitions}


def _schema(draw: random.Random, depth: int, definitions: dict | None) -> dict:
    if definitions and draw.random() < 0.15:
        return {"$ref": f"#/$defs/{draw.choice(list(definitions))}"}
    if depth == 0 or draw.random() < 0.2:
        return _leaf(draw)
    kind = draw.choice(("object", "object", "array", "tuple", "anyOf"))
    if kind == "anyOf":
        return {"anyOf": [_schema(draw, depth - 1, definitions) for _ in range(3)]}
    if kind == "tuple":
        items = [_schema(draw, depth - 1, definitions) for _ in range(draw.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if kind == "array":
        least = draw.randint(0, 2)
        most = least + draw.randint(0, 2)
        items = _schema(draw, depth - 1, definitions)
        return {"type": "array", "items": items, "minItems": least, "maxItems": most}
    names = draw.sample(WORDS, draw.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _schema(draw, depth - 1, definitions) for name in names},
        "required": [name for name in names if draw.random() < 0.6],
        "additionalProperties": False,
    }


def _leaf(draw: random.Random) -> dict:
    low, least = draw.randint(-1000, 1000), draw.randint(0, 4)
    return draw.choice(
        (
            {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 5000)},
            {"type": "integer", "minimum": 0, "maximum": 99, "multipleOf": draw.randint(1, 9)},
            {"type": "number", "minimum": low, "exclusiveMaximum": low + 2.5},
            {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 12)},
            {"type": "string", "pattern": draw.choice(PATTERNS), "maxLength": 20},
            {"type": "string", "format": draw.choice(FORMATS)},
            {"enum": draw.sample((*WORDS, 1, -2.5, None, True, ["a", 1], {"k": "v"}), 3)},
            {"const": draw.choice(WORDS)},
            {"type": ["boolean", "null"]},
        )
    )
