import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsdiff.errors import UserError
from obsdiff.obs.pattern import NM, Depth, Structured, Unstructured, of_layers, parse_pattern, parse_request


def test_parses():
    assert parse_pattern("unstructured:0.5") == Unstructured(0.5)
    assert parse_pattern("2:4") == NM(2, 4)
    assert parse_pattern("structured:0.3") == Structured(0.3, 0.3, channels=0.3)
    assert parse_pattern("structured:heads=0.25,ffn=0.5,multiple_of=16") == Structured(0.25, 0.5, 16)
    assert parse_pattern(NM(4, 8)) == NM(4, 8)


@pytest.mark.parametrize(
    "text",
    ["", "0.5", "unstructured", "unstructured:", "unstructured:x", "unstructured:1", "unstructured:-0.1",
     "unstructured:nan", "4:4", "5:4", "0:4", "structured:1.0", "structured:heads=2", "structured:head=0.1",
     "structured:heads=0.1,heads=0.2", "structured:heads=0.1,multiple_of=0", "structured:multiple_of=1.5", "2:4:8"],
)  # fmt: skip
def test_refuses(text):
    with pytest.raises(UserError):
        parse_pattern(text)


@given(st.sampled_from([Unstructured(0.5), Unstructured(0.123), NM(2, 4), NM(1, 16), Structured(0.3, 0.3),
                        Structured(0.25, 0.0), Structured(0.1, 0.2, 32)]))  # fmt: skip
def test_text_round_trip(pattern):
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("heads", "ratio", "removed"),
    [(24, 0.10, 2), (24, 0.15, 4), (24, 0.20, 5), (24, 0.25, 6), (38, 0.30, 11)],
)
def test_head_counts_are_the_papers(heads, ratio, removed):
    """Numbers of heads removed in OBS-Diff tables 4 and 9 (SD3-medium: 24 heads, SD3.5-large: 38)."""
    assert heads - Structured(ratio, ratio).kept("heads", heads) == removed


def test_ffn_widths_are_multiples():
    assert Structured(0.3, 0.3).kept_neurons(6144) == 4288  # 4300.8, nearest multiple of 64
    assert Structured(0.3, 0.3).kept_neurons(256) == 176  # nearest multiple of 8
    assert Structured(0.3, 0.3, 1).kept_neurons(6144) == 4301
    assert Structured(0.3, 0.0).kept_neurons(300) == 300
    assert Structured(0.99, 0.99).kept_neurons(256) == 8
    assert Structured(0.0, 0.99).kept("heads", 3) == 3


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("depth:2", Depth(2)),
        ("depth:0.25", Depth(0.25)),
        ("depth:1+structured:0.3", Depth(1, Structured(0.3, 0.3, channels=0.3))),
        ("structured:0.3+depth:1+rank:8", Depth(1, Structured(0.3, 0.3, channels=0.3, rank=8))),
        ("depth:1+2:4", Depth(1, NM(2, 4))),
    ],
)
def test_depth_stands_alone_or_before_a_pattern(text, depth):
    assert parse_request(text) == depth and parse_request(str(depth)) == depth
    assert of_layers(depth) == depth.then and of_layers(parse_request("2:4")) == NM(2, 4)


@pytest.mark.parametrize("text", ["depth:", "depth:0", "depth:-1", "depth:2.5", "depth:nan", "depth:inf",
                                  "depth:1+depth:1", "depth:x", "depth:1+nothing"])  # fmt: skip
def test_impossible_depths(text):
    with pytest.raises(UserError):
        parse_request(text)


def test_stages_that_go():
    assert [Depth(0.25).gone(count) for count in (2, 4, 6, 24, 57)] == [0, 1, 2, 6, 14]
    assert Depth(3).gone(2) == 3
