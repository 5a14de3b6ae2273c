"""LPIPS without its weights, and with others in their place: the trunk is built once for all batches."""

from urllib.error import URLError

import pytest
import torch
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as lpips

import obsdiff
from obsdiff.evaluation.measures.base import Batch
from obsdiff.evaluation.measures.fidelity import PatchSimilarity


def test_without_weights_the_place_for_them_is_named(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(obsdiff.UserError, match=rf"AlexNet \(alexnet-owt-7be5be79.pth\) in {tmp_path}/hub/checkpoints"):
        PatchSimilarity.loaded()


@pytest.mark.slow  # a quarter of a gigabyte of weights
def test_it_is_what_torchmetrics_gives_batch_by_batch(monkeypatch, tmp_path):
    from torchvision.models import alexnet

    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    torch.save(alexnet().state_dict(), tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth")
    images, dense = torch.rand(3, 3, 64, 64), torch.rand(3, 3, 64, 64)
    measure = PatchSimilarity.loaded()
    for part in (slice(0, 2), slice(2, 3)):
        measure.update(Batch(torch.arange(3)[part], images[part], [""] * 3, dense[part]))
    wanted = lpips(images, dense, "alex", reduction="none", normalize=True)
    found = measure.kept()
    torch.testing.assert_close(found.flatten().float(), wanted, rtol=1e-5, atol=1e-6)
    same = measure.rows_of(Batch(torch.arange(3), dense, [""] * 3, dense))
    assert bool((wanted > 0.01).all()) and float(same.abs().max()) < 1e-6
