import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obsdiff.pruning.masks import load_masks, pack, save_masks, unpack


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 1000))
def test_packing_is_exact(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and len(packed) == -(-mask.numel() // 8)
    assert torch.equal(unpack(packed, shape), mask)


def test_files_round_trip(tmp_path):
    masks = {"a": torch.tensor([True, False, True]), "b": torch.zeros(3, 5, dtype=torch.bool)}
    save_masks(masks, tmp_path / "m.safetensors")
    loaded = load_masks(tmp_path / "m.safetensors")
    assert loaded.keys() == masks.keys() and all(torch.equal(loaded[name], masks[name]) for name in masks)
