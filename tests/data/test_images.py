import csv

import pytest
import torch
from PIL import Image

from obsdiff.data.digits import DigitsDataModule
from obsdiff.data.images import ImageCaptionDataModule
from obsdiff.embedded.digits import DIGIT_WORDS, load_digits
from obsdiff.errors import UserError


def make_folder(folder, count=5):
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (40, 30), (i * 50, 0, 255)).save(folder / f"{i}.png")
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "caption"), *((f"{i}.png", f"image {i}") for i in range(count))])


def test_image_folder_and_parquet(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make_folder(tmp_path / "images")
    import datasets

    table = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "images"), split="train")
    table.to_parquet(tmp_path / "t.parquet")
    for source in (tmp_path / "images", tmp_path / "t.parquet"):
        module = ImageCaptionDataModule(str(source), size=16, batch_size=2, num_workers=0)
        module.setup("fit")
        batches = list(module.train_dataloader())
        assert len(batches) == 2 and batches[0]["image"].shape == (2, 3, 16, 16)
        assert float(batches[0]["image"][:, 2].min()) == 1.0 and batches[0]["prompt"][0].startswith("image ")


def test_bad_images(tmp_path):
    make_folder(tmp_path / "images")
    for options, word in (
        ({"caption_column": "words"}, "no column 'words'"),
        ({"batch_size": 6}, "fewer than one batch"),
    ):
        module = ImageCaptionDataModule(str(tmp_path / "images"), size=16, num_workers=0, **options)
        with pytest.raises(UserError, match=word):
            module.setup("fit")
            module.train_dataloader()
    with pytest.raises(UserError, match="cannot load images"):
        ImageCaptionDataModule(str(tmp_path / "nothing.parquet")).setup("fit")


def test_unreadable_images_are_replaced_and_reported_up_to_a_share(tmp_path):
    make_folder(tmp_path / "images", count=40)
    (tmp_path / "images" / "3.png").write_bytes(b"not an image")
    module = ImageCaptionDataModule(str(tmp_path / "images"), size=16, batch_size=8, num_workers=0)
    module.setup("fit")
    with pytest.warns(UserWarning, match="1 of .* cannot be used .*such as number 3"):
        batches = list(module.train_dataloader())
    assert len(batches) == 5 and len(module.train.corrupt) == 1
    for i in range(10, 30):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="more than the 5%"):
        list(module.train_dataloader())


def test_digits_batches():
    module = DigitsDataModule(batch_size=32)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (32, 1, 16, 16) and float(batch["image"].abs().max()) <= 1
    assert all(DIGIT_WORDS[label] in prompt for label, prompt in zip(batch["label"], batch["prompt"], strict=True))


def test_digit_splits_are_fixed_and_disjoint():
    (train, _), (test, labels) = load_digits("train"), load_digits("test")
    assert len(train) + len(test) == 1797 and len(labels) == 360
    assert torch.equal(load_digits("test")[0], test)
