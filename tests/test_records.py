"""Records: dataclasses to JSON and back, strictly."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_onnx.core.records import RecordError, from_json

Size = Literal["small", "large"]


@dataclass(frozen=True)
class Part:
    name: str
    weight: float


@dataclass(frozen=True)
class Whole:
    count: int
    ready: bool
    size: Size
    note: str | None
    main: Part
    spare: Part | None
    parts: tuple[Part, ...]
    shares: dict[Size, float]
    boxes: dict[str, tuple[int, ...]]
    label: str = "none"


WHOLE = Whole(
    count=3,
    ready=True,
    size="small",
    note=None,
    main=Part("a", 0.1),
    spare=Part("b", 1e-300),
    parts=(Part("c", -2.5), Part("d", 3.0)),
    shares={"small": 0.25, "large": 0.75},
    boxes={"x/y.z": (1, 2), "": ()},
    label="é\n",
)


def edited(path: list[Any], value: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(dataclasses.asdict(WHOLE)))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


def test_a_record_survives_json() -> None:
    assert from_json(Whole, json.loads(json.dumps(dataclasses.asdict(WHOLE)))) == WHOLE


COUNTS = st.integers(-(2**63) + 1, 2**63 - 1)
WEIGHTS = st.floats(-(2.0**62), 2.0**62)


@given(
    st.builds(
        Whole,
        count=COUNTS,
        ready=st.booleans(),
        size=st.sampled_from(["small", "large"]),
        note=st.none() | st.text(),
        main=st.builds(Part, st.text(), WEIGHTS),
        spare=st.none() | st.builds(Part, st.text(), WEIGHTS),
        parts=st.lists(st.builds(Part, st.text(), WEIGHTS)).map(tuple),
        shares=st.dictionaries(st.sampled_from(["small", "large"]), WEIGHTS),
        boxes=st.dictionaries(st.text(), st.lists(COUNTS).map(tuple)),
    )
)
def test_any_record_survives_json(whole: Whole) -> None:
    assert from_json(Whole, json.loads(json.dumps(dataclasses.asdict(whole)))) == whole


def test_tuples_come_back_as_tuples_at_every_depth() -> None:
    whole = from_json(Whole, json.loads(json.dumps(dataclasses.asdict(WHOLE))))
    assert type(whole.parts) is tuple
    assert type(whole.boxes["x/y.z"]) is tuple
    assert type(whole.parts[0]) is Part


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        (["extra"], 1, "extra"),
        (["main", "extra"], 1, "main.extra"),
        (["spare", "extra"], 1, "spare.extra"),
        (["parts", 1, "extra"], 1, r"parts\[1\].extra"),
    ],
)
def test_an_unknown_key_is_refused_by_its_dotted_name(
    path: list[Any], value: Any, key: str
) -> None:
    with pytest.raises(RecordError, match=f"unknown key '{key}'"):
        from_json(Whole, edited(path, value))


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (["count"], "count"),
        (["note"], "note"),
        (["main", "weight"], "main.weight"),
        (["parts", 0, "name"], r"parts\[0\].name"),
    ],
)
def test_a_missing_key_is_refused_by_its_dotted_name(path: list[Any], key: str) -> None:
    data = edited(path, None)
    inner: Any = data
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    with pytest.raises(RecordError, match=f"missing key '{key}'"):
        from_json(Whole, data)


def test_a_key_with_a_default_may_be_missing() -> None:
    data = json.loads(json.dumps(dataclasses.asdict(WHOLE)))
    del data["label"]
    assert from_json(Whole, data).label == "none"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["count"], "3", "'count' must be int, not str"),
        (["count"], 3.0, "'count' must be int, not float"),
        (["count"], None, "'count' must be int, not NoneType"),
        (["ready"], 1, "'ready' must be bool, not int"),
        (["ready"], "true", "'ready' must be bool, not str"),
        (["note"], 5, "'note' must be str, not int"),
        (["label"], None, "'label' must be str, not NoneType"),
        (["size"], "medium", "'size' must be one of small, large"),
        (["size"], None, "'size' must be one of small, large"),
        (["size"], ["small"], "'size' must be one of small, large"),
        (["main"], None, "main must be an object"),
        (["main"], [], "main must be an object"),
        (["main", "weight"], "1", "'main.weight' must be float, not str"),
        (["spare", "name"], 1, "'spare.name' must be str, not int"),
        (["parts"], {}, "'parts' must be a list"),
        (["parts"], "ab", "'parts' must be a list"),
        (["parts", 1], "d", r"parts\[1\] must be an object"),
        (["parts", 1, "weight"], "x", r"'parts\[1\].weight' must be float, not str"),
        (["shares"], [], "'shares' must be an object"),
        (["shares", "large"], "x", "'shares.large' must be float, not str"),
        (["boxes", "x/y.z", 1], 0.5, r"'boxes.x/y.z\[1\]' must be int, not float"),
    ],
)
def test_a_mistyped_value_is_refused_by_its_dotted_name(
    path: list[Any], value: Any, message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        from_json(Whole, edited(path, value))


def test_a_key_outside_the_literal_of_a_dict_is_refused_by_name() -> None:
    with pytest.raises(RecordError, match=r"shares.*medium"):
        from_json(Whole, edited(["shares", "medium"], 1.0))


@pytest.mark.parametrize(
    "path", [["count"], ["main", "weight"], ["shares", "small"], ["boxes", "x/y.z", 0]]
)
@pytest.mark.parametrize("value", [True, False])
def test_a_bool_is_not_a_number(path: list[Any], value: bool) -> None:
    with pytest.raises(RecordError, match="not bool"):
        from_json(Whole, edited(path, value))


def test_an_integer_is_taken_for_a_float_and_becomes_one() -> None:
    weight = from_json(Whole, edited(["main", "weight"], 2)).main.weight
    assert type(weight) is float
    assert weight == 2.0


def test_an_integer_too_large_for_a_float_is_refused_by_name() -> None:
    with pytest.raises(RecordError, match=r"main\.weight"):
        from_json(Whole, edited(["main", "weight"], 10**400))


@pytest.mark.parametrize("data", [[], "x", 1, None])
def test_a_document_that_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(RecordError, match="document must be an object"):
        from_json(Whole, data)


def test_names_start_with_where_the_document_lies() -> None:
    with pytest.raises(RecordError, match=r"unknown key 'top.inner.extra'"):
        from_json(Part, {"name": "a", "weight": 1.0, "extra": 0}, "top.inner")
