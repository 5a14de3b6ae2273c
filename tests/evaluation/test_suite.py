"""The suite: each measure against its formula written out, names that are wrong, missing weights, spoilt images."""

import itertools
import json
import math

import pytest
import torch
from torch.nn.functional import cosine_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from obsdiff import names
from obsdiff.diffusion.frechet import frechet_distance
from obsdiff.embedded.digits import DIGIT_WORDS, load_digits
from obsdiff.embedded.emoji import HELD_OUT_WORDINGS, caption, load_emoji
from obsdiff.embedded.emoji_encoder import emoji_features
from obsdiff.evaluation.alignment import READERS
from obsdiff.evaluation.evaluate import Images, evaluation_of, remarks_on, result_of, worst_prompts
from obsdiff.evaluation.extractors import EXTRACTORS
from obsdiff.evaluation.measures.base import Batch
from obsdiff.evaluation.measures.distribution import (
    Frechet,
    KernelDistance,
    MeanDiscrepancy,
    PrecisionRecall,
    Real,
)
from obsdiff.evaluation.suite import KINDS, PART, load_suite
from obsdiff.export.figures import TITLES, evaluation_table
from obsdiff.pruning.options import EvaluationOptions

NAN = float("nan")


@pytest.fixture(scope="module")
def scans():
    """Scans in [0, 1] and prompts that ask for them."""
    images, labels = load_digits("test")
    return (images[:40] + 1) / 2, [f"the digit {DIGIT_WORDS[label]}" for label in labels[:40]]


def suite(alignment=None, **options):
    return load_suite(alignment, EvaluationOptions(**options))


def noisy(images, strength=0.1, seed=0):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + strength * noise).clamp(0, 1)


def test_names_are_those_that_the_options_take():
    assert tuple(KINDS) == names.MEASURES and tuple(EXTRACTORS) == names.EXTRACTORS
    assert set(KINDS) <= set(TITLES)
    assert tuple(name for name, kind in KINDS.items() if "extractor" in kind.needs) == names.BY_NETWORK
    assert tuple(name for name, kind in KINDS.items() if "real" in kind.needs) == names.AGAINST_REAL


def test_fidelity_by_its_formulas(scans):
    dense, prompts = scans
    images = noisy(dense)
    found = suite().measure(images, prompts, dense)
    each = [float((a.double() - b.double()).square().mean()) for a, b in zip(dense, images, strict=True)]
    similar = [
        float(structural_similarity_index_measure(b[None], a[None], data_range=1.0))
        for a, b in zip(dense, images, strict=True)
    ]
    assert found["mse"] == pytest.approx(sum(each) / 40, rel=1e-9) and found["ssim"] == pytest.approx(sum(similar) / 40)
    assert found["psnr"] == pytest.approx(-10 * math.log10(found["mse"]))
    assert found["mse_interval"][0] < found["mse"] < found["mse_interval"][1]
    same = suite().measure(dense, prompts, dense)
    assert same["mse"] == 0 and same["psnr"] is None and same["ssim"] == pytest.approx(1)
    small = suite().measure(images[..., :8, :8], prompts, dense[..., :8, :8])
    assert "ssim" not in small and small["mse"] > 0


def test_a_pipeline_with_a_reader_has_its_measures(scans):
    dense, prompts = scans
    found = suite("digits").measure(dense, prompts, dense)
    assert found["alignment"] >= 0.95 and {"frechet", "kid", "precision", "recall"} <= found.keys()
    reader = READERS["digits"]
    features = torch.cat([reader.features(part) for part in dense.split(PART)])  # rounding may depend on the batch
    assert found["frechet"] == pytest.approx(frechet_distance(features, reader.real()), rel=1e-9)
    assert "mse" not in suite("digits").measure(dense, prompts) and "alignment" not in suite("digits").measure(
        dense, [""] * 40
    )
    assert set(suite("digits").measure(dense[:1], prompts[:1], dense[:1])) >= {"mse", "alignment"}


def test_emoji_are_told_by_group_and_perceived():
    chosen = list(range(0, 1880, 40))
    pictures = (load_emoji().images()[chosen] + 1) / 2
    prompts = [caption(HELD_OUT_WORDINGS[0], load_emoji().names[place]) for place in chosen]
    images = pictures.clone()
    images[0] = pictures[1]
    found = suite("emoji").measure(images, prompts, pictures)
    groups = [load_emoji().groups[place] for place in chosen]
    assert list(found["alignment_groups"]) == sorted(set(groups))
    for group, part in found["alignment_groups"].items():
        assert part["n"] == groups.count(group) and part["value"] == pytest.approx(1 - (group == groups[0]) / part["n"])
    assert found["alignment"] == pytest.approx(1 - 1 / len(chosen)) and found["alignment_top5"] >= found["alignment"]
    wanted = 1 - cosine_similarity(emoji_features(images), emoji_features(pictures)).double().mean()
    assert found["distance"] == pytest.approx(float(wanted), abs=1e-6)


def test_per_image_values_are_those_of_the_means(scans):
    dense, prompts = scans
    measured, images = suite("digits"), noisy(dense)
    found, each = measured.measure(images, prompts, dense), measured.values()
    assert set(each) == {"mse", "ssim", "alignment"}
    assert all(float(values.mean()) == pytest.approx(found[name]) for name, values in each.items())


def test_images_are_measured_in_parts(scans, monkeypatch):
    dense, prompts = scans
    measured, images, seen = suite("digits"), noisy(dense), []
    whole = measured.measure(images, prompts, dense)
    monkeypatch.setattr("obsdiff.evaluation.suite.PART", 7)
    update = measured.update
    monkeypatch.setattr(measured, "update", lambda *given: (seen.append(len(given[1])), update(*given)))
    again = measured.measure(images, prompts, dense)
    assert seen == [7] * 5 + [5] and again.keys() == whole.keys()
    assert all(again[name] == pytest.approx(whole[name], rel=1e-6) for name in whole)


def test_batches_and_doubles_change_nothing(scans):
    """As the processes of a run see them: in parts, out of order, some twice."""
    dense, prompts = scans
    measured, images = suite("digits"), noisy(dense)
    whole = measured.measure(images, prompts, dense)
    measured.start()
    for part in (torch.arange(20, 40), torch.tensor([3, 39, 20]), torch.arange(0, 20)):
        measured.update(part, images[part], [prompts[n] for n in part.tolist()], dense[part])
    again = measured.figures(shared=False)
    assert again.keys() == whole.keys()
    for name in whole:
        assert again[name] == pytest.approx(whole[name], rel=1e-6), name


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_images_that_are_not_finite_have_no_figures(scans, value):
    dense, prompts = scans
    images = dense.clone()
    images[2, 0, 3, 5] = value
    measured = suite("digits")
    found = measured.measure(images, prompts, dense)
    assert found.pop("not_finite") == 1 and set(found.values()) == {None}
    assert found.keys() == measured.measure(dense, prompts, dense).keys()
    each = measured.values()["mse"] if measured.measure(images, prompts, dense) else None
    assert each is not None and each.isnan().tolist() == [at == 2 for at in range(40)]  # not those of a black image
    assert (
        evaluation_of(
            measured, prompts, list(range(40)), {"dense": Images(dense, dense[:0]), "pruned": Images(images, dense[:0])}
        )["worst"]
        == []
    )
    assert measured.measure(dense, prompts, dense)["mse"] == 0  # it does not stay
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("part", [1000, 5])
def test_precision_and_recall_by_loops(part, monkeypatch):
    monkeypatch.setattr("obsdiff.evaluation.measures.distribution.PART", part)
    torch.manual_seed(0)
    own, real = torch.randn(12, 3, dtype=torch.float64), 0.5 + torch.randn(15, 3, dtype=torch.float64)

    def within(these, those):
        count = 0
        for point in these:
            for at, centre in enumerate(those):
                others = sorted(float((centre - other).norm()) for n, other in enumerate(those) if n != at)
                if float((point - centre).norm()) <= others[2]:
                    count += 1
                    break
        return count / len(these)

    found = PrecisionRecall("precision@x", None, lambda: Real.of(real)).of(own)
    assert found == {"precision@x": within(own, real), "recall@x": within(real, own)}
    assert PrecisionRecall("precision", None, lambda: Real.of(real)).of(own[:3]) == {}


@pytest.mark.parametrize("part", [1000, 5])
def test_discrepancy_by_loops(part, monkeypatch):
    monkeypatch.setattr("obsdiff.evaluation.measures.distribution.PART", part)
    torch.manual_seed(0)
    own, real = torch.randn(6, 4).double(), torch.randn(7, 4).double()
    unit = [side / side.norm(dim=1, keepdim=True) for side in (own, real)]

    def mean(a, b):
        kernel = [math.exp(-float((x - y).square().sum()) / 200) for x, y in itertools.product(a, b)]
        return sum(kernel) / len(kernel)

    wanted = 1000 * (mean(unit[0], unit[0]) + mean(unit[1], unit[1]) - 2 * mean(*unit))
    assert MeanDiscrepancy("cmmd", None, lambda: Real.of(real)).of(own)["cmmd"] == pytest.approx(wanted)


def test_frechet_and_kid_are_those_of_clean_fid():
    """To 1e-3 relative, on the same features."""
    import numpy
    from cleanfid.fid import frechet_distance as theirs
    from cleanfid.fid import kernel_distance

    torch.manual_seed(0)
    own, real = torch.randn(300, 32).double(), (0.3 + 1.2 * torch.randn(300, 32)).double()
    wanted = theirs(
        *[f(x) for x in (own.numpy(), real.numpy()) for f in (lambda x: x.mean(0), lambda x: numpy.cov(x.T))]
    )
    assert Frechet("frechet", None, lambda: Real.of(real)).of(own)["frechet"] == pytest.approx(wanted, rel=1e-3)
    numpy.random.seed(3)
    before, wanted = numpy.random.get_state()[1].copy(), kernel_distance(real.numpy(), own.numpy())
    numpy.random.seed(3)
    assert KernelDistance("kid", None, lambda: Real.of(real)).of(own)["kid"] == pytest.approx(wanted, rel=1e-3)
    assert (numpy.random.get_state()[1] == before).all()  # nobody else's random numbers change

    x, y = own[:40], real[:30]  # the unbiased estimate of its subsets, by loops
    kernel = lambda a, b: (float(a @ b) / 32 + 1) ** 3  # noqa: E731
    subset = KernelDistance("kid", None, lambda: Real.of(y)).of(x[:30])["kid"]
    within = [kernel(a, b) for side in (x[:30], y) for a, b in itertools.permutations(side, 2)]
    cross = [kernel(a, b) for a, b in itertools.product(x[:30], y)]
    assert subset == pytest.approx(2 * sum(within) / len(within) - 2 * sum(cross) / len(cross), rel=1e-6)


def test_what_lacks_something_is_left_out_with_the_reason(tmp_path):
    with pytest.warns(UserWarning, match="not measured: frechet@inception, kid, alignment") as caught:
        found = suite(
            measures=["mse", "frechet@inception", "kid", "alignment"], extractors={"inception": str(tmp_path)}
        )
    assert list(found.measures) == ["mse"] and list(found.skipped) == ["frechet@inception", "kid", "alignment"]
    assert "inception-2015-12-05.pt" in found.skipped["frechet@inception"] and str(tmp_path) in str(caught[0].message)
    assert "needs an extractor" in found.skipped["kid"] and "clip_score" in found.skipped["alignment"]
    assert all("\n" not in reason for reason in found.skipped.values())


def test_an_evaluation_says_what_contradicts_itself(scans):
    dense, prompts = scans
    drawn = {
        "dense": Images(dense, dense),
        "pruned": Images(noisy(dense), dense[:0]),
        "recovered": Images(dense, dense),
    }
    found = evaluation_of(suite("digits"), prompts, list(range(7, 47)), drawn)
    assert found["n"] == 40 and found["first_seed"] == 7 and found["few"] == {"frechet": 65}
    assert found["recovered"]["mse"] == 0 and result_of(found) is found["recovered"]
    assert "frechet_unguided" in found["dense"] and "mse_unguided" not in found["recovered"]
    assert found["says"]["alignment"] == "embedded digit classifier"
    assert remarks_on({"dense": {"frechet": 5.0}, "pruned": {"frechet": 4.0, "mse": 0.1}}) == [
        "frechet falls from dense to pruned (5 to 4) while images move away from the dense ones: it does not show what "
        "was lost"
    ]
    falls = {"dense": {"frechet": 5.0}, "pruned": {"frechet": 4.0, "mse": 0.1}}
    assert remarks_on(falls, {"frechet": 65}) == []
    assert remarks_on({"dense": {"frechet": 5.0}, "pruned": {"frechet": 6.0, "mse": 0.1}}) == []
    assert remarks_on({"pruned": {"frechet": 6.0, "mse": 0.1}, "recovered": {"frechet": 5.0, "mse": 0.05}}) == []
    table = "\n".join(evaluation_table(found))
    assert "| | dense | pruned | recovered |" in table and "| MSE to dense |  | 0." in table and "n = 40" in table


def test_the_worst_prompts_are_named():
    errors = torch.tensor([1.0, 5.0, 3.0, 2.0, 9.0])
    found = worst_prompts(errors, ["a", "b", "a", "c", "c"], 2)
    assert found == [{"prompt": "c", "mse": 5.5, "n": 2}, {"prompt": "b", "mse": 5.0, "n": 1}]
    assert worst_prompts(None, ["a"]) == worst_prompts(errors[:1], [""]) == []


def test_batches_extract_features_once():
    calls = []

    def extract(images):
        calls.append(len(images))
        return images.flatten(1)

    batch = Batch(torch.arange(2), torch.rand(2, 1, 4, 4), ["", ""], torch.rand(2, 1, 4, 4))
    assert batch.features(extract) is batch.features(extract) and not batch.features(extract, dense=True).equal(
        batch.features(extract)
    )
    assert calls == [2, 2]
