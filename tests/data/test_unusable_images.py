"""Image data sets with holes: nulls, damaged files, captions that are none; counted, skipped, refused above a share."""

import warnings
from io import BytesIO

import datasets
import pytest
from PIL import Image

from obsdiff.data.digits import DigitsDataModule
from obsdiff.data.images import ImageCaptionDataModule
from obsdiff.data.trajectories import TrajectoryDataModule
from obsdiff.errors import UserError

FEATURES = datasets.Features(
    {
        "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "caption": datasets.Value("string"),
    }
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(shade=0):
    file = BytesIO()
    Image.new("L", (9, 8), shade).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def module_of(tmp_path, images, captions, features=FEATURES, **options):
    path = tmp_path / "set.parquet"
    datasets.Dataset.from_dict({"image": images, "caption": captions}, features=features).to_parquet(path)
    options = {"size": 8, "batch_size": 1, "num_workers": 0, **options}
    return ImageCaptionDataModule(str(path), **options)


def prompts(module):
    return [prompt for batch in module.train_dataloader() for prompt in batch["prompt"]]


def test_nulls_and_damage_are_counted_and_replaced(tmp_path):
    images = [picture(i) for i in range(10)]
    images[2], images[5] = None, {"bytes": b"no", "path": None}
    captions = [f"caption {i}" for i in range(10)]
    captions[7], captions[8] = None, "  "
    module = module_of(tmp_path, images, captions, max_corrupt=0.5)
    why = "4 of 10 images .* cannot be used .2 with no image that can be decoded, 2 with no caption, such as number 2"
    with pytest.warns(UserWarning, match=why):
        module.setup("fit")
    found = prompts(module)
    assert len(found) == 10 and set(found) == {f"caption {i}" for i in (0, 1, 3, 4, 6, 9)}


@pytest.mark.parametrize("what", ["image", "caption"])
def test_a_small_set_is_refused_before_anything_else_is_done(tmp_path, what):
    images, captions = [picture()] * 8, ["a cat"] * 8
    (images if what == "image" else captions)[3] = None
    with pytest.raises(UserError, match=r"1 of 8 images .*more than the 5% of data.max_corrupt"):
        module_of(tmp_path, images, captions).setup("fit")
    module_of(tmp_path, images, captions).setup("test")  # trains nothing, reads nothing


def test_none_left(tmp_path):
    with pytest.raises(UserError, match=r"8 of 8 images .*none is left"):
        module_of(tmp_path, [None] * 8, ["a cat"] * 8, max_corrupt=1.0).setup("fit")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_share_counts_over_all_loader_processes(tmp_path, workers):
    """What all of them saw together is judged, in this process and in one line."""
    looked_at = {i * 30 // 20 for i in range(20)}  # in setup
    images = [picture() if i in looked_at else None for i in range(30)]
    module = module_of(tmp_path, images, ["a cat"] * 30, num_workers=workers)
    module.setup("fit")
    with pytest.raises(UserError, match=r"of \d+ images .* more than the 5%") as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prompts(module)
    assert "Traceback" not in str(error.value) and "\n" not in str(error.value)


def test_warnings_come_when_the_number_has_doubled(tmp_path):
    images = [picture()] * 40 + [None] * 24
    module = module_of(tmp_path, images, ["a cat"] * 64, max_corrupt=0.9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.setup("fit")
        prompts(module)
    said = [int(str(w.message).split()[0]) for w in caught if "cannot be used" in str(w.message)]
    assert said[0] == 7 and said == sorted(said) and len(said) == 2  # 7 of the 20 looked at, then twice as many


def test_of_several_captions_each_epoch_draws_one(tmp_path):
    features = datasets.Features({**FEATURES, "caption": datasets.List(datasets.Value("string"))})
    lists = [[f"{i}a", None, f"{i}b", f"{i}c"] for i in range(16)]
    epochs = []
    for seed in (0, 0, 1):
        module = module_of(tmp_path, [picture()] * 16, lists, features, seed=seed)
        module.setup("fit")
        loader = module.train_dataloader()
        first = [prompt for batch in loader for prompt in batch["prompt"]]
        loader.sampler.set_epoch(1)
        epochs.append((first, [prompt for batch in loader for prompt in batch["prompt"]]))
    assert epochs[0] == epochs[1] != epochs[2]
    first, second = epochs[0]
    assert sorted(int(text[:-1]) for text in first) == list(range(16))
    assert {text[-1] for text in first} == {"a", "b", "c"} and sorted(first) != sorted(second)


def test_columns_of_other_types_are_refused_by_name(tmp_path):
    numbers = datasets.Features({**FEATURES, "caption": datasets.Value("int64")})
    with pytest.raises(UserError, match=r"column 'caption' of .* holds int64, not text"):
        module_of(tmp_path, [picture()], [3], numbers).setup("fit")
    with pytest.raises(UserError, match=r"column 'caption' of .* holds int64, not images"):
        module_of(tmp_path, [picture()], [3], numbers, image_column="caption", caption_column="image").setup("fit")


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0},
        {"size": -16},
        {"batch_size": 0},
        {"batch_size": -1},
        {"num_workers": -1},
        {"seed": -1},
        {"seed": 2**63},
        {"max_corrupt": float("nan")},
        {"max_corrupt": 1.5},
        {"channels": 4},
        {"source": ""},
        {"split": ""},
    ],
)
def test_options_are_checked_at_once(options):
    with pytest.raises(UserError, match=rf"data\.{next(iter(options))} is "):
        ImageCaptionDataModule(**{"source": "nowhere", **options})


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_workers": -1}, {"seed": -1}])
def test_other_data_modules_check_the_same(options, tmp_path):
    for make in (
        DigitsDataModule,
        lambda **o: TrajectoryDataModule("nowhere", str(tmp_path), "digits-train", **o),
    ):
        with pytest.raises(UserError, match=rf"data\.{next(iter(options))} is "):
            make(**options)


def test_too_few_items_are_refused_in_setup():
    with pytest.raises(UserError, match="the digits has 17244 items, fewer than one batch of 20000"):
        DigitsDataModule(batch_size=20_000).setup("fit")


def test_image_shapes_are_declared(tmp_path):
    assert DigitsDataModule().image_shape == (1, 16, 16)
    assert ImageCaptionDataModule("nowhere", size=32).image_shape == (3, 32, 32)
    assert TrajectoryDataModule("nowhere", str(tmp_path), "digits-train").image_shape is None
    module = module_of(tmp_path, [picture(128)], ["a cat"], channels=1)
    module.setup("fit")
    [batch] = module.train_dataloader()
    assert batch["image"].shape[1:] == module.image_shape == (1, 8, 8)
