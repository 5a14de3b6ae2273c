"""Images without captions, as CIFAR-10 has them: found by their column, mirrored at random."""

import datasets
import pytest
import torch

from obsdiff.data.images import ImageCaptionDataModule, ImageDataModule
from obsdiff.errors import UserError
from tests.data.test_unusable_images import picture

COUNT = 12


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def sloped(at):
    """An image that gets brighter to the right, of its own shade."""
    from io import BytesIO

    from PIL import Image

    image = Image.new("L", (8, 8))
    image.putdata([10 * x + at for _ in range(8) for x in range(8)])
    file = BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def parquet(tmp_path, column="img", images=None):
    kept = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({column: kept, "label": datasets.Value("int64")})
    images = images or [sloped(at) for at in range(COUNT)]
    table = datasets.Dataset.from_dict({column: images, "label": list(range(len(images)))}, features=features)
    table.to_parquet(tmp_path / "set.parquet")
    return str(tmp_path / "set.parquet")


def epochs(source, count, **options):
    module = ImageDataModule(source, size=8, batch_size=4, num_workers=0, channels=1, **options)
    module.setup("fit")
    loader = module.train_dataloader()
    loader.batches_done = lambda: 0
    found = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert all(set(batch) == {"image"} and batch["image"].shape == (4, 1, 8, 8) for batch in batches)
        found.append(torch.cat([batch["image"] for batch in batches]))
    return found


@pytest.mark.parametrize("column", ["img", "image"])
def test_images_alone(tmp_path, column):
    [images] = epochs(parquet(tmp_path, column), 1)
    expected = (torch.arange(8) * 10).expand(8, 8)
    for image in images:
        pixels = ((image[0] + 1) * 127.5).round()
        assert torch.equal(pixels - pixels.min(), expected.float())
    assert len({float(image.min()) for image in images}) == COUNT


def test_half_are_mirrored_and_others_in_each_epoch(tmp_path):
    source = parquet(tmp_path)
    found, again = epochs(source, 20, flip=True), epochs(source, 20, flip=True)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    by_epoch = []
    for images in found:
        mirrored = {float(image.min()): bool(image[0, 0, 0] > image[0, 0, -1]) for image in images}
        by_epoch.append([mirrored[shade] for shade in sorted(mirrored)])
    flips = torch.tensor(by_epoch).double()
    assert flips.mean() == pytest.approx(0.5, abs=0.1)
    assert bool(((flips.mean(0) > 0.1) & (flips.mean(0) < 0.9)).all())


def test_a_split_follows_the_name_of_a_data_set():
    for source, named in (
        ("uoft-cs/cifar10", ("uoft-cs/cifar10", "train")),
        ("uoft-cs/cifar10:test", ("uoft-cs/cifar10", "test")),
        ("some/set.parquet", ("some/set.parquet", "train")),
    ):
        module = ImageDataModule(source)
        assert (module.source, module.split) == named and module.image_shape == (3, 32, 32)


def test_what_is_missing_is_named(tmp_path):
    source = parquet(tmp_path)
    with pytest.raises(UserError, match=r"has no column 'pixels'; its columns are img, label"):
        ImageDataModule(source, "pixels", batch_size=4).setup("fit")
    with pytest.raises(UserError, match="has no column 'caption'"):
        ImageCaptionDataModule(source, batch_size=4).setup("fit")
    broken = parquet(tmp_path, images=[{"bytes": b"nothing", "path": None}] * 3 + [picture()])
    with pytest.raises(UserError, match=r"3 of 4 images .* cannot be used .3 with no image that can be decoded"):
        ImageDataModule(broken, size=8, batch_size=4).setup("fit")
