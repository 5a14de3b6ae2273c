"""The CIFAR-10 comparison at toy size: its own configs through the real command, on a small random DDPM and a parquet
of images laid out like the data set."""

import json
import re
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from obsdiff.cli.main import main
from obsdiff.embedded.tiny_ddpm import TinyDDPM, build_tiny_ddpm
from obsdiff.evaluation.evaluate import result_of
from tests.rules.test_architecture import ROOT

SIZES = TinyDDPM(channels=(16, 32), groups=8, head_dim=32, image_size=32, image_channels=3)  # attention of one head


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A pipeline, a parquet and a copy of the recipe that reads it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    torch.manual_seed(0)
    build_tiny_ddpm(SIZES).save_pretrained(tmp_path / "dense")
    [documented] = re.findall(r"```python\n(from pathlib.*?)```", (ROOT / "docs/usage.md").read_text(), re.DOTALL)
    changes = {
        "google/ddpm-cifar10-32": str(tmp_path / "dense"),
        "outputs/": f"{tmp_path}/",
        'steps": 100': 'steps": 2',
    }
    for old, new in changes.items():
        assert old in documented
        documented = documented.replace(old, new)
    exec(documented, {})
    drawn = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    images = []
    for pixels in drawn:
        file = BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    columns = {"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    table = datasets.Dataset.from_dict({"img": images, "label": [3] * 8}, features=datasets.Features(columns))
    table.to_parquet(tmp_path / "train.parquet")
    recipe = yaml.safe_load((ROOT / "configs/recover/cifar10.yaml").read_text())
    recipe["trainer"]["accelerator"] = "cpu"
    recipe["data"]["init_args"] |= {"source": str(tmp_path / "train.parquet"), "batch_size": 4, "num_workers": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.mark.slow
def test_it_runs_from_its_configs(toy):
    chosen = {
        "pipeline": toy / "ddpm-cifar10",
        "output": toy / "out",
        "methods": "[obs, diff-pruning+refit]",
        "patterns": "['structured parameters:0.7']",
        "recipes": f"{{fine-tuned: {toy / 'recipe.yaml'}}}",
        "budget": "{steps: 2}",
        "seeds": "[0]",
        "calibration": "{num_prompts: 2}",
        "evaluation": "{num_images: 2, measures: [mse, ssim], real: null}",
        "shown": "2",
    }
    options = [str(part) for name, value in chosen.items() for part in (f"--{name}", value)]
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", str(ROOT / "configs/compare/cifar10.yaml"), *options])
    assert stopped.value.code == 0
    rows = [json.loads(line) for line in (toy / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["error"] for row in rows] == [None] * 4
    assert {(row["method"], row["recipe"]) for row in rows} == {
        (method, recipe) for method in ("obs", "diff-pruning+refit") for recipe in ("one shot", "fine-tuned")
    }
    for row in rows:
        assert row["parameters"]["pruned"] <= 0.7 * row["parameters"]["dense"]
        assert result_of(row["evaluation"])["mse"] > 0
        if row["recipe"] == "fine-tuned":
            assert row["recovery"]["steps"] == 2 and row["costs"]["recovery"]["images"] == 8
    assert "| diff-pruning+refit | uniform | fine-tuned |" in (toy / "out" / "report.md").read_text()
