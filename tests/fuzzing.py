"""Files that were changed by accident or by malice, for tests of what reads them."""

import copy
import json
import shutil

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from obsdiff.errors import UserError

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.text(max_size=5),
    st.just("x" * 5000),
    st.just("../../etc/passwd"),
    st.just("\ud800"),
    st.just([]),
    st.just({}),
    st.just([[[[0]]]]),
    st.just({"a": {"b": [None]}}),
    st.sampled_from(["2:4", "unstructured:0.5", "dense", "nan", "1e999", "structured:0.5", "-1", "\0"]),
)


def fuzzed(cases):
    return settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def places(value, at=()):
    """Every place in a JSON value."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


def changed(draw, value):
    """``value`` with one to three places dropped, replaced, renamed, nested or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        all_places = [place for place in places(value) if place]
        if not all_places:
            return value
        short = [place for place in all_places if len(place) < 3]
        place = draw(st.sampled_from(short if short and draw(st.booleans()) else all_places))
        at = value
        for key in place[:-1]:
            at = at[key]
        how = draw(st.sampled_from(["drop", "odd", "odd", "rename", "nest", "double"]))
        if how == "drop":
            del at[place[-1]]
        elif how == "odd":
            at[place[-1]] = copy.deepcopy(draw(ODD))
        elif how == "rename" and isinstance(at, dict):
            at[draw(st.text(max_size=4))] = at.pop(place[-1])
        elif how == "nest":
            at[place[-1]] = [at[place[-1]]]
        elif how == "double" and isinstance(at, list):
            at.append(copy.deepcopy(at[place[-1]]))
    return value


@st.composite
def files(draw, value, dump=json.dumps):
    """The bytes of a file that holds something like ``value``."""
    how = draw(st.sampled_from(["value"] * 8 + ["bytes", "whole", "deep"]))
    if how == "whole":
        content = draw(ODD)
    elif how == "deep":
        return b"[" * draw(st.sampled_from([10, 1_000, 100_000]))
    else:
        content = changed(draw, value)
    data = dump(content).encode("utf-8", "surrogatepass")
    if how == "bytes":
        return damaged(draw, data)
    return data


def damaged(draw, data):
    """Bytes cut off, replaced or added."""
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    how = draw(st.sampled_from(["cut", "flip", "insert", "random"]))
    if how == "cut":
        return data[:at]
    if how == "flip":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :] if data else b""
    if how == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
    return draw(st.binary(max_size=200))


def works_or_is_refused(read, *args):
    """No other exception than a :class:`UserError` of one line that is not too long."""
    try:
        read(*args)
    except UserError as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 2000, error
        return False
    return True


def copied(run, tmp_path, name, file):
    """A folder with the same files, and the path of the one that is going to change."""
    target = tmp_path / name
    if not target.exists():
        shutil.copytree(run / name, target)
    return target, target / file
