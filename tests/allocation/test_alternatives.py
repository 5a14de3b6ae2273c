"""What measures the alternatives: each least squares against a brute-force reference, and the table's form."""

import json

import pytest
import torch
from torch import nn

from obsdiff.bench import alternatives
from obsdiff.bench.alternatives import Map, fitted, main, residual, streams, told
from obsdiff.models.replay import MadeCall
from obsdiff.models.subject import subject_of
from tests.conftest import make_pipe


def test_a_map_is_the_least_squares_with_a_constant():
    torch.manual_seed(0)
    x, true = torch.randn(400, 5) + 2, nn.Linear(5, 3)
    layer = fitted(x, true(x).detach())
    torch.testing.assert_close(layer.weight, true.weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(layer.bias, true.bias, atol=1e-2, rtol=1e-2)
    image, text = torch.randn(2, 4, 5), torch.randn(2, 3, 5)
    same = nn.Linear(5, 5)
    new_text, new_image = Map(same, same)(image, encoder_hidden_states=text, temb=None)
    assert torch.equal(new_text, text + same(text)) and torch.equal(new_image, image + same(image))


def test_a_residual_leaves_least_of_the_output():
    torch.manual_seed(0)
    lost, mix = torch.randn(6, 5), torch.randn(5, 5)
    covariance = mix @ mix.T + 0.1 * torch.eye(5)

    def left(part):
        return float(((lost - part) @ covariance @ (lost - part).T).trace())

    found = residual(lost, covariance, 2)
    assert torch.linalg.matrix_rank(found) == 2
    plain = torch.linalg.svd(lost)
    best = left(found)
    assert best < left(plain.U[:, :2] * plain.S[:2] @ plain.Vh[:2])
    own = torch.linalg.svd(found)
    u, v = own.U[:, :2] * own.S[:2], own.Vh[:2]
    for size in (1e-3, 1e-2, 1.0) * 10:  # near it and far away
        other = (u + size * torch.randn_like(u)) @ (v + size * torch.randn_like(v))
        assert best <= left(other) + 1e-4


def test_blocks_are_seen_in_replayed_calls():
    pipe = make_pipe()
    given, made = streams(pipe.transformer, "transformer_blocks.0", [call_of(pipe)])
    assert [x.shape for x in given] == [y.shape for y in made] and len(given) == 2


def call_of(pipe):
    (call,) = subject_of(pipe).call.values()
    return MadeCall(pipe.transformer, "", {**call, "return_dict": False})


def test_the_command_compares_each_way_with_the_first_of_its_size(monkeypatch, tmp_path):
    def way(seed):
        near = torch.rand(50, generator=torch.Generator().manual_seed(seed))
        return {("a", "alone"): [near], ("a", "both"): [2 * near], ("b", "alone"): [3 * near]}

    monkeypatch.setitem(alternatives.WAYS, "maps", way)
    main(["maps", "--seeds", "3", "4", "--output", str(tmp_path / "out.json")])
    said = json.loads((tmp_path / "out.json").read_text())
    first, both, other = said["found"]
    assert said["seeds"] == [3, 4] and first["ratio"] is None and other["ratio"] is None
    assert both["ratio"] == pytest.approx({"value": 2, "low": 2, "high": 2})
    assert both["by_seed"] == pytest.approx([2 * value for value in first["by_seed"]])
    assert told({}) == []
