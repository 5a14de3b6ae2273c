"""The reader of emoji: what it names, near misses, groups, distances, and prompts it cannot judge."""

import warnings
from importlib.resources import files

import pytest
import torch

from obsdiff.embedded.emoji import HELD_OUT_WORDINGS, caption, load_emoji
from obsdiff.embedded.emoji_encoder import EmojiEncoder, load_encoder
from obsdiff.embedded.train_emoji_encoder import EmojiEncoderTraining, changed, held_out
from obsdiff.errors import UserError
from obsdiff.evaluation.alignment import READERS, check_measurable, in_known_words
from obsdiff.evaluation.suite import load_suite
from obsdiff.pruning.options import EvaluationOptions

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


def test_distances_are_nothing_to_itself_and_grow_with_damage(pictures, prompts):
    suite = load_suite("emoji", EvaluationOptions(measures=["distance", "frechet"]))

    def distance(images):
        return suite.measure(images, prompts, pictures)["distance"]

    assert distance(pictures) == pytest.approx(0, abs=1e-6)
    little, much = (
        distance((pictures + strength * torch.randn_like(pictures)).clamp(0, 1)) for strength in (0.05, 0.5)
    )
    assert 0 < little < much
    everything = (load_emoji().images() + 1) / 2
    asked = [""] * len(everything)
    assert suite.measure(everything, asked)["frechet"] == pytest.approx(0, abs=0.01)
    assert suite.measure(everything.flip(-2), asked)["frechet"] > 1


def test_what_names_no_emoji_cannot_be_judged():
    with pytest.raises(UserError, match="cannot measure alignment: prompt 'a zeppelin' names no emoji") as caught:
        check_measurable(["a red apple", "a zeppelin"], "emoji")
    assert "\n" not in str(caught.value)
    check_measurable(["icon of a red apple"], "emoji")
    check_measurable(["a zeppelin"], "emoji", ["mse", "clip_score"])  # nobody asks what is seen


def test_unknown_words_are_said_once_and_left_out():
    with pytest.warns(UserWarning, match="the pipeline knows no word zeppelin, eats; prompts are read without"):
        found = in_known_words(["a Zeppelin eats a Red Apple", "the zeppelin", "pizza"], "emoji")
    assert found == ["a a red apple", "the", "pizza"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert in_known_words(["zeppelin"], "digits") == in_known_words(["zeppelin"], None) == ["zeppelin"]


def test_digits_have_no_near_misses():
    assert READERS["digits"].near_hits(torch.rand(2, 1, 16, 16), ["a one", "a two"]) is None


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
