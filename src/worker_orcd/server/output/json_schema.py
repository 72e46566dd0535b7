"""JSON schemas of clients as the grammar compiler reads them."""

from __future__ import annotations

import json
from typing import Any, Final, TypeGuard

from worker_orcd.errors import FieldError, GrammarError

SPACE: Final = r"( |\n[ \t]{0,40})"  # that of `engine/grammar_source.py`, for schemas inside other grammars
_FORMATS: Final = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
)
_NAMED: Final = frozenset(("properties", "patternProperties", "$defs", "definitions"))  # schemas by names
_VALUES: Final = frozenset(("const", "default", "enum", "examples", "x-guidance"))  # no schemas
_LEAST: Final = frozenset(("minimum", "exclusiveMinimum"))
_MOST: Final = frozenset(("maximum", "exclusiveMaximum"))
_MAX_EXACT: Final = 2**53  # the compiler's numbers are doubles
_MAX_PLAIN: Final = 2**63  # beyond, it writes a whole number with an exponent
_LOGIC: Final = frozenset(("allOf", "if", "not", "dependentSchemas", "unevaluatedProperties"))
_BRANCHES: Final = frozenset(("anyOf", "oneOf", "$ref", "$dynamicRef"))
_KEYS: Final = frozenset(("properties", "required", "patternProperties", "minProperties"))


def adapted(schema: Any, param: str) -> Any:
    """`schema` for a model that is to finish: what comes of it satisfies the schema that was given, too.

    Raises GrammarError, naming the field `param`, for numbers that the compiler would change. Bounds beyond all that
    it can tell apart (those of 64-bit integers, of floats) become ±2^53, which is stricter.

    An object with `properties` gets no others, unless the schema speaks of `additionalProperties` or mixes several
    schemas into one object. A format that the compiler cannot enforce (password, binary, …) is left out: JSON Schema
    calls formats remarks.
    """
    try:
        return _adapted(schema, not _mixes(schema))
    except _Inexact as keyword:
        message = f"{param}: {keyword} has a number beyond 2^53 that cannot be enforced exactly"
        raise GrammarError(message, [FieldError(param, "grammar", message)]) from None


def of_function(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of a function's arguments; one that tells of no properties has none."""
    schema = {"type": "object"} | (parameters or {})
    return schema if _BRANCHES & schema.keys() else {"properties": {}} | schema


def inlined(schema: Any) -> str:
    """`schema` as an expression of Lark, with the white space that a schema by itself gets."""
    if not isinstance(schema, dict):
        return f"%json {json.dumps(schema)}"
    return f"%json {json.dumps(schema | {'x-guidance': {'whitespace_pattern': SPACE}})}"


def _adapted(schema: Any, closes: bool) -> Any:
    if isinstance(schema, list):
        return [_adapted(part, closes) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _part(name, value, closes) for name, value in schema.items() if not _is_remark(name, value)}
    if closes and _is_listed(schema):
        made["additionalProperties"] = False
    return made


def _part(name: str, value: Any, closes: bool) -> Any:
    if name in _LEAST and _is_number(value):
        value = max(value, -_MAX_EXACT)
    elif name in _MOST and _is_number(value):
        value = min(value, _MAX_EXACT)
    if (name in _LEAST | _MOST or name == "multipleOf") and _is_number(value) and abs(value) > _MAX_EXACT:
        raise _Inexact(name)
    if name in ("const", "enum") and _is_inexact(value):
        raise _Inexact(name)
    if name in _NAMED and isinstance(value, dict):
        return {key: _adapted(schema, closes) for key, schema in value.items()}
    return value if name in _VALUES else _adapted(value, closes)


class _Inexact(Exception):
    """The keyword whose value the compiler cannot hold."""


def _is_inexact(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_is_inexact, value.values() if isinstance(value, dict) else value))
    is_exact = not _is_number(value) or abs(value) <= _MAX_EXACT
    return not (is_exact or (isinstance(value, int) and abs(value) < _MAX_PLAIN and int(float(value)) == value))


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_remark(name: str, value: Any) -> bool:
    is_loose = name == "uniqueItems" and value is False  # asks for nothing
    return is_loose or (name == "format" and isinstance(value, str) and value not in _FORMATS)


def _is_listed(schema: dict[str, Any]) -> bool:
    """Whether an object has only the properties that the schema lists, as far as it says."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return False
    if {"additionalProperties", "patternProperties", "minProperties"} & schema.keys():
        return False
    return all(isinstance(name, str) and name in properties for name in required)


def _mixes(schema: Any) -> bool:
    """Whether an object may have to satisfy more than one part of `schema`; rather true than false."""
    if isinstance(schema, list):
        return any(map(_mixes, schema))
    if not isinstance(schema, dict):
        return False
    if _LOGIC & schema.keys() or (_BRANCHES & schema.keys() and _KEYS & schema.keys()):
        return True
    return any(map(_mixes, schema.values()))
