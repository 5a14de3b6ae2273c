"""A recovery on captioned images with loader processes: lists of captions, holes, and going on after a stop."""

from io import BytesIO

import datasets
import pytest
from PIL import Image

from obsdiff.training import inputs
from tests.training.common import assert_same, fit, result


@pytest.mark.filterwarnings("ignore:1 of")
@pytest.mark.slow
def test_goes_on_with_the_same_images_and_captions(pipe_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = []
    for shade in range(0, 240, 20):
        file = BytesIO()
        Image.new("L", (16, 16), shade).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    images[3] = None
    captions = [[f"the digit {word}", f"a {word}", f"a scan of {word}"] for word in ("two", "seven", "one", "six")] * 3
    kind = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": kind, "caption": datasets.List(datasets.Value("string"))})
    table = datasets.Dataset.from_dict({"image": images, "caption": captions}, features=features)
    table.to_parquet(tmp_path / "set.parquet")
    data = {"source": tmp_path / "set.parquet", "size": 16, "channels": 1, "num_workers": 2, "max_corrupt": 0.2}
    extra = ["--data=obsdiff.data.images.ImageCaptionDataModule", *(f"--data.{name}={v}" for name, v in data.items())]
    extra += ["--data.batch_size=4", "--model.objective.denoise=1", "--model.pruning.method=magnitude"]

    seen = {"whole": [], "parts": []}
    run, real = "whole", inputs.Inputs.__call__

    def recorded(self, batch, *more):
        if run == "parts" and len(seen["parts"]) == 5:  # in the middle of the second epoch
            seen["parts"].append(None)
            raise RuntimeError("power cut")
        seen[run].append(batch["prompt"])
        return real(self, batch, *more)

    monkeypatch.setattr(inputs.Inputs, "__call__", recorded)
    fit(pipe_folder, tmp_path / "whole", *extra)
    run = "parts"
    with pytest.raises(RuntimeError, match="power cut"):
        fit(pipe_folder, tmp_path / "parts", *extra)
    fit(pipe_folder, tmp_path / "parts", *extra, "--ckpt_path=last")
    assert_same(result(tmp_path / "parts"), result(tmp_path / "whole"))
    assert len(seen["whole"]) == 6 and seen["whole"][:3] != seen["whole"][3:]
    assert seen["parts"][:5] == seen["whole"][:5] and seen["parts"][6:] == seen["whole"][5:]
