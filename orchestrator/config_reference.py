"""What each key of a config means: the text under its field in the code, so that it is written once."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from orchestrator.config import RunConfig

_KINDS = {int: "whole number", float: "number", str: "text", bool: "true | false", type(None): "null", Any: "anything"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key, explained."""

    name: str
    """Dotted. NAME stands for a name of your choice, [] for each entry of a list."""
    kind: str
    """What its value may be."""
    default: str | None
    """In YAML's syntax; None: it has none, and must be given."""
    text: str


def explain(key: str = "") -> list[Key]:
    """The keys that are called `key` or lie below it, in the order of the sections; all without one."""
    wanted = re.sub(r"\[\d*\]", "", key).split(".") if key else []
    return [one for one in _keys(RunConfig, "") if _is_below(one.name.replace("[]", "").split("."), wanted)]


def _is_below(parts: list[str], wanted: list[str]) -> bool:
    pairs = zip(parts, wanted, strict=False)
    return len(parts) >= len(wanted) and all(part in (word, "NAME") for part, word in pairs)


def _keys(section: type, where: str) -> Iterator[Key]:
    hints, texts = get_type_hints(section), _texts(section)
    for field in dataclasses.fields(section):  # pyright: ignore[reportArgumentType]
        name, hint = f"{where}{field.name}", hints[field.name]
        below = list(_sections(hint, name))
        # What the section is, where no key says more.
        whole = " ".join(str(below[0][1].__doc__).split()) if below else ""
        yield Key(name=name, kind=_kind(hint), default=_default(field), text=texts.get(field.name, whole))
        for at, inner in below:
            yield from _keys(inner, f"{at}.")


@cache  # the source of a class is slow to find, and asked for with every key
def _texts(section: type) -> dict[str, str]:
    """The string under each field, of the classes that it inherits from too."""
    found = {}
    for cls in reversed(section.__mro__[:-1]):  # but for `object`
        (tree,) = ast.parse(inspect.getsource(cls)).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                    found[field.target.id] = " ".join(below.value.value.split())
    return found


def _sections(hint: Any, name: str) -> Iterator[tuple[str, type]]:
    """The sections that a value may hold, and where their keys are."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        yield name, hint  # pyright: ignore[reportReturnType]
    elif origin in (Union, types.UnionType):
        for arg in args:
            yield from _sections(arg, name)
    elif origin is tuple:
        yield from _sections(args[0], f"{name}[]")
    elif origin in (dict, Mapping):
        yield from _sections(args[1], f"{name}.NAME")


def _kind(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_kind, args))
    if origin is tuple:
        return f"list of {_kind(args[0])}" if args[-1] is Ellipsis else f"[{', '.join(map(_kind, args))}]"
    if origin in (dict, Mapping):
        return f"section of {_kind(args[1])}"
    return "section" if dataclasses.is_dataclass(hint) else _KINDS[hint]


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        value = {} if dataclasses.is_dataclass(field.default_factory) else field.default_factory()
    else:
        return None
    return json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value)  # pyright: ignore[reportArgumentType]
