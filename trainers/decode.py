"""From plain mappings (JSON, YAML) to frozen config dataclasses, refusing what does not fit with one clear line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from trainers.errors import ConfigError

T = TypeVar("T")


def decode(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from `data`, recursively.

    Raises:
        ConfigError: unknown key, missing key, wrong type, a number that is not finite, or whatever a `__post_init__`
            refuses; one line that starts with the full key.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'config'}={_show(data)} is not a section; write it as `key: value` lines")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {_join(where, near[0])}?" if near else f"known keys: {', '.join(sorted(fields))}"
            raise ConfigError(f"{_join(where, key)}={_show(data[key])} is not a known key; {hint}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], _join(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            if dataclasses.is_dataclass(hints[name]):
                decode(hints[name], {}, _join(where, name))  # names the first key that the missing section needs
            raise ConfigError(f"{_join(where, name)} is missing; add it to the config or as {_join(where, name)}=VALUE")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}" if where else str(error)) from None


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _show(value: object) -> str:
    """A value as the user wrote it: YAML's words on one line, cut short."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
        raise ConfigError(f"{where}={_show(value)} is not one of {', '.join(map(str, args))}")
    if origin in (Union, types.UnionType):
        return _union(args, value, where)
    if dataclasses.is_dataclass(hint):
        return decode(hint, value, where)  # pyright: ignore[reportArgumentType]
    if origin is tuple and isinstance(value, list | tuple):
        return _tuple(args, value, where)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {str(key): _value(args[1], item, _join(where, key)) for key, item in value.items()}
    if hint is Any:
        return _plain(value, where)
    if hint is float and type(value) in (int, float):
        return _finite(value, where)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    quotes = ", in quotes" if hint is str else ""
    raise ConfigError(f"{where}={_show(value)} is {_kind(type(value))}; give {_kind(origin or hint)}{quotes}")


def _union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first member of the union that fits; the error of a section is the section's own."""
    if value is None and type(None) in args:
        return None
    kinds = [arg for arg in args if arg is not type(None)]
    sections = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if isinstance(value, Mapping) and len(sections) == 1:
        return _value(sections[0], value, where)
    for kind in kinds:
        try:
            return _value(kind, value, where)
        except ConfigError:
            if len(kinds) == 1:
                raise
    names = [name for kind in kinds for name in _names(kind)] + ["null"] * (len(kinds) < len(args))
    raise ConfigError(f"{where}={_show(value)} is {_kind(type(value))}; give {' or '.join(names)}")


def _names(kind: Any) -> list[str]:
    origin = get_origin(kind)
    return [str(word) for word in get_args(kind)] if origin is Literal else [_kind(origin or kind)]


def _tuple(kinds: tuple[Any, ...], value: list[Any] | tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise ConfigError(f"{where}={_show(value)} has length {len(value)}; give {len(kinds)} values")
    return tuple(_value(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _plain(value: Any, where: str) -> Any:
    """`value` of any shape, as it is, if JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, _join(where, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float):
        return _finite(value, where)
    if value is None or isinstance(value, int | str):
        return value
    raise ConfigError(f"{where}={_show(value)} is {_kind(type(value))}; give a number, a text, a list or a section")


def _finite(value: float, where: str) -> float:
    try:
        if math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number too large for a float
        pass
    raise ConfigError(f"{where}={_show(value)} is not finite; give a number below 1e308")


def _kind(kind: type) -> str:
    names = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}
    names |= {"dict": "a section", "list": "a list", "tuple": "a list", "NoneType": "null"}
    return "a section" if dataclasses.is_dataclass(kind) else names.get(kind.__name__, kind.__name__)
