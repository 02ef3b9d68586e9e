from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from trainers.decode import decode
from trainers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"size={self.size} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    name: str = "x"
    flag: bool = False
    kind: Literal["a", "b", 1] = "a"
    limit: float | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[int, ...] = ()
    profiles: dict[str, Inner] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    count: int | Inner = 1


def test_every_kind_of_field_is_decoded():
    given = {
        "inner": {"size": 2, "ratio": 1},
        "name": "run",
        "flag": True,
        "kind": "b",
        "limit": 3,
        "pair": [0, 2.5],
        "many": [1, 2, 3],
        "profiles": {"slow": {"size": 9}},
        "args": {"blocks": ["A", "B"], "deep": {"x": None, "y": 1.5}},
        "count": {"size": 4},
    }
    assert decode(Outer, given) == Outer(
        inner=Inner(size=2, ratio=1.0),
        name="run",
        flag=True,
        kind="b",
        limit=3.0,
        pair=(0.0, 2.5),
        many=(1, 2, 3),
        profiles={"slow": Inner(size=9)},
        args={"blocks": ["A", "B"], "deep": {"x": None, "y": 1.5}},
        count=Inner(size=4),
    )


def test_a_whole_number_becomes_a_float_where_one_is_due():
    inner = decode(Inner, {"size": 1, "ratio": 2})
    assert type(inner.ratio) is float and inner.ratio == 2.0


def test_defaults_come_from_the_dataclass():
    assert decode(Outer, {"inner": {"size": 1}}) == Outer(inner=Inner(size=1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "inner.size is missing; add it to the config or as inner.size=VALUE"),
        ({"inner": None}, "inner=null is not a section; write it as `key: value` lines"),
        ({"inner": 3}, "inner=3 is not a section; write it as `key: value` lines"),
        ({"inner": {"size": 0}}, "inner.size=0 must be at least 1"),
        ({"inner": {"siez": 1}}, "inner.siez=1 is not a known key; did you mean inner.size?"),
        ({"inner": {"xyz": 1}}, "inner.xyz=1 is not a known key; known keys: ratio, size"),
        ({"inner": {"size": 1.0}}, "inner.size=1.0 is a number; give a whole number"),
        ({"inner": {"size": True}}, "inner.size=true is true or false; give a whole number"),
        ({"inner": {"size": 1, "ratio": "1"}}, 'inner.ratio="1" is a text; give a number'),
        ({"inner": {"size": 1, "ratio": float("nan")}}, "inner.ratio=NaN is not finite; give a number below 1e308"),
        ({"inner": {"size": 1, "ratio": float("-inf")}}, "inner.ratio=-Infinity is not finite"),
        ({"inner": {"size": 1, "ratio": 10**400}}, "is not finite; give a number below 1e308"),
        ({"name": 7}, "name=7 is a whole number; give a text, in quotes"),
        ({"name": None}, "name=null is null; give a text, in quotes"),
        ({"flag": 1}, "flag=1 is a whole number; give true or false"),
        ({"kind": "c"}, 'kind="c" is not one of a, b, 1'),
        ({"kind": True}, "kind=true is not one of a, b, 1"),  # True == 1, but was not meant
        ({"limit": "no"}, 'limit="no" is a text; give a number'),
        ({"pair": [1]}, "pair=[1] has length 1; give 2 values"),
        ({"pair": 1}, "pair=1 is a whole number; give a list"),
        ({"pair": [1, "x"]}, 'pair[1]="x" is a text; give a number'),
        ({"many": [1, 2.5]}, "many[1]=2.5 is a number; give a whole number"),
        ({"profiles": {"slow": {"size": 0}}}, "profiles.slow.size=0 must be at least 1"),
        ({"profiles": [1]}, "profiles=[1] is a list; give a section"),
        ({"args": {"deep": {"x": [float("inf")]}}}, "args.deep.x[0]=Infinity is not finite"),
        ({"args": {"x": object}}, "give a number, a text, a list or a section"),
        ({"count": "x"}, 'count="x" is a text; give a whole number or a section'),
        ({"count": {"size": 0}}, "count.size=0 must be at least 1"),
        ({"name": ["x" * 200]}, "... is a list; give a text, in quotes"),
    ],
)
def test_what_does_not_fit_is_refused_with_one_line(given: dict[str, Any], message: str):
    if given and "inner" not in given:
        given = {"inner": {"size": 1}, **given}
    with pytest.raises(ConfigError) as caught:
        decode(Outer, given)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600


def test_a_line_break_in_a_value_stays_one_line():
    with pytest.raises(ConfigError) as caught:
        decode(Outer, {"inner": {"size": "two\nlines"}})
    assert str(caught.value) == 'inner.size="two\\nlines" is a text; give a whole number'


def test_a_text_is_shown_as_it_was_written():
    with pytest.raises(ConfigError, match=r'inner\.size="zwölf" is a text'):
        decode(Outer, {"inner": {"size": "zwölf"}})
