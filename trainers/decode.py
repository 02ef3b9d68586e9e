"""From plain mappings (JSON, YAML) to frozen config dataclasses, refusing what does not fit with one clear line."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from trainers.errors import ConfigError


T = TypeVar("T")


def decode(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from `data`, recursively.

    Raises:
        ConfigError: unknown key, missing key, wrong type, or whatever a `__post_init__` refuses; the message starts
            with the full key.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'config'}={data!r} is not a section; write it as `key: value` lines")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {_join(where, near[0])}?" if near else f"known keys: {', '.join(sorted(fields))}"
            raise ConfigError(f"{_join(where, key)}={data[key]!r} is not a known key; {hint}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], _join(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(where, name)} is missing; add it to the config or as {_join(where, name)}=VALUE")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}" if where else str(error)) from None


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
        raise ConfigError(f"{where}={value!r} is not one of {', '.join(map(str, args))}")
    if origin in (Union, types.UnionType):
        return _union(args, value, where)
    if dataclasses.is_dataclass(hint):
        return decode(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list | tuple):
        if args[-1:] != (Ellipsis,) and len(value) != len(args):
            raise ConfigError(f"{where}={list(value)!r} has {len(value)} values; give {len(args)}")
        kinds = [args[0]] * len(value) if args[-1:] == (Ellipsis,) else args
        return tuple(_value(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {str(key): _value(args[1], item, _join(where, key)) for key, item in value.items()}
    if hint is Any or (hint is dict and isinstance(value, Mapping)):
        return value
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, str, bool, type(None)) and type(value) is hint:
        return value
    name = getattr(origin or hint, "__name__", str(hint))
    raise ConfigError(f"{where}={value!r} is of type {type(value).__name__}; give {_article(name)}")


def _union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    kinds = [arg for arg in args if arg is not type(None)]
    sections = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if isinstance(value, Mapping) and len(sections) == 1:
        return _value(sections[0], value, where)
    plain = [kind for kind in kinds if kind not in sections]
    if len(plain) == 1:
        return _value(plain[0], value, where)
    for kind in plain:
        try:
            return _value(kind, value, where)
        except ConfigError:
            continue
    raise ConfigError(f"{where}={value!r} is of type {type(value).__name__}; give one of {', '.join(map(str, kinds))}")


def _article(name: str) -> str:
    names = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}
    names |= {"dict": "a section of key: value", "tuple": "a list"}
    return names.get(name, name)
