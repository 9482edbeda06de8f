"""Dataclasses to JSON and back, strictly, and the JSON schema that says the same to other programs.

A manifest is a tree of frozen dataclasses. ``from_json`` refuses unknown keys, missing keys and wrong types by naming
the place in the document; ``json_schema`` derives the published schema from the very same definitions, so the two
cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any, TypeVar

from mufasa_rec.data import paths

T = TypeVar("T")
_SCALARS: dict[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number"}


def load_json(url: paths.Location) -> Any:
    """Reads a JSON document; a broken one is a ``ValueError`` that names the file and the line."""
    with paths.open_file(url, "rb") as file:
        data = file.read()
    try:
        return json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{url}: not valid JSON ({error}); restore the file or prepare the data set again") from error


def save_json(value: Any, url: paths.Location) -> None:
    """Writes a dataclass or a plain JSON value, indented, atomically."""
    text = json.dumps(to_json(value), indent=2, ensure_ascii=False, allow_nan=False)
    with paths.atomic_write(url) as path:
        path.write_text(text + "\n", encoding="utf-8")


def to_json(value: Any) -> Any:
    """Plain dicts, lists and scalars of a tree of dataclasses (tuples become lists)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def from_json(kind: type[T], value: Any, where: str) -> T:
    """Builds a dataclass of type ``kind`` from parsed JSON.

    Args:
        kind: The dataclass.
        value: Parsed JSON.
        where: File name, for messages.

    Raises:
        ValueError: An unknown or missing key, or a wrong type; names file, key, value.
    """
    return _decode(kind, value, where)


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _decode(next(arm for arm in typing.get_args(kind) if arm is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{where}: is {value!r}; must be one of {', '.join(map(repr, typing.get_args(kind)))}")
        return value
    if origin in (list, tuple):
        arm = typing.get_args(kind)[0]
        return origin(_decode(arm, item, f"{where}[{k}]") for k, item in enumerate(_expect(value, list, where)))
    if origin is dict:
        arm = typing.get_args(kind)[1]
        return {key: _decode(arm, item, f"{where}.{key}") for key, item in _expect(value, dict, where).items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return _expect(value, kind, where)


def _expect(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: is {value!r} ({type(value).__name__}); must be of type {kind.__name__}")
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    document = _expect(value, dict, where)
    unknown = sorted(set(document) - set(fields))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(fields)}")
    missing = [name for name, field in fields.items() if name not in document and _required(field)]
    if missing:
        raise ValueError(f"{where}: key {missing[0]!r} is missing; add it, or prepare the data set again")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _decode(hints[name], item, f"{where}: {name}") for name, item in document.items()})


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def json_schema(kind: Any, title: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a dataclass; what ``from_json`` accepts and nothing else."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
    return schema | _schema_of(kind)


def _schema_of(kind: Any) -> dict[str, Any]:
    origin = typing.get_origin(kind)
    if kind is Any:
        return {}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = dataclasses.fields(kind)
        return {
            "type": "object",
            "description": (kind.__doc__ or "").split("\n")[0],
            "properties": {field.name: _schema_of(hints[field.name]) for field in fields},
            "required": [field.name for field in fields if _required(field)],
            "additionalProperties": False,
        }
    if origin in (typing.Union, types.UnionType):
        return {
            "anyOf": [{"type": "null"}, *(_schema_of(arm) for arm in typing.get_args(kind) if arm is not type(None))]
        }
    if origin is typing.Literal:
        return {"enum": list(typing.get_args(kind))}
    if origin in (list, tuple):
        return {"type": "array", "items": _schema_of(typing.get_args(kind)[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(typing.get_args(kind)[1])}
    return {"type": _SCALARS[kind]}
