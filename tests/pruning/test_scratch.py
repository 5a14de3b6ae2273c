import pytest
import torch

from obsdiff import load_pipeline, prune, save_pipeline
from obsdiff.pruning.masks import weight_masks
from obsdiff.pruning.scratch import draw_weights


def redrawn(pipe, pattern, seed=3):
    """A pipe pruned and given new weights: the denoiser, and the masks of its single weights."""
    report = prune(pipe, pattern, method="random")
    masks = weight_masks(report.masks, report.shrunk is not None)
    draw_weights(pipe.transformer, masks, seed)
    return report, masks


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4", "structured:0.5"])
def test_the_shape_stays_and_the_weights_are_new(pipe, tmp_path, pattern):
    dense = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    state = torch.get_rng_state()
    report, masks = redrawn(pipe, pattern)
    assert torch.equal(torch.get_rng_state(), state)
    assert bool(masks) is not pattern.startswith("structured")
    for name, mask in masks.items():
        weight = pipe.transformer.get_parameter(f"{name}.weight")
        assert torch.equal(weight != 0, mask)
    for name, layer in pipe.transformer.named_modules():
        if not isinstance(layer, torch.nn.Linear) or not bool(layer.weight.any()):
            continue  # the class begins some layers with zeros
        assert float(layer.weight.abs().max()) <= layer.in_features**-0.5
        same = dense[f"{name}.weight"]
        assert same.shape != layer.weight.shape or not torch.equal(same, layer.weight)
        assert float(layer.weight.std()) > 0.2 * layer.in_features**-0.5
    save_pipeline(pipe, tmp_path / "out", report)
    loaded = load_pipeline(tmp_path / "out")
    for name, value in loaded.transformer.state_dict().items():
        assert torch.equal(value, pipe.transformer.state_dict()[name]), name


def test_the_seed_decides(pipe):
    redrawn(pipe, "structured:0.5", seed=1)
    first = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    for seed, same in ((1, True), (2, False)):
        draw_weights(pipe.transformer, {}, seed)
        found = pipe.transformer.state_dict()
        assert all(torch.equal(found[name], value) for name, value in first.items()) is same
