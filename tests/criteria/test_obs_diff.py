"""The published method against brute force: every inverse taken afresh in float64, every choice in plain Python."""

import pytest
import torch

from obsdiff.criteria import METHODS, GroupProblem, Problem
from obsdiff.criteria.obs_diff import choose, chunks, group_scores
from obsdiff.criteria.structured import RULES, choose_groups
from obsdiff.obs.linalg import damped, inverse
from obsdiff.obs.pattern import NM, Structured, Unstructured
from obsdiff.obs.structured import Consumer, group_errors

DAMPING = 0.01


def layer(rows, columns, seed, samples=900):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x / samples


def published_sweep(weight, hessian, ratio=None, nm=None, block=128):
    """Eq. 2 column by column. Unstructured: an equal share of each block; N:M: from the weights as they are."""
    h = damped(hessian, DAMPING).double()
    w, (rows, columns) = weight.double().clone(), weight.shape
    remaining = [torch.linalg.inv(h[q:, q:]) for q in range(columns)]
    kept = torch.ones(rows, columns, dtype=torch.bool)
    for q in range(columns):
        if ratio is not None and q % block == 0:
            end = min(q + block, columns)
            costs = torch.stack([w[:, j] ** 2 / remaining[j][0, 0] for j in range(q, end)], dim=1)
            total = round(ratio * rows * columns)
            count = round(total * end / columns) - round(total * q / columns)
            gone = costs.flatten().argsort()[:count]
            kept[gone // (end - q), q + gone % (end - q)] = False
        if nm is not None and q % nm.m == 0:
            costs = torch.stack([w[:, j] ** 2 / remaining[j][0, 0] for j in range(q, q + nm.m)], dim=1)
            for row, order in enumerate(costs.argsort(dim=1)[:, : nm.m - nm.n]):
                kept[row, q + order] = False
        error = torch.where(kept[:, q], 0.0, w[:, q] / remaining[q][0, 0])
        w[:, q:] -= error[:, None] * remaining[q][0]
    return w * kept, kept


@pytest.mark.parametrize(("pattern", "asked"), [(Unstructured(0.5), {"ratio": 0.5}), (NM(2, 4), {"nm": NM(2, 4)})])
def test_single_weights_are_the_published_sweep(pattern, asked):
    """Over 128 columns, 160 in all: the second block is chosen from weights that know of the first."""
    weight, hessian = layer(5, 160, 0)
    [solution] = METHODS["obs-diff"].solve(Problem([weight], [pattern], hessian, DAMPING, [0]))
    expected, kept = published_sweep(weight, hessian, **asked)
    assert torch.equal(solution.mask, kept)
    torch.testing.assert_close(solution.weight.double(), expected, rtol=1e-3, atol=1e-3)


def published_score(weight, inverse_, columns):
    """``Σ_k ‖W_k‖² / c_k``: c_k the conditional variance of column k given the group's columns before it (Schur)."""
    score = 0.0
    for at, k in enumerate(columns):
        before = columns[:at]
        c = inverse_[k, k] - inverse_[k, before] @ torch.linalg.solve(inverse_[before][:, before], inverse_[before, k])
        score += float((weight[:, k] ** 2).sum() / c)
    return score


def published_choice(layers, count, size, removals):
    """Score, fuse by eq. 8 (the first stream decides ties), remove, compensate by eq. 2's closed form, repeat."""
    alive = list(range(count))
    for now in removals:
        scores = []
        for weight, hessian in layers:
            h = damped(hessian, DAMPING).double()
            columns = [g * size + k for g in alive for k in range(size)]
            w = torch.linalg.solve(h[columns][:, columns], h[columns] @ weight.double().T).T
            inverse_ = torch.linalg.inv(h[columns][:, columns])
            inside = [list(range(i * size, (i + 1) * size)) for i in range(len(alive))]
            scores.append({g: published_score(w, inverse_, inside[i]) for i, g in enumerate(alive)})
        ranked = [sorted(alive, key=of.get) for of in scores]
        order = ranked[0]
        if len(ranked) > 1:
            fused = {g: sum(1 / (60 + 1 + ranks.index(g)) for ranks in ranked) for g in ranked[0]}
            order = sorted(fused, key=fused.get, reverse=True)
        alive = [g for g in alive if g not in order[:now]]
    return alive


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("streams", [1, 2])
def test_heads_go_one_by_one(streams, seed):
    layers = [layer(6, 8 * 4, 10 * seed + stream) for stream in range(streams)]
    consumers = [Consumer(weight, hessian) for weight, hessian in layers]
    kept = choose_groups("obs-diff", GroupProblem(consumers, [], 8, 4, 5, "reciprocal_rank", DAMPING, 0))
    assert kept.nonzero().flatten().tolist() == published_choice(layers, 8, 4, [1] * 5)


def test_neurons_go_in_the_published_chunks():
    layers = [layer(7, 200, 3)]
    kept = choose(GroupProblem([Consumer(*layers[0])], [], 200, 1, 150, "reciprocal_rank", DAMPING, 0))
    assert kept.nonzero().flatten().tolist() == published_choice(layers, 200, 1, [64, 64, 22])


def test_chunks():
    """SD3-M at 20 %: 15 of them; SD3.5-L at 30 %: 27."""
    assert list(chunks(1229)) == [358, *[64] * 13, 39]
    assert list(chunks(2918))[:3] == [1024, 345, 64] and len(list(chunks(2918))) == 27
    assert list(chunks(64)) == [64] and list(chunks(0)) == []


def test_the_score_is_exact_for_neurons_and_an_approximation_for_heads():
    weight, hessian = layer(6, 32, 1)
    inverse_ = inverse(hessian, DAMPING)[0]
    torch.testing.assert_close(group_scores(weight, inverse_, 1), group_errors(weight, inverse_, 1))
    assert not torch.allclose(group_scores(weight, inverse_, 4), group_errors(weight, inverse_, 4), rtol=0.01)


def test_the_row_is_as_published():
    row = METHODS["obs-diff"]
    assert (row.refit, row.centred, row.weighting, row.allocation, row.packages) == (
        False,
        False,
        "log_decrease",
        "uniform",
        4,
    )
    assert row.structured == "obs-diff" and row.structured in RULES and row.compensates and row.multiple_of == 1


@pytest.mark.parametrize(
    ("dense", "blocks", "heads", "share", "billions"),
    [
        *((2_028_328_000, 24, 24, share, n) for share, n in ((0.1, 1.911), (0.15, 1.834), (0.2, 1.776), (0.25, 1.717))),
        *((8_056_627_520, 38, 38, share, n) for share, n in ((0.15, 7.277), (0.2, 7.016), (0.25, 6.756), (0.3, 6.541))),
    ],
)
def test_parameters_of_the_published_tables(dense, blocks, heads, share, billions):
    """Tables 9 (SD3-medium) and 4 (SD3.5-large): both streams' heads and neurons of all blocks but the spared two."""
    row, width = METHODS["obs-diff"], 64 * heads
    pattern = Structured(share, share, row.multiple_of)
    gone_heads, gone_neurons = heads - pattern.kept("heads", heads), 4 * width - pattern.kept_neurons(4 * width)
    per_head = 64 * (6 * (width + 1) + 2 * width)  # q, k, v of both streams with biases, columns of both outputs
    per_neuron = width + 1 + width
    pruned = blocks - 2  # the first and the last are spared
    left = dense - pruned * (gone_heads * per_head + 2 * gone_neurons * per_neuron)
    assert left / 1e9 == pytest.approx(billions, abs=0.0005)
