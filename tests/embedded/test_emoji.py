"""The atlas of emoji: its pictures, names and captions, and what is said of damaged ones."""

import io
import json
from collections import Counter
from importlib.resources import files

import pytest
import torch
from PIL import Image

from obsdiff.data.emoji import EmojiDataModule, EmojiWithHeldOut
from obsdiff.data.prompts import load_prompts
from obsdiff.embedded.draw_emoji import draw_atlas, load_font, main
from obsdiff.embedded.emoji import (
    ATLAS,
    COLUMNS,
    HELD_OUT_WORDINGS,
    NAMES,
    TILE,
    TRAIN_WORDINGS,
    caption,
    emoji_of_prompt,
    emoji_prompts,
    load_emoji,
    plain_name,
    read_atlas,
    spell,
    with_article,
)
from obsdiff.errors import UserError

ASSETS = files("obsdiff.data.assets").joinpath("emoji")


@pytest.fixture(scope="module")
def emoji():
    return load_emoji()


def test_the_atlas_holds_different_pictures_of_different_names(emoji):
    assert len(emoji.names) == len(set(emoji.names)) == len(emoji.groups) == len(emoji.pixels) >= 1800
    assert len({picture.numpy().tobytes() for picture in emoji.pixels}) == len(emoji.names)
    assert {"Smileys & Emotion", "Flags", "Animals & Nature", "Symbols"} <= set(emoji.groups)
    images = emoji.images()
    assert images.shape[1:] == (3, TILE, TILE) and images.min() == -1 and images.max() == 1


def test_tiles_are_read_row_by_row(emoji):
    with Image.open(io.BytesIO(ASSETS.joinpath(ATLAS).read_bytes())) as sheet:
        for place in (0, COLUMNS - 1, COLUMNS, len(emoji.names) - 1):
            left, top = place % COLUMNS * TILE, place // COLUMNS * TILE
            tile = sheet.convert("RGB").crop((left, top, left + TILE, top + TILE))
            assert tile.tobytes() == emoji.pixels[place].numpy().tobytes()


@pytest.mark.parametrize("name", ["red apple", "grinning face", "flag of brazil", "dog face", "pizza"])
def test_usual_emoji_are_there(emoji, name):
    assert name in emoji.names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("red apple", "a red apple"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("grapes", "grapes"),
        ("bus", "a bus"),
        ("cactus", "a cactus"),
        ("face with tears of joy", "a face with tears of joy"),
    ],
)
def test_articles(name, said):
    assert with_article(name) == said


def test_names_become_plain_words():
    assert plain_name("flag: Côte d’Ivoire") == "flag cote divoire"
    assert plain_name("keycap: #") == "keycap hash"
    assert plain_name("A button (blood type)") == "a button blood type"


@pytest.mark.parametrize("source", ["emoji-train", "emoji-heldout"])
def test_prompts_are_balanced_and_lead_back(emoji, source):
    wordings = {"emoji-train": TRAIN_WORDINGS, "emoji-heldout": HELD_OUT_WORDINGS}[source]
    prompts = load_prompts(source)
    n = len(emoji.names)
    assert len(prompts) == len(wordings) * n
    asked = [emoji_of_prompt(prompt) for prompt in prompts]
    assert all(sorted(asked[turn * n : (turn + 1) * n]) == list(range(n)) for turn in range(len(wordings)))
    share = Counter(emoji.groups[place] for place in asked[:200])
    assert all(0.5 < share[group] / 200 / (count / n) < 2 for group, count in Counter(emoji.groups).items())
    assert all(spell(prompt) == (prompt, []) for prompt in prompts[::97])


def test_wordings_of_training_and_evaluation_share_no_prompt():
    assert not set(emoji_prompts(TRAIN_WORDINGS)) & set(emoji_prompts(HELD_OUT_WORDINGS))


@pytest.mark.parametrize("prompt", ["", "a zeppelin", "pizza or avocado", "seven"])
def test_prompts_for_none_or_several_have_no_emoji(prompt):
    assert emoji_of_prompt(prompt) is None


def test_the_longest_name_in_a_prompt_counts(emoji):
    assert emoji.names[emoji_of_prompt("please draw an Angry Face with Horns, now")] == "angry face with horns"


def test_unknown_words_are_named_once_in_order_and_left_out():
    assert spell("a Zeppelin eats a Red Apple, zeppelin!") == ("a a red apple", ["zeppelin", "eats"])
    assert spell("Picture of a Red Apple") == ("picture of a red apple", [])
    assert spell("") == ("", [])


def test_a_damaged_atlas_is_refused():
    atlas, names = ASSETS.joinpath(ATLAS).read_bytes(), ASSETS.joinpath(NAMES).read_bytes()
    with Image.open(io.BytesIO(atlas)) as sheet:
        other = sheet.convert("RGB")
        small = other.crop((0, 0, COLUMNS * TILE, TILE))
        other.putpixel((3, 3), (1, 2, 3))
    for damaged in (atlas[:5000], b"", b"no picture", _png(other), _png(small)):
        with pytest.raises(UserError, match=r"emoji atlas in here is damaged .*; install obsdiff again") as caught:
            read_atlas(damaged, names, "here")
        assert "\n" not in str(caught.value)
    for damaged in (names[:-20], b"", b"[]", b'{"emoji": [[1]], "sha256": ""}', json.dumps({"emoji": []}).encode()):
        with pytest.raises(UserError, match="emoji atlas in here is damaged"):
            read_atlas(atlas, damaged, "here")


def _png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_without_the_font_its_package_is_named(tmp_path, capsys):
    with pytest.raises(UserError, match="Debian package fonts-noto-color-emoji"):
        load_font(tmp_path / "nothing.ttf")
    (tmp_path / "text.ttf").write_text("no font")
    with pytest.raises(UserError, match="no colour font"):
        draw_atlas(tmp_path / "text.ttf", tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["--font", str(tmp_path / "nothing.ttf"), "--output", str(tmp_path / "atlas")])
    assert ended.value.code == 2 and not (tmp_path / "atlas").exists()
    assert capsys.readouterr().err.count("\n") == 1


def test_batches_pair_pictures_with_their_captions(emoji):
    data = EmojiDataModule(batch_size=8)
    item = data.train[len(emoji.names) * 3 + 5]
    assert item["label"] == 5 and torch.equal(item["image"], emoji.images()[5])
    assert item["prompt"] in {caption(wording, emoji.names[5]) for wording in TRAIN_WORDINGS}
    assert {data.train[len(emoji.names) * i + 5]["prompt"] for i in range(len(TRAIN_WORDINGS))} == {
        caption(wording, emoji.names[5]) for wording in TRAIN_WORDINGS
    }
    [batch] = EmojiWithHeldOut(batch_size=8, num_validation=12).val_dataloader()
    assert batch["image"].shape == (12, 3, TILE, TILE) and len(set(batch["label"].tolist())) == 12
