"""The reader of emoji: what it names, near misses, groups, distances, and prompts it cannot judge."""

import warnings
from importlib.resources import files

import pytest
import torch

from obsdiff.embedded.emoji import HELD_OUT_WORDINGS, caption, load_emoji
from obsdiff.embedded.emoji_encoder import EmojiEncoder, emoji_features, load_encoder
from obsdiff.embedded.train_emoji_encoder import EmojiEncoderTraining, changed, held_out
from obsdiff.errors import UserError
from obsdiff.evaluation.alignment import READERS, check_measurable, compare_alignment, in_known_words
from obsdiff.evaluation.references import Images, References, measure

EMOJI = READERS["emoji"]
CHOSEN = list(range(0, 1880, 40))


@pytest.fixture(scope="module")
def pictures():
    return (load_emoji().images()[CHOSEN] + 1) / 2


@pytest.fixture(scope="module")
def prompts():
    return [caption(HELD_OUT_WORDINGS[0], load_emoji().names[place]) for place in CHOSEN]


def test_the_encoder_is_small_and_names_pictures_it_never_saw_so():
    folder = files("obsdiff.data.assets").joinpath("emoji-encoder")
    assert len(folder.joinpath("model.safetensors").read_bytes()) <= 2 * 2**20
    images = load_emoji().images()
    with torch.no_grad():
        right = load_encoder()(held_out(images)).argmax(1) == torch.arange(len(images))
    assert float(right.float().mean()) >= 0.94


def test_true_pictures_are_hits_and_others_are_not(pictures, prompts):
    assert float(EMOJI.hits(pictures, prompts).mean()) == 1
    assert float(EMOJI.hits(pictures, prompts[1:] + prompts[:1]).mean()) == 0
    assert float(EMOJI.near_hits(pictures, prompts).mean()) == 1
    assert EMOJI.hits(pictures * torch.nan, prompts).sum() == EMOJI.near_hits(pictures * torch.nan, prompts).sum() == 0


def test_near_hits_are_the_five_likeliest(pictures, prompts):
    with torch.no_grad():
        order = load_encoder()(pictures[:1] * 2 - 1).argsort(1, descending=True)[0].tolist()
    names = load_emoji().names
    asked = [names[place] for place in order[:8]]
    found = EMOJI.near_hits(pictures[:1].expand(8, -1, -1, -1), asked)
    assert found.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


def test_groups_are_counted_apart(pictures, prompts):
    shuffled = pictures.clone()
    shuffled[0] = pictures[1]
    groups = [load_emoji().groups[place] for place in CHOSEN]
    found = EMOJI.by_group(shuffled, prompts)
    assert list(found) == sorted(set(groups))
    for group, (share, n) in found.items():
        assert n == groups.count(group)
        assert share == pytest.approx(1 - (group == groups[0]) / n)


def test_distances_are_nothing_to_itself_and_grow_with_damage(pictures):
    assert EMOJI.perceptual(pictures, pictures) == pytest.approx(0, abs=1e-6)
    little, much = (
        EMOJI.perceptual(pictures, (pictures + strength * torch.randn_like(pictures)).clamp(0, 1))
        for strength in (0.05, 0.5)
    )
    assert 0 < little < much
    one, two = (emoji_features(part) for part in (pictures[:3], pictures[3:6]))
    wanted = 1 - ((one * two).sum(1) / (one.norm(dim=1) * two.norm(dim=1))).mean()
    assert EMOJI.perceptual(pictures[:3], pictures[3:6]) == pytest.approx(float(wanted), abs=1e-5)
    assert EMOJI.perceptual(pictures, pictures * torch.nan) is None
    everything = (load_emoji().images() + 1) / 2
    assert EMOJI.frechet(everything) == pytest.approx(0, abs=0.01)
    assert EMOJI.frechet(everything.flip(-2)) > 1


def test_what_names_no_emoji_cannot_be_judged():
    with pytest.raises(UserError, match="cannot measure alignment: prompt 'a zeppelin' names no emoji") as caught:
        check_measurable(["a red apple", "a zeppelin"], "emoji")
    assert "\n" not in str(caught.value)
    check_measurable(["icon of a red apple"], "emoji")


def test_unknown_words_are_said_once_and_left_out():
    with pytest.warns(UserWarning, match="the pipeline knows no word zeppelin, eats; prompts are read without"):
        found = in_known_words(["a Zeppelin eats a Red Apple", "the zeppelin", "pizza"], "emoji")
    assert found == ["a a red apple", "the", "pizza"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert in_known_words(["zeppelin"], "digits") == in_known_words(["zeppelin"], None) == ["zeppelin"]


def test_reports_hold_near_misses_and_groups(pictures, prompts):
    found = compare_alignment(EMOJI, pictures, pictures.flip(0), prompts)
    assert found["dense"] == found["dense_top5"] == 1 and found["pruned"] < 0.1
    assert sum(part["n"] for part in found["groups"].values()) == len(prompts)
    assert all(part["dense"] == 1 and part["pruned"] <= 1 for part in found["groups"].values())
    nothing = pictures[:0]
    refs = References(
        prompts, list(range(len(prompts))), Images(pictures, pictures), Images(pictures, nothing), "emoji"
    )
    measured = measure(refs, Images(pictures, pictures.flip(0)))
    assert measured["fidelity"]["perceptual"] == pytest.approx(0, abs=1e-6)
    assert measured["alignment"] == measured["alignment_top5"] == 1 and measured["alignment_unguided"] < 0.1


def test_digits_are_read_as_before():
    images, prompts = torch.rand(2, 1, 16, 16), ["a one", "a two"]
    digits = READERS["digits"]
    assert digits.near_hits(images, prompts) is digits.by_group(images, prompts) is None
    assert digits.perceptual(images, images) is None
    assert list(compare_alignment(digits, images, images, prompts)) == ["measure", "dense", "pruned"]


def test_augmented_pictures_stay_pictures():
    torch.manual_seed(0)
    images = load_emoji().images()[:16]
    out = changed(images)
    assert out.shape == images.shape and bool(out.isfinite().all()) and not torch.equal(out, images)
    assert changed(torch.ones(64, 3, 32, 32)).mean() == pytest.approx(1, abs=0.1)  # white moves in from the sides
    assert EmojiEncoder(5)(torch.rand(2, 1, 20, 20)).shape == (2, 5)


def test_a_users_folder_is_refused_before_training(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match="holds something else than a trained encoder"):
        EmojiEncoderTraining(str(tmp_path)).setup("fit")
